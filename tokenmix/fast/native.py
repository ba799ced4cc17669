"""C++ kernels for the CPU: compiled on request, cached per user, loaded without a compiler.

`tokenmix doctor --build-kernels` compiles; everything else only looks whether a library for exactly these sources and
this processor is there. Nothing is compiled behind a user's back, and nothing needs a compiler to work.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

__all__ = ["BuildError", "build_library", "library", "library_path", "missing"]

_SOURCES = sorted(Path(__file__).parent.glob("*.cpp"))
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-std=c++17", "-fPIC", "-shared", "-fopenmp"]


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled; the message holds the compiler's words."""


def library_path() -> Path:
    """Where the compiled kernels lie: named after the sources, the flags and the processor, so none can be stale."""
    digest = hashlib.sha256()
    for source in _SOURCES:
        digest.update(source.read_bytes())
    digest.update(" ".join([*_FLAGS, platform.machine(), _processor()]).encode())
    root = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(root).expanduser() / "tokenmix" / f"kernels-{digest.hexdigest()[:16]}.so"


@cache
def _processor() -> str:
    """The processor's instruction sets: a home directory may be shared by unlike machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def build_library() -> Path:
    """Compile the kernels into the cache.

    Raises:
        BuildError: if there is no compiler or it fails.
    """
    compiler = os.environ.get("CXX") or next((c for c in ("g++", "clang++") if shutil.which(c)), None)
    if compiler is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or name one in the variable CXX")
    path = library_path()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(suffix=".so", dir=path.parent)
    os.close(handle)
    try:
        done = subprocess.run(
            [*compiler.split(), *_FLAGS, *map(str, _SOURCES), "-o", name], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise BuildError(f"{compiler} failed:\n{done.stderr.strip()[-2000:]}")
        os.replace(name, path)  # whole or not at all, also with several processes
    except OSError as error:
        raise BuildError(f"{compiler} could not be run: {error}") from None
    finally:
        Path(name).unlink(missing_ok=True)
    library.cache_clear()
    return path


@cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None where they were not built (see `missing`)."""
    if os.environ.get("TOKENMIX_NATIVE", "1") == "0":
        return None
    path = library_path()
    try:
        # What another user could have put there is not run.
        if path.stat().st_uid != os.getuid():
            return None
        return ctypes.CDLL(str(path))
    except (OSError, AttributeError):
        return None


def missing() -> str:
    """Why `library` has nothing to give."""
    if os.environ.get("TOKENMIX_NATIVE", "1") == "0":
        return "switched off by TOKENMIX_NATIVE=0"
    if not library_path().exists():
        return "not built: tokenmix doctor --build-kernels"
    return f"{library_path()} cannot be loaded, or belongs to another user"
