"""The C++ kernels, built once for the whole run, wherever there is a compiler."""

import ctypes
import os
import shutil

import pytest

from tokenmix.fast import native


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The C++ kernels, compiled for this run."""
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("no C++ compiler")
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    try:
        path = native.build_library()
        return ctypes.CDLL(str(path))
    finally:
        os.environ.pop("XDG_CACHE_HOME") if before is None else os.environ.__setitem__("XDG_CACHE_HOME", before)
