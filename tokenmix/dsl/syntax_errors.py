"""What is wrong with a text that the grammar refuses, in words: the mistakes that people make, told by example."""

from __future__ import annotations

import re

from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken
from lark.indenter import DedentError

from tokenmix.dsl.diagnostics import Mistake, Note
from tokenmix.dsl.source import Source, Span

__all__ = ["syntax_error"]

# What the grammar's terminals are called in a message.
_WORDS = {
    "NAME": "a name",
    "STRING": "a quoted text",
    "_NEWLINE": "the end of the line",
    "_INDENT": "an indented line",
    "_DEDENT": "a line indented less",
    "$END": "the end of the text",
    "LPAR": "`(`",
    "RPAR": "`)`",
    "LSQB": "`[`",
    "RSQB": "`]`",
    "COLON": "`:`",
    "COMMA": "`,`",
    "SEMICOLON": "`;`",
    "EQUAL": "`=`",
    "_DOTS": "`..`",
    "_PIPE": "`|>`",
    "IN": "`in`",
}

# Signs that look like signs of the language, or do their work elsewhere.
_SIGNS = {
    "'": 'texts are written in double quotes: "..."',
    "\u2018": 'texts are written in double quotes: "..."',
    "\u2019": 'texts are written in double quotes: "..."',
    "\u201c": 'texts are written in plain double quotes: "..."',
    "\u201d": 'texts are written in plain double quotes: "..."',
    "^": "powers are written `**`",
    "\\": "a long pipe may go on in the next line: begin that line with `|>`",
    "&": "write `and`",
    "!": "write `not`",
    "|": "a pipe is written `|>`",
    "?": "write `a if condition else b`",
    "@": "a matrix product is an op: call it by its name",
    "{": "there are no braces in block files; lists stand in [...]",
    "}": "there are no braces in block files; lists stand in [...]",
    "\u2013": "write the minus sign `-`",
    "\u2014": "write the minus sign `-`",
    "\u2212": "write the minus sign `-`",
    "\u00d7": "write `*`",
    "\u00b7": "write `*`",
    "\u00f7": "write `/`",
    "\u2264": "write `<=`",
    "\u2265": "write `>=`",
    "\u2260": "write `!=`",
    "\u2192": "a pipe is written `|>`",
    "\u00a0": "this is a no-break space; write a plain blank",
}


def syntax_error(source: Source, text: str, offset: int, error: UnexpectedInput | DedentError) -> Mistake:
    """The finding for a text that lark has refused.

    Args:
        source: the whole text.
        text: the part that was parsed.
        offset: where that part begins.
        error: lark's complaint.
    """
    return _Explainer(source, text, offset).explain(error)


