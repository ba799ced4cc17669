"""Reading spec and block files: every way in which that fails is a finding."""

from __future__ import annotations

from pathlib import Path

from tokenmix.dsl.diagnostics import Finding
from tokenmix.dsl.limits import MAX_FILE_BYTES
from tokenmix.dsl.source import Source

__all__ = ["read_text"]


def read_text(path: Path | str, findings: list[Finding]) -> Source | None:
    """The file as a source, or None with the reason added to `findings`."""
    path = Path(path)

    def refuse(id: str, message: str, help: str = "") -> None:
        findings.append(Finding(id, message, Source(str(path), "").span(0, 0), help=help))

    try:
        if not path.is_file():
            refuse("TM1001", f"{path} is a folder" if path.is_dir() else f"there is no file {path}")
            return None
        if path.stat().st_size > MAX_FILE_BYTES:
            megabytes = path.stat().st_size / 1e6
            refuse("TM1004", f"{path} has {megabytes:.1f} MB; a spec or block file has at most {MAX_FILE_BYTES / 1e6:g} MB")
            return None
        data = path.read_bytes()
    except OSError as error:
        refuse("TM1001", f"{path} cannot be read: {error.strerror or error}")
        return None
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse("TM1002", f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}")
        return None
    control = next((c for c in text if ord(c) < 32 and c not in "\t\n\r"), None)
    if control is not None:
        refuse("TM1002", f"{path} is not text: it holds the control character 0x{ord(control):02x}")
        return None
    if not text.strip():
        refuse("TM1003", f"{path} is empty", help="a spec begins with `tokenmix: 1` and `name: ...`")
        return None
    return Source(str(path), text.replace("\r\n", "\n"))
