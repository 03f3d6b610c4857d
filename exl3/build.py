"""The C++ extension: what it is made of, whether a built one fits, and building it just in time.

`setup.py` builds it beside this file. A plain clone, or one whose sources or torch are newer than
what was built, builds it on first use and keeps it in a cache. Without a compiler torch serves.

Where torch has a GPU the extension has the kernels of `csrc/cuda` too: `nvcc` compiles them, for a
ROCm torch hipify translates them first (untested). Without that compiler there are the CPU's only.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

WINDOWS = os.name == "nt"
PACKAGE = Path(__file__).resolve().parent
# A wheel carries the sources inside the package.
CSRC = PACKAGE / "csrc" if (PACKAGE / "csrc").is_dir() else PACKAGE.parent / "csrc"
FLAGS = ["/O2", "/std:c++20"] if WINDOWS else ["-O3", "-g0", "-std=c++20", "-Wall"]
GPU_FLAGS = ["-O3"]  # torch adds its C++ standard and the chips
# A C++ library that a compiler links in (some images have no other) must not mix with torch's:
# printing a number crashed.
LINK_FLAGS = ["-Wl,--exclude-libs,ALL"] if sys.platform.startswith("linux") else []
# What is built where no GPU is seen, by `pip install` in a container; newer chips take the last.
DEFAULT_CHIPS = "8.0;8.6;8.9;9.0+PTX"
HEADERS = ("include", "targets/*/include")  # of CUDA, in its folder
LIBRARY = "_C.pyd" if WINDOWS else "_C.so"
FINGERPRINT = "_C.fingerprint"  # beside the library: what it was built from

# In a process of its own, because torch's builder prints and loads what it has built.
BUILDER = (
    "import json, sys; from torch.utils.cpp_extension import load; load(**json.loads(sys.argv[1]))"
)


class NoKernels(Exception):
    """Why there are no kernels, and the way out; `log` is what the compiler said."""

    def __init__(self, reason: str, log: str = ""):
        super().__init__(reason)
        self.log = log


def load_kernels() -> bool:
    """Loads the extension: the installed, else a cached, else a newly built one.

    If there is none to be had, says so on stderr and returns False; and if there is one without
    the GPU's kernels where torch has a GPU, says what is missing.
    """
    try:
        library = _library()
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            raise NoKernels(f"they do not load ({error}); delete {library} to build anew") from None
    except NoKernels as error:
        _say(
            f"Warning: exl3 works without its C++ kernels: {error}. Plain torch stands in for "
            "them, some three hundred times slower: enough to try things, not to convert a model."
        )
        if error.log and os.environ.get("EXL3_VERBOSE"):
            _say("\n".join(error.log.splitlines()[-40:]))
        return False
    return True


def _library() -> Path:
    """The best library there is or can be built."""
    if not (torch_has_gpu() and torch.cuda.is_available()):
        return installed() or cached() or build()
    try:
        return installed(gpu=True) or cached(gpu=True) or build(gpu=True)
    except NoKernels as error:
        _say(f"Note: exl3 has no kernels for the GPU: {error}. The CPU does the work.")
        if error.log and os.environ.get("EXL3_VERBOSE"):
            _say("\n".join(error.log.splitlines()[-40:]))
    return installed() or cached() or build()


def torch_has_gpu() -> bool:
    """Whether this torch is one for CUDA or ROCm."""
    return bool(torch.version.cuda or torch.version.hip)


def need_gpu_compiler() -> None:
    """NoKernels unless the compiler for the GPUs of this torch is here."""
    from torch.utils.cpp_extension import CUDA_HOME, ROCM_HOME  # slow to import

    if os.environ.get("EXL3_NO_CUDA"):
        raise NoKernels("EXL3_NO_CUDA is set; unset it")
    if torch.version.hip:
        if ROCM_HOME is None:
            raise NoKernels("ROCm's toolkit is missing; install it or name its folder in ROCM_HOME")
    elif CUDA_HOME is None or shutil.which("nvcc", path=os.path.join(CUDA_HOME, "bin")) is None:
        raise NoKernels(
            f"nvcc, which builds them, is missing; install the CUDA toolkit {torch.version.cuda}, "
            "or name its folder in CUDA_HOME"
        )
    elif not any(next(Path(CUDA_HOME).glob(f"{at}/cuda_runtime.h"), None) for at in HEADERS):
        raise NoKernels(
            f"there is an nvcc in {CUDA_HOME}, but not CUDA's headers; name the toolkit's folder "
            "in CUDA_HOME"
        )


def chips() -> str:
    """The GPUs that are compiled for: TORCH_CUDA_ARCH_LIST, else those that are here."""
    named = os.environ.get("TORCH_CUDA_ARCH_LIST")
    seen = {torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())}
    return named or ";".join(f"{a}.{b}" for a, b in sorted(seen)) or DEFAULT_CHIPS


def sources(csrc: Path, gpu: bool = False) -> list[Path]:
    """What is compiled; the rest of the folder is included by it."""
    return [path for path in _files(csrc, gpu) if path.suffix in (".cpp", ".cu")]


def _files(csrc: Path, gpu: bool) -> list[Path]:
    """What the extension is made of; what hipify leaves there is none of it."""
    left_out = {"hip"} if gpu else {"hip", "cuda"}

    def part(path: Path) -> str:
        return path.relative_to(csrc).parts[0].removeprefix("bind_").removesuffix(".cpp")

    files = (p for p in csrc.rglob("*") if p.suffix in (".cpp", ".hpp", ".cu", ".cuh"))
    return sorted(path for path in files if part(path) not in left_out)


def fingerprint(csrc: Path, gpu: bool = False) -> str:
    """What a built extension must fit, as a hash: sources, flags, torch, Python, platform."""
    where = (str(torch.__version__), sys.implementation.cache_tag, sysconfig.get_platform())
    build = (FLAGS, LINK_FLAGS, *where)
    digest = hashlib.sha256(repr((*build, GPU_FLAGS) if gpu else build).encode())
    for path in _files(csrc, gpu):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(csrc).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:16]


def installed(gpu: bool = False) -> Path | None:
    """The extension that setup.py built, if these are its sources and this is its torch.

    One with kernels for the GPU serves always, one without where gpu is False.
    """
    library, built_from = PACKAGE / LIBRARY, PACKAGE / FINGERPRINT
    if not (library.is_file() and built_from.is_file()):
        return None
    fitting = [fingerprint(CSRC, kind) for kind in ((True,) if gpu else (False, True))]
    return library if built_from.read_text().strip() in fitting else None


def cached(gpu: bool = False) -> Path | None:
    """What an earlier `build` left, if anything."""
    name = _cache_name(gpu)
    return next((f / name for f in _cache_folders() if (f / name).is_file()), None)


def build(gpu: bool = False) -> Path:
    """Compiles the extension into the cache; gpu: with the GPU's kernels.

    Each process builds in a folder of its own and renames the result: what has its final name is
    whole, and processes that come first at the same time do not disturb each other.
    """
    if os.environ.get("EXL3_NO_BUILD"):
        raise NoKernels("EXL3_NO_BUILD is set and nothing that fits is built yet; unset it")
    if gpu:
        need_gpu_compiler()
    name, cache = _cache_name(gpu), _writable_cache()
    why = f"there are none yet for torch {torch.__version__}"
    if (PACKAGE / LIBRARY).is_file():
        why = "those installed are of other sources or another torch"
    kernels, minutes = ("C++ and GPU", "some minutes") if gpu else ("C++", "about a minute")
    _say(f"Building exl3's {kernels} kernels, once, {minutes} ({why}) ...")
    with tempfile.TemporaryDirectory(dir=cache, prefix="building-") as folder:
        built = _compile(Path(folder), gpu)
        if _cache_name(gpu) != name:
            raise NoKernels("their sources changed while they were built; try again")
        with open(built, "rb+") as file:
            os.fsync(file.fileno())
        if not (cache / name).is_file():
            os.replace(built, cache / name)
    return cache / name


def compiler() -> str:
    """Command, place and version of the C++ compiler that torch uses here."""
    command = shlex.split(os.environ.get("CXX", ""), posix=not WINDOWS)
    command = command or ["cl" if WINDOWS else "c++"]
    path = shutil.which(command[0])
    if path is None:
        raise NoKernels(
            f"there is no C++ compiler ({command[0]}); install one (Debian, Ubuntu: apt install "
            "g++; macOS: xcode-select --install) or name yours in CXX"
        )
    # cl says its version on stderr, and fails for want of a source.
    done = subprocess.run([path, *command[1:], "--version"], capture_output=True, errors="replace")
    return f"{command} {path} {(done.stdout or done.stderr).partition(chr(10))[0]}"


def _cache_name(gpu: bool) -> str:
    by = f"{compiler()} {chips()}" if gpu else compiler()
    compiled_by = hashlib.sha256(by.encode()).hexdigest()[:8]
    return f"{fingerprint(CSRC, gpu)}-{compiled_by}{Path(LIBRARY).suffix}"


def _cache_folders() -> Iterator[Path]:
    """Where builds are kept, best first."""
    named, base = os.environ.get("EXL3_CACHE"), os.environ.get("XDG_CACHE_HOME")
    if named:
        yield Path(named).expanduser()
    else:
        yield Path(base or os.path.expanduser("~/.cache")) / "exl3"
    # Anyone may write to the temporary folder: a folder that someone else made is not ours to load
    # from. (Windows has one for each user, and no user ids.)
    user = getattr(os, "getuid", lambda: 0)()
    folder = Path(tempfile.gettempdir()) / f"exl3-{user}"
    if not os.path.lexists(folder) or folder.lstat().st_uid == user:
        yield folder


def _writable_cache() -> Path:
    for folder in _cache_folders():
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError:
            continue
    raise NoKernels("no folder to build them in is writable; name one in EXL3_CACHE")


def _compile(folder: Path, gpu: bool) -> Path:
    """Compiles all sources in a folder. Returns the library, which has been loaded once."""
    csrc = CSRC
    if torch.version.hip and gpu:  # hipify writes beside its sources
        csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    arguments = {
        "name": Path(LIBRARY).stem,
        "sources": [str(path) for path in sources(csrc, gpu)],
        "extra_include_paths": [str(csrc)],
        "extra_cflags": FLAGS,
        "extra_cuda_cflags": GPU_FLAGS,
        "extra_ldflags": LINK_FLAGS,
        "build_directory": str(folder),
        "is_python_module": False,
    }
    # Ninja stands beside Python in an environment that is used without being activated.
    path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", "")
    if shutil.which("ninja", path=path) is None:
        raise NoKernels("ninja, which builds them, is missing; try: pip install ninja")
    done = subprocess.run(
        [sys.executable, "-c", BUILDER, json.dumps(arguments)],
        env=os.environ | {"PATH": path},
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode or not (folder / LIBRARY).is_file():
        raise NoKernels("building them failed; EXL3_VERBOSE=1 shows why", done.stdout + done.stderr)
    return folder / LIBRARY


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
