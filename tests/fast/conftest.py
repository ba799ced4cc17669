"""The C++ kernels, built once for the whole run, wherever there is a compiler."""

import ctypes
import os
import shutil
from pathlib import Path

import pytest

from tokenmix.fast import native


@pytest.fixture(scope="session")
def kernels_home(tmp_path_factory) -> Path:
    """A cache folder that holds the C++ kernels, for the variable XDG_CACHE_HOME of other processes."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    home = tmp_path_factory.mktemp("cache")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(home)
    try:
        native.build_library()
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.__setitem__("XDG_CACHE_HOME", before)
    return home


@pytest.fixture(scope="session")
def compiled(kernels_home):
    """The C++ kernels, compiled for this run."""
    (path,) = (kernels_home / "tokenmix").glob("*.so")
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="session")
def device():
    """Where Triton's kernels run: on the CPU by its interpreter (see the conftest above), else compiled on a GPU."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "cpu"
    import torch

    if not torch.cuda.is_available():
        pytest.skip("Triton compiles here, and there is no GPU")
    return "cuda"
