"""Builds the C++ extension: `pip install --no-build-isolation -e .` with torch installed first."""

import os
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).parent
WINDOWS = os.name == "nt"

sources = sorted(str(p.relative_to(HERE)) for p in (HERE / "csrc").rglob("*.cpp"))

setup(
    name="exl3",
    version=(HERE / "exl3" / "VERSION").read_text().strip(),
    description="EXL3 quants from Hugging Face models: convert, measure, optimize, compare",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["exl3", "exl3.*"]),
    package_data={"exl3": ["VERSION"]},
    install_requires=(HERE / "requirements.txt").read_text().split(),
    ext_modules=[
        CppExtension(
            "exl3._C",
            sources,
            include_dirs=[str(HERE / "csrc")],
            extra_compile_args=["/O2", "/std:c++17"] if WINDOWS else ["-O3", "-std=c++17", "-Wall"],
        )
    ],
    # The library registers torch ops and has no Python interface of its own.
    cmdclass={"build_ext": BuildExtension.with_options(no_python_abi_suffix=True, use_ninja=True)},
)
