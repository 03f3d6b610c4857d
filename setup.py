"""Builds the C++ extension: `pip install --no-build-isolation .` with torch installed first."""

import os
import sys
from pathlib import Path

from setuptools import find_packages, setup
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from exl3 import build  # noqa: E402

CSRC = HERE / "csrc"


def with_gpu() -> bool:
    """Whether the GPU's kernels are built; says why not where torch could use them."""
    if not build.torch_has_gpu():
        return False
    try:
        build.need_gpu_compiler()
    except build.NoKernels as error:
        print(f"Note: exl3 is built without kernels for the GPU: {error}.", file=sys.stderr)
        return False
    return True


GPU = with_gpu()
BUILT_FROM = build.fingerprint(CSRC, GPU)  # before compiling: sources may change meanwhile
if GPU:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", build.chips())


class BuildKernels(BuildExtension):
    """Writes beside the extension what it was built from, for `exl3.build.installed`."""

    def run(self) -> None:
        super().run()
        library = Path(self.get_ext_fullpath("exl3._C"))
        (library.parent / build.FINGERPRINT).write_text(BUILT_FROM)


setup(
    name="exl3",
    version=(HERE / "exl3" / "VERSION").read_text().strip(),
    description="EXL3 quants from Hugging Face models: convert, measure, optimize, compare",
    license="MIT",
    python_requires=">=3.10",
    # With its sources, so that the extension can be built anew for another torch.
    packages=[*find_packages(include=["exl3", "exl3.*"]), "exl3.csrc"],
    package_dir={"exl3.csrc": "csrc"},
    package_data={"exl3": ["VERSION"], "exl3.csrc": ["**/*"]},
    install_requires=(HERE / "requirements.txt").read_text().split(),
    entry_points={"console_scripts": ["exl3 = exl3.commands:main"]},
    ext_modules=[
        (CUDAExtension if GPU else CppExtension)(
            "exl3._C",
            [str(path.relative_to(HERE)) for path in build.sources(CSRC, GPU)],
            include_dirs=[str(CSRC)],
            extra_compile_args={"cxx": build.FLAGS, **({"nvcc": build.GPU_FLAGS} if GPU else {})},
            extra_link_args=build.LINK_FLAGS,
        )
    ],
    # The library registers torch ops and has no Python interface of its own.
    cmdclass={"build_ext": BuildKernels.with_options(no_python_abi_suffix=True, use_ninja=True)},
)