class _Explainer:
    def __init__(self, source: Source, text: str, offset: int):
        self.source = source
        self.text = text
        self.offset = offset

    def span(self, start: int, end: int) -> Span:
        return self.source.span(self.offset + start, self.offset + end)

    def mistake(self, message: str, start: int, end: int, help: str = "", notes: tuple[Note, ...] = ()) -> Mistake:
        return Mistake("TM1106", message, self.span(start, end), help=help, notes=notes)

    def explain(self, error: UnexpectedInput | DedentError) -> Mistake:
        if isinstance(error, DedentError):
            return self._dedent()
        if isinstance(error, UnexpectedCharacters):
            start = min(error.pos_in_stream or 0, len(self.text) - 1)
            return self._by_line(start, "") or self._character(start)
        assert isinstance(error, UnexpectedToken)
        token = error.token
        start = token.start_pos if token.start_pos is not None else len(self.text.rstrip())
        if token.type == "_INDENT":
            first = min(token.end_pos or start, len(self.text) - 1)
            return self.mistake(
                "the line is indented", first, self._word_end(first),
                "only the lines below block, for, if, elif and else are indented; a pipe goes on with `|>`",
            )  # fmt: skip
        return self._token(token.type, str(token), start, set(error.accepts or error.expected))

    def _line(self, at: int) -> tuple[int, str]:
        start = self.text.rfind("\n", 0, at) + 1
        return start, self.text[start:].split("\n", 1)[0]

    # Characters that begin no token

    def _character(self, start: int) -> Mistake:
        character = self.text[start]
        if character == '"':
            line = self.text[start:].split("\n", 1)[0]
            if "\\" in line and '"' in line[1:]:
                at = start + line.index("\\")
                return self.mistake("a quoted text holds no backslash", at, at + 1, "write it without")
            return self.mistake("the quoted text is not closed on this line", start, start + 1, 'close it with `"`')
        number = re.compile(r"\d[\d_]*\.(?!\.)|\.\d+").match(self.text, start)
        if number:
            digits = number.group().strip(".")
            right = f"{digits}.0" if number.group().endswith(".") else f"0.{digits}"
            return self.mistake(f"`{number.group()}` is no number", start, number.end(), f"write `{right}`")
        word = re.compile(r"[^\W\d]\w*").search(self.text, self._word_start(start))
        if word and word.start() <= start < word.end() and not character.isascii():
            return self.mistake(
                f"`{word.group()}` cannot be a name",
                word.start(),
                word.end(),
                "names are made of a-z, A-Z, 0-9 and `_`",
            )
        return self.mistake(f"`{character}` cannot stand here", start, start + 1, _SIGNS.get(character, ""))

    def _word_start(self, at: int) -> int:
        while at > 0 and (self.text[at - 1].isalnum() or self.text[at - 1] == "_"):
            at -= 1
        return at

    # Tokens in the wrong place

    def _token(self, type_: str, word: str, start: int, expected: set[str]) -> Mistake:
        if type_ in ("$END", "_NEWLINE", "_DEDENT"):
            return self._end(type_, start, expected)
        known = self._bracket(start, word) or self._by_line(start, word)
        if known:
            return known
        return self.mistake(
            f"`{word}` cannot stand here" + _expectation(expected),
            start,
            start + len(word),
            self._help(type_, start, expected),
        )

    def _word_end(self, start: int) -> int:
        word = re.compile(r"\w+|\S").match(self.text, start)
        return word.end() if word else start + 1

    def _end(self, type_: str, start: int, expected: set[str]) -> Mistake:
        end = len(self.text[:start].rstrip())
        opened = self._open_brackets(end)
        if opened:
            return self.mistake("the bracket is never closed", opened[-1], opened[-1] + 1)
        line_start, line = self._line(max(0, end - 1))
        begin = line_start + len(line) - len(line.lstrip())
        if "_INDENT" in expected:
            what = " ".join(re.findall(r"\w+", line)[: 2 if line.startswith("block") else 1])
            return self.mistake(
                f"`{what}` has no lines below it", begin, begin + len(what), "its body stands below, indented"
            )
        if re.match(r"\s*return\s*$", line):
            return self.mistake("`return` hands back a value", begin, begin + 6, "name it: `return x`")
        help = ""
        if "COLON" in expected and re.match(r"\s*(block|if|elif|else|for)\b", line):
            help = "a line that begins with block, for, if, elif or else ends with `:`"
        elif line.rstrip().endswith("|>"):
            help = "behind `|>` stands an op or block"
        elif re.match(r"\s*module\b", line):
            help = "a module is an op or block with its hyperparameters: `module pe = dwconv(3)`"
        found = "the line ends here" if type_ == "_NEWLINE" else "the text ends here"
        return self.mistake(found + _expectation(expected), max(0, end - 1), end, help)

    def _open_brackets(self, end: int) -> list[int]:
        """Places of the brackets that are open at `end`."""
        opened: list[int] = []
        for match in re.finditer(r'"[^"\n]*"|#[^\n]*|[\[(]|[\])]', self.text[:end]):
            if match.group() in "([":
                opened.append(match.start())
            elif match.group() in ")]" and opened:
                opened.pop()
        return opened

    def _bracket(self, start: int, word: str) -> Mistake | None:
        opened = self._open_brackets(start)
        if word in (")", "]"):
            if not opened:
                return self.mistake(f"`{word}` cannot stand here: no bracket is open", start, start + 1)
            sign = self.text[opened[-1]]
            if (sign == "(") != (word == ")"):
                return self.mistake(
                    f"`{word}` does not close `{sign}`", start, start + 1,
                    notes=(Note("opened", self.span(opened[-1], opened[-1] + 1)),),
                )  # fmt: skip
            return None
        line_start, line = self._line(start)
        if opened and opened[-1] < line_start and not line[: start - line_start].strip():
            return self.mistake("the bracket is never closed", opened[-1], opened[-1] + 1)
        return None

    def _by_line(self, start: int, word: str) -> Mistake | None:
        """Mistakes that show in the line as a whole."""
        line_start, line = self._line(start)
        begin = line_start + len(line) - len(line.lstrip())
        words = line.split()
        first = re.match(r"\w*", line.lstrip()).group()  # type: ignore[union-attr]
        before, behind = self.text[begin:start].rstrip(), self.text[start : line_start + len(line)]

        def at_first(message: str, help: str) -> Mistake:
            return self.mistake(message, begin, begin + len(first), help)

        if first in ("import", "from") and len(words) > 1 and words[1].isidentifier():
            return at_first(
                "nothing is imported", "blocks of this folder, of tokenmix, and all ops are known by their names"
            )
        if first in ("def", "class"):
            return at_first(f"`{first}` defines nothing here", "write `block name(tensors; hyperparameters):`")
        if first == "while":
            return at_first("there is no `while`", "a loop has a fixed number of rounds: `for j in 0..4:`")
        if first in ("else", "elif") and start <= begin + len(line.lstrip()):
            return at_first(f"`{first}` has no `if` above it in the same column", "")
        if first == "for" and re.match(r"for\s+\w+\s+in\b", line.lstrip()) and ".." not in line:
            at = begin + re.match(r"for\s+\w+\s+in\s*", line.lstrip()).end()  # type: ignore[union-attr]
            end = max(at + 1, line_start + len(line.rstrip().removesuffix(":")))
            return self.mistake("a loop runs over a range", at, end, "write `0..n` for 0, 1, ... n - 1")
        if first == "for" and "..." in line:
            at = line_start + line.index("...")
            return self.mistake("a range has two dots", at, at + 3, "write `0..n` for 0, 1, ... n - 1")
        if re.match(r"(for|if|else|elif|in|return|require|module|block|not|and|or|true|false)\s*=(?!=)", line.lstrip()):
            return at_first(f"`{first}` cannot be used as a name: it is reserved", "choose another name")
        if (
            not line[:1].isspace()
            and first != "block"
            and not first.isdigit()
            and line_start == begin
            and "block" in self._starts
        ):
            return at_first(
                f"`{first or words[0]}` stands outside of any block",
                "a file holds blocks, `block name(x):`, whose lines are indented",
            )
        if re.match(r"(\+|-|\*\*?|//?|%)=", behind) or (behind[:1] == "=" and before[-1:] in tuple("+-*/%") and before):
            sign = re.match(r"\W*", behind).group().strip("= ") or before[-1]  # type: ignore[union-attr]
            name = re.match(r"\w*", line.lstrip()).group()  # type: ignore[union-attr]
            return self.mistake(
                f"there is no `{sign}=`", start, start + len(sign) + 1, f"write `{name} = {name} {sign} ...`"
            )
        if word == "=" and first in ("if", "elif", "require"):
            return self.mistake("`=` does not compare", start, start + 1, "write `==`")
        if word == ">" and before.endswith("-"):
            return self.mistake("`->` is not an operator", start - 1, start + 1, "a pipe is written `|>`")
        return None

    @property
    def _starts(self) -> set[str]:
        return {"block"} if re.search(r"^block\b", self.text, re.M) or "\n" in self.text else set()

    def _help(self, type_: str, start: int, expected: set[str]) -> str:
        line_start, line = self._line(start)
        before, behind = self.text[line_start:start], self.text[start:]
        keyword = re.search(r"(\w+)\s*:\s*$", before)
        if keyword and expected <= {"NAME"}:
            return f"a hyperparameter is given as `{keyword[1]} = ...`; `name: op(...)` labels a submodule"
        if self.text[start] in _SIGNS:
            return _SIGNS[self.text[start]]
        if type_ == "EQUAL" and "NAME" not in expected:
            return "write `==` to compare; `=` stands only behind a name"
        if type_ == "_PIPE":
            return "a pipe cannot stand in a condition or calculation; name its result on a line of its own first"
        if type_ == "COMPARE" and re.search(r"(==|!=|<=?|>=?)", before):
            return "compare two values at a time: `0 < a and a < 3`"
        if type_ == "SEMICOLON":
            return (
                "lines end without `;`"
                if not behind[1:].split("\n")[0].strip()
                else "one `;` parts tensors from numbers"
            )
        if type_ in ("RPAR", "RSQB") and before.rstrip().endswith(","):
            return "there is a `,` too many"
        if type_ in ("LPAR", "DOT", "NAME") and re.search(r"\w\.\w+\.?$", before):
            return "a dot only asks for a dimension, `x.C`; ops and blocks are called by their name alone"
        if type_ == "DOT" and re.match(r"\.\d", behind):
            return f"write `0{re.match(r'[.]?[0-9]*', behind).group()}`"  # type: ignore[union-attr]
        if type_ == "DOT" and re.search(r"\w\.\w+$", before):
            return "a dot only asks for a dimension, `x.C`"
        if type_ == "NAME" and re.search(r"\d$", before):
            return "names begin with a letter; a product is written `3 * a`"
        if "COLON" in expected and re.match(r"\s*(block|if|elif|else|for)\b", line) and not line.rstrip().endswith(":"):
            return "a line that begins with block, for, if, elif or else ends with `:`"
        if expected == {"_NEWLINE"} and before.rstrip().endswith(":"):
            return "the body stands in the lines below, indented"
        if re.match(r"\s*block\s+\w+\s*$", before):
            return "a block takes at least one tensor: `block name(x):`"
        if re.match(r"\s*block\s*$", before):
            return "a block has a name: `block name(x):`"
        return ""

    # Indentation

    def _dedent(self) -> Mistake:
        levels = [0]
        position = 0
        for line in self.text.split("\n"):
            stripped = line.strip()
            if stripped and not stripped.startswith(("#", "|>")):
                width = len(line.expandtabs(4)) - len(line.expandtabs(4).lstrip())
                while levels[-1] > width:
                    levels.pop()
                if levels[-1] < width and position and not self.text[:position].rstrip().endswith(":"):
                    position += len(line) - len(line.lstrip())
                    break
                if levels[-1] < width:
                    levels.append(width)
            position += len(line) + 1
        position = min(position, max(0, len(self.text) - 1))
        return self.mistake(
            "the line is indented like no line above it", position, self._word_end(position),
            "lines of one body begin in the same column",
        )  # fmt: skip


def _expectation(expected: set[str]) -> str:
    if {"NAME", "INT"} <= expected:
        return ", expected a value"
    # What may always follow a value says nothing.
    words = sorted({_WORDS[t] for t in expected if t in _WORDS and t not in ("LPAR", "LSQB", "EQUAL")})
    words = words or sorted(_WORDS[t] for t in expected if t in _WORDS)
    if not words or len(words) > 3:
        return ""
    return ", expected " + (words[0] if len(words) == 1 else ", ".join(words[:-1]) + " or " + words[-1])
