"""Memory that a process keeps, and the pages that it is charged for. Each in a process of its own."""

import os
import platform
import subprocess
import sys

import pytest

import tokenmix
from tokenmix.runtime import memory

GLIBC = platform.libc_ver()[0] == "glibc"
needs_glibc = pytest.mark.skipif(not GLIBC, reason="another C library")

# A buffer of 64 MiB filled and freed again and again; how many pages the system had to supply in the last round.
FAULTS = """
import tokenmix
from tokenmix.runtime.memory import allocator, page_faults
{before}
for _ in range(4):
    start = page_faults()
    x = bytearray(b"a") * 2**26
    del x
    faults = page_faults() - start
print(faults, *allocator(), sep="|")
"""


def measured(before="", **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS.format(before=before)],
        env=clean | environment, capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    faults, name, remedy = done.stdout.strip().split("|")
    return int(faults), name, remedy


@needs_glibc
def test_memory_that_is_kept_costs_no_page_faults():
    faults, name, remedy = measured()
    if "glibc" not in name:
        pytest.skip("another allocator is preloaded")
    assert faults > 1000 and "hands freed memory back" in name and "tokenmix.keep_memory()" in remedy
    kept = measured("assert tokenmix.keep_memory() is True")
    assert kept[0] < 100 and kept[1:] == ("glibc, told to keep freed memory", "")


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [
        dict(word.split("=") for word in memory.ENVIRONMENT.split()),
        {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000000:glibc.malloc.trim_threshold=10000000000"},
    ],
)
def test_what_the_environment_says_is_seen(environment):
    faults, name, remedy = measured(**environment)
    if "glibc" in name:
        assert faults < 100 and name == "glibc, told to keep freed memory" and remedy == ""


def test_another_c_library_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory.platform, "libc_ver", lambda: ("", ""))
    assert tokenmix.keep_memory() is False
    assert memory.allocator()[1] == ""


def test_another_allocator_is_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_provider", lambda: "libjemalloc")
    assert tokenmix.keep_memory() is False
    assert memory.allocator() == ("libjemalloc", "")
