"""Small pieces of Python text, made from checked values only."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

from tokenmix.compiler.emit.formulas import is_symbolic

__all__ = ["WIDTH", "broken", "docstring", "literal", "paragraphs", "quoted", "range_text", "text_of"]

WIDTH = 120  # columns of the emitted source


def literal(value: Any) -> str:
    """A checked constant as Python source: numbers, booleans, words and lists of them. Nothing else gets through."""
    if isinstance(value, tuple):
        return "[" + ", ".join(literal(v) for v in value) + "]"
    if isinstance(value, Fraction):
        value = float(value)
    if isinstance(value, bool | int | str):
        return repr(value)
    if isinstance(value, float):
        return repr(float(value))
    raise TypeError(f"no literal for {value!r}")


def docstring(lines: Sequence[str], indent: str) -> list[str]:
    """Lines of a docstring; what could end it early is escaped."""
    clean = [
        part
        for line in lines
        for part in textwrap.wrap(line, WIDTH - len(indent), subsequent_indent=line[: len(line) - len(line.lstrip())])
        or [""]
    ]
    clean = [line.replace("\\", "\\\\").replace('"""', '\\"\\"\\"') for line in clean]
    if len(clean[0]) > WIDTH - len(indent) - 3:
        clean[:1] = textwrap.wrap(clean[0], WIDTH - len(indent) - 3)
    if len(clean) == 1 and len(clean[0]) < WIDTH - len(indent) - 6 and not clean[0].endswith('"'):
        return [f'{indent}"""{clean[0]}"""']
    return [f'{indent}"""{clean[0]}', *[f"{indent}{line}".rstrip() for line in clean[1:]], f'{indent}"""']


def paragraphs(doc: Sequence[str]) -> list[str]:
    """A block's doc comment as lines of a docstring: its first sentence, the rest, its source."""
    rest: list[str] = []
    source: list[str] = []
    for line in doc:
        (source if source or line.startswith("Source:") else rest).append(line)
    lines: list[str] = []
    summary, _, more = " ".join(rest).partition(". ")
    for text in (summary + ("." if more else ""), more, " ".join(source)):
        if text:
            lines += ["", text] if lines else [text]
    return lines


def text_of(value: Any) -> str:
    """A hyperparameter as source: a formula in the caller's names, or a constant."""
    if isinstance(value, tuple) and is_symbolic(value):
        return "[" + ", ".join(text_of(v) for v in value) + "]"
    return str(value) if is_symbolic(value) else literal(value)


def range_text(start: Any, stop: Any) -> str:
    return f"range({stop})" if start == 0 else f"range({start}, {stop})"


def broken(line: str) -> list[str]:
    """A line, or where it is too long and ends with a call, that call with its arguments on lines of their own.

    A comma may follow the call.
    """
    line, comma = (line[:-1], ",") if line.endswith("),") else (line, "")
    if len(line + comma) <= WIDTH or not line.endswith(")"):
        return [line + comma]
    commas: list[int] = []
    depth, start = 0, len(line) - 1
    while start >= 0:
        depth += (line[start] in ")]") - (line[start] in "([")
        if depth == 0:
            break
        if depth == 1 and line[start : start + 2] == ", ":
            commas.insert(0, start)
        start -= 1
    indent = line[: len(line) - len(line.lstrip())]
    inner = f"{indent}    {line[start + 1 : -1]}"
    if len(inner) <= WIDTH:
        return [line[: start + 1], inner, f"{indent}){comma}"]
    cuts = [start - 1, *commas, len(line) - 1]
    parts = [line[a + 2 : b] for a, b in pairwise(cuts)]
    return [line[: start + 1], *[f"{indent}    {part}," for part in parts], f"{indent}){comma}"]


def quoted(message: str) -> str:
    """A message as a Python string in double quotes."""
    return json.dumps(message, ensure_ascii=False)
