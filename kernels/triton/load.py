"""From Triton text to an imported module: written once per text to the cache of generated code.

Triton reads the source of a kernel back from its file, so the text has to lie in one.
"""

import hashlib
import importlib.util
import tempfile
from functools import cache
from pathlib import Path
from types import ModuleType

from mhc_compile.errors import KernelError
from mhc_compile.kernels.cpp.build import cache_directory


@cache
def load(source: str) -> ModuleType:
    """The module of ``source``.

    Raises:
        KernelError: it cannot be written, or Triton is not installed.
    """
    path = cache_directory() / f"mhc_{hashlib.sha256(source.encode()).hexdigest()[:32]}.py"
    try:
        if not path.exists():
            _write(path, source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except OSError as error:
        raise KernelError(
            f"the generated Triton cannot be kept in {path.parent}: {error}; set "
            "MHC_COMPILE_CACHE to a directory of your own"
        ) from error
    except ImportError as error:
        raise KernelError(f"the generated Triton cannot be imported: {error}") from error
    return module


def _write(path: Path, source: str) -> None:
    # Renamed into place: several processes may write the same text, none reads half of it.
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        text = Path(name) / path.name
        text.write_text(source)
        text.replace(path)
