"""Reading spec and block files: every way in which that fails is a finding."""

from __future__ import annotations

import re
from pathlib import Path

from tokenmix.dsl.diagnostics import Finding, nearest
from tokenmix.dsl.limits import MAX_FILE_BYTES
from tokenmix.dsl.source import Source

__all__ = ["read_text"]

# Control characters, line breaks that only some programs know, marks that change the order of what is shown, and (as
# surrogates) bytes that are not UTF-8.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff\ufffe\uffff]"
)


def read_text(path: Path | str, findings: list[Finding]) -> Source | None:
    """The file as a source, or None with the reason added to `findings`."""
    path = Path(path)

    def refuse(id: str, message: str, help: str = "", shown: str = "", offset: int = 0) -> None:
        findings.append(Finding(id, message, Source(str(path), shown).span(offset, offset + 1), help=help))

    try:
        if not path.is_file():
            refuse("TM1001", *_not_a_file(path))
            return None
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            size = path.stat().st_size / 1e6
            refuse("TM1004", f"{path} has {size:.1f} MB; a spec or block file has at most {MAX_FILE_BYTES / 1e6:g} MB")
            return None
    except (OSError, ValueError) as error:  # ValueError: the path holds a null byte
        refuse("TM1001", f"{path} cannot be read: {getattr(error, 'strerror', None) or error}")
        return None
    text = data.decode("utf-8-sig", errors="surrogateescape")
    bad = _UNSEEN.search(text)
    if bad is not None:
        character, binary = bad.group(), "\0" in text
        undecoded = "\udc80" <= character <= "\udcff"
        if undecoded:
            message = f"{path} is not UTF-8 text: it holds the byte 0x{ord(character) - 0xDC00:02x}"
            help = f"save the file as UTF-8; in Latin-1 the byte would be `{chr(ord(character) - 0xDC00)}`"
        else:
            message = f"{path} holds the character U+{ord(character):04X}, which no spec needs and no editor shows"
            help = "take it out"
        if binary:
            help = "this looks like a binary file; a spec is a text"
        shown = re.sub("[\ud800-\udfff]", lambda m: chr(ord(m.group()) - 0xDC00), text)
        refuse("TM1002", message, help, re.sub(r"[^\n]", " ", text) if binary else shown, bad.start())
        return None
    if not text.strip():
        begins = "`block name(x):`" if path.suffix == ".mix" else "`tokenmix: 1` and `name: ...`"
        refuse(
            "TM1003", f"{path} is empty", f"a {'block file' if path.suffix == '.mix' else 'spec'} begins with {begins}"
        )
        return None
    return Source(str(path), text.replace("\r\n", "\n").replace("\r", "\n"))


def _not_a_file(path: Path) -> tuple[str, str]:
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.yaml"))
        return f"{path} is a folder", f"name a file in it, such as {path / inside[0]}" if inside else ""
    if path.exists():
        return f"{path} is not a regular file", ""
    near = nearest(path.name, sorted(p.name for p in path.parent.glob(f"*{path.suffix}"))) if path.suffix else []
    return f"there is no file {path}", f"did you mean `{path.with_name(near[0])}`?" if near else ""
