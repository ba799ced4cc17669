"""Where names of blocks and ops are looked up.

A spec sees, nearest first: its own `definitions`, the `*.mix` files in its folder, the block files of tokenmix, and
the primitive ops. A nearer block hides a farther one of the same name everywhere in that spec, also inside shipped
blocks: that is how an ablation swaps a part.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from tokenmix.blocks.op import Op
from tokenmix.blocks.ops import find_op, op_names
from tokenmix.compiler.definition import Definition
from tokenmix.dsl.diagnostics import Finding, Note
from tokenmix.dsl.expressions import FUNCTIONS
from tokenmix.dsl.files import read_text
from tokenmix.dsl.parser import parse_blocks
from tokenmix.dsl.source import Source

__all__ = ["Library", "find_shipped", "shipped_blocks"]

_BLOCKS = Path(__file__).parent.parent / "blocks"
_HEAD = re.compile(r"^[ \t]*block[ \t]+(\w+)", re.M)


@cache
def shipped_blocks() -> dict[str, Path]:
    """Name -> file of every block definition that comes with tokenmix. Read from the heads; nothing is parsed."""
    found: dict[str, Path] = {}
    for path in sorted(_BLOCKS.glob("*.mix")):
        for name in _HEAD.findall(path.read_text()):
            if name in found:
                raise ValueError(f"block {name} stands in {found[name].name} and in {path.name}")
            found[name] = path
    return found


@cache
def _shipped(name: str) -> Definition:
    # Only the one block is parsed: its text is cut out at the next head or its doc comment.
    path = shipped_blocks()[name]
    source = Source(f"tokenmix/blocks/{path.name}", path.read_text())
    start = re.search(rf"^block[ \t]+{name}\b", source.text, re.M).start()  # type: ignore[union-attr]
    behind = re.compile(r"^(?=block\b|#)", re.M).search(source.text, start + 1)
    end = behind.start() if behind else len(source.text)
    blocks, findings = parse_blocks(source, start, end)
    if findings:
        raise ValueError(f"shipped block {name}: {findings[0].message}")
    return Definition(blocks[0], shipped=True)


def find_shipped(name: str) -> Definition | Op | None:
    """The block of that name that comes with tokenmix, or the op."""
    return _shipped(name) if name in shipped_blocks() else find_op(name)


class Library:
    """Blocks and ops as one spec sees them.

    Args:
        definitions: texts with block definitions, nearest first.
        folder: the spec's folder, whose `*.mix` files it may use; None for none.
    """

    def __init__(self, definitions: list[Source] | None = None, folder: Path | None = None):
        self.findings: list[Finding] = []
        self._own: dict[str, Definition] = {}
        self._hidden: dict[str, Definition] = {}
        self._unread: set[str] = set()
        self._incomplete = False
        for text in definitions or []:
            self._add(text)
        if folder is not None and folder.absolute() != _BLOCKS:
            for path in sorted(folder.glob("*.mix")):
                source = read_text(path, self.findings)
                if source is not None:
                    self._add(source)
                else:
                    self._incomplete = True

    def _add(self, source: Source) -> None:
        blocks, findings = parse_blocks(source)
        self.findings += findings
        here: dict[str, Definition] = {}
        for block in blocks:
            if block.name in FUNCTIONS:
                self.findings.append(
                    Finding(
                        "TM1211", f"`{block.name}` is a function on numbers, no block can be called so",
                        block.name_span, help="choose another name",
                    )
                )  # fmt: skip
            elif block.name in here:
                first = Note("first", here[block.name].block.name_span)
                self.findings.append(
                    Finding("TM1208", f"two blocks are called `{block.name}`", block.name_span, notes=(first,))
                )
            else:
                here[block.name] = Definition(block)
        for name, definition in here.items():
            if name in self._own:
                self._hidden.setdefault(name, definition)
            elif name not in self._unread:
                self._own[name] = definition
        if findings:
            self._unread |= set(_HEAD.findall(source.text)) - self._own.keys()
            self._incomplete |= not _HEAD.search(source.text)

    def find(self, name: str) -> Definition | Op | None:
        """The block or op of that name, or None."""
        if name in self._own:
            return self._own[name]
        if name in self._unread:
            return None
        return find_shipped(name)

    def hidden(self, name: str) -> Definition | Op | None:
        """What a block of the spec hides: the next one of that name, or None."""
        return self._hidden.get(name) or (find_shipped(name) if name in self._own else None)

    def may_hold(self, name: str) -> bool:
        """Whether a block that could not be read may have that name: then its absence is no finding of its own."""
        return name in self._unread or self._incomplete

    @property
    def plain(self) -> bool:
        """Whether it holds what comes with tokenmix and nothing else."""
        return not (self._own or self._unread or self._incomplete)

    def own(self) -> list[Definition]:
        """Blocks that do not come with tokenmix."""
        return list(self._own.values())

    def names(self) -> list[str]:
        """Everything that can be called."""
        return sorted({*self._own, *shipped_blocks(), *op_names()})
