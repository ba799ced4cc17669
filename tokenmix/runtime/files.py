"""Writing files: the whole file or nothing, and none that tokenmix did not write."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenmix.dsl.diagnostics import Finding

__all__ = ["refusal", "replacing", "write_whole"]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """An empty file beside `path` to be written; it takes the place of `path` unless something is raised.

    A file that is replaced leaves its permissions to the new one, others get those of the umask. A link stays a link.
    """
    path = Path(os.path.realpath(path))
    beside = path.with_name(f".{path.name[:100]}.{secrets.token_hex(8)}")
    os.close(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        if path.exists():
            shutil.copymode(path, beside)
        mode = stat.S_IMODE(beside.stat().st_mode)
        yield beside
        beside.chmod(mode)  # who wrote it may have put a file of its own there, as safetensors does
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


def refusal(path: Path, ours: Callable[[Path], bool], otherwise: str) -> Finding | None:
    """Why a file cannot be written, or None.

    Args:
        ours: whether a file may be replaced.
        otherwise: what else to do about a file that may not.
    """
    from tokenmix.dsl.diagnostics import Finding
    from tokenmix.dsl.source import Source

    target = Path(os.path.realpath(path))
    needed = [target, target.parent] if target.exists() else [target.parent]  # the new file lies beside the old one
    message, help = "", "name another file with -o FILE"
    if path.is_dir():
        message, help = f"{path} is a folder", "name a file with -o FILE"
    elif not target.parent.is_dir():
        folder = target.parent if path.is_symlink() else path.parent
        message, help = f"there is no folder {folder}", f"make it first, or {help}"
    elif path.exists() and not path.is_file():
        message = f"{path} is not a regular file"
    elif path.exists() and not ours(path):
        message, help = f"{path} exists and was not written by tokenmix", f"{help}, or {otherwise}"
    elif not all(os.access(place, os.W_OK) for place in needed):
        message = f"{path} cannot be written"
    return Finding("TM1701", message, Source(str(path), "").span(0, 0), help=help) if message else None
