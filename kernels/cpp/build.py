"""From C++ text to a loaded library: compiled once per text, compiler, flags and processor.

Libraries lie in ``$MHC_COMPILE_CACHE`` or ``~/.cache/mhc_compile`` (``$XDG_CACHE_HOME`` counts).
Each is compiled in a directory of its own and renamed into place, so that any number of processes
may build the same one at once, and none ever loads half a file.
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from mhc_compile.errors import KernelError

_FLAGS = (
    "-std=c++17",
    "-O3",
    "-march=native",
    "-mtune=generic",  # with GCC 12's own tuning for Zen 4 a seam takes 8 % longer there
    "-fno-math-errno",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-Wno-psabi",  # vectors wider than the processor's are passed to inlined functions only
)


@cache  # without a lock, which a fork could inherit locked: to build twice at once does no harm
def load(source: str) -> ctypes.CDLL:
    """The library compiled from ``source``.

    Raises:
        KernelError: there is no compiler, or it refuses; the message holds what it printed.
    """
    try:
        return ctypes.CDLL(str(_built(source)))
    except OSError as error:
        raise KernelError(
            f"the generated C++ cannot be kept in {cache_directory()} or loaded from there: "
            f"{error}; set MHC_COMPILE_CACHE to a directory of your own"
        ) from error


def library_of(source: str) -> tuple[Path, tuple[str, ...]]:
    """The file of the library compiled from ``source``, and the compiler with its flags.

    Raises:
        KernelError: as `load`.
    """
    compiler = _compiler()
    return _built(source), (compiler, *_FLAGS, *_openmp(compiler).split())


def cache_directory() -> Path:
    """Where built libraries are kept."""
    if "MHC_COMPILE_CACHE" in os.environ:
        return Path(os.environ["MHC_COMPILE_CACHE"])
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "mhc_compile"


def _built(source: str) -> Path:
    compiler = _compiler()
    key = "\0".join((source, _version(compiler), *_FLAGS, _openmp(compiler), _processor()))
    library = cache_directory() / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.so"
    if not library.exists():
        library.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as name:
            # The source stays beside the library, to be read.
            text, built = Path(name) / "site.cpp", Path(name) / "site.so"
            text.write_text(source)
            _run(compiler, *_FLAGS, *_openmp(compiler).split(), str(text), "-o", str(built))
            text.replace(library.with_suffix(".cpp"))
            built.replace(library)
    return library


def _compiler() -> str:
    for name in (os.environ.get("CXX"), "g++", "clang++", "c++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    raise KernelError(
        "no C++ compiler was found: install g++ or clang++ (or set CXX), or use kernels='reference'"
    )


@cache
def _version(compiler: str) -> str:
    return f"{compiler} {_run(compiler, '--version')}"


@cache
def _openmp(compiler: str) -> str:
    """The flag for OpenMP, or nothing where the compiler comes without its library."""
    with tempfile.TemporaryDirectory() as name:
        text = Path(name) / "probe.cpp"
        text.write_text("#include <omp.h>\nint threads() { return omp_get_max_threads(); }\n")
        try:
            _run(compiler, "-fopenmp", "-fPIC", "-shared", str(text), "-o", f"{name}/probe.so")
        except KernelError:
            return ""
    return "-fopenmp"


@cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join(sorted({line for line in lines if line.startswith(kinds)}))


def _run(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise KernelError(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        raise KernelError(
            f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    return done.stdout
