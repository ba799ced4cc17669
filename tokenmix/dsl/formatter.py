"""Canonical text of block files and expressions.

The tree says what is printed, so two texts that mean the same look the same. Comments are no part of the tree: they are
found in the text and put back at the line, or the stage of a pipe, they were written at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import FindingsError
from tokenmix.dsl.layout import INDENT, LINE_WIDTH, Comment, Line, Piece, arrange, attach, comment_at, joined
from tokenmix.dsl.parser import parse_blocks
from tokenmix.dsl.source import Source

__all__ = ["format_blocks", "format_expression", "format_loop", "format_text"]


def format_text(source: Source, key_order: Sequence[str]) -> str:
    """Canonical text of a block file or a spec, told apart by the ending of the source's name.

    Args:
        source: the file; a name ending in `.mix` is a block file, every other one a spec.
        key_order: top-level keys of a spec in the order in which they are printed.

    Raises:
        FindingsError: if the text cannot be parsed.
    """
    if Path(source.name).suffix == ".mix":
        return format_blocks(source)
    from tokenmix.dsl.spec_formatter import format_spec  # builds on this module

    return format_spec(source, key_order)


def format_expression(expr: syntax.Expr, *, equals: str = " = ") -> str:
    """An expression in one line, with the brackets its tree needs and no others.

    Numbers and texts stay as they were written. `**` stands close between plain names and numbers.

    Args:
        expr: the tree; every literal without text holds a value that the language can write.
        equals: what joins a keyword and its value; specs write `name=value`.

    Example:
        >>> from tokenmix.dsl.parser import parse_expression
        >>> format_expression(parse_expression(Source("", "((a-(b-c))) |>f(  )")))
        'a - (b - c) |> f'
    """
    writer = _Writer(equals)
    writer.expression(expr)
    return " ".join(piece.text for piece in writer.pieces)


def format_loop(loop: tuple[syntax.Name, syntax.Expr, syntax.Expr], *, equals: str = " = ") -> str:
    """The range of a loop as `parse_loop` reads it: `i in 0..4`."""
    writer = _Writer(equals)
    writer.loop(*loop)
    return " ".join(piece.text for piece in writer.pieces)


def format_blocks(source: Source, width: int = LINE_WIDTH) -> str:
    """Canonical text of a block file.

    Bodies are indented by 4 blanks, one empty line separates blocks, at most one separates statements. A line that is
    too long goes on in front of a `|>`, or behind a comma in brackets where that is not enough; a pipe that fits is
    joined.

    Comments keep their order. One on a line of its own goes with the statement below it; one behind code stays there,
    and the pipe is broken behind it if it must. Comments in the middle of brackets move in front of the statement or
    stage; those in the middle of a head (`block`, `if`, ...) move below it, since a doc comment stands right above.

    Args:
        source: the file, or the `definitions` of a spec.
        width: longest line, columns.

    Raises:
        FindingsError: if the text cannot be parsed.
    """
    plain = Source(source.name, source.text)  # the tree's positions are then positions in this text
    blocks, findings = parse_blocks(plain)
    if findings:
        spans = [source.span(f.span.start, f.span.end) if f.span else None for f in findings]
        raise FindingsError(replace(f, span=span) for f, span in zip(findings, spans, strict=True))
    comments, code = _scan(plain.text)
    flattener = _Flattener(code)
    for block in blocks:
        flattener.block(block)
    tail = attach(flattener.lines, comments, plain.text, code)
    for line, block in zip((line for line in flattener.lines if not line.indent), blocks, strict=True):
        _part_from_docs(line, len(block.doc))
    groups = arrange(flattener.lines, tail, width)
    for group in groups[1:]:
        group.part()
    return joined(groups)


def _scan(text: str) -> tuple[list[Comment], str]:
    """The comments of a block file, and the file with blanks for comments and quotes for texts."""
    comments: list[Comment] = []

    def masked(match: re.Match[str]) -> str:
        if match.group().startswith("#"):
            comments.append(comment_at(text, match.start(), match.end()))
            return " " * len(match.group())
        return '"' * len(match.group())

    return comments, re.sub(r'"[^"\n]*"|#[^\n]*', masked, text)


def _part_from_docs(line: Line, docs: int) -> None:
    """Keep comments that are no doc comment of a block from becoming one by standing right above it."""
    run: list[Comment | Line] = [line]
    while len(run) <= len(line.above) and not run[0].blank and line.above[-len(run)].text.startswith("##"):
        run.insert(0, line.above[-len(run)])
    if len(run) - 1 > docs:
        run[-1 - docs].blank = True


# From tree to pieces

_POWER, _ATOM, _SIGN, _NUMBER = 9, 10, 8, 1
# How tightly an operator binds, and how tightly its operands must bind to stand without brackets; see mix.lark.
_BINDING: dict[str, tuple[int, int, int]] = {
    "or": (2, 2, 3),
    "and": (3, 3, 4),
    **dict.fromkeys(("==", "!=", "<=", ">=", "<", ">"), (5, 6, 6)),
    **dict.fromkeys("+-", (6, 6, 7)),
    **dict.fromkeys(("*", "/", "//", "%"), (7, 7, _SIGN)),
    "**": (_POWER, _ATOM, _SIGN),
}
_NOT = 4
_COMMA = 100  # rank of a break behind a comma: after those in front of all pipes


def _binding(expr: syntax.Expr) -> int:
    if isinstance(expr, syntax.Pipe) or (isinstance(expr, syntax.Call) and expr.label):
        return 0
    if isinstance(expr, syntax.Conditional):
        return _NUMBER
    if isinstance(expr, syntax.Binary):
        return _BINDING[expr.op][0]
    if isinstance(expr, syntax.Unary):
        return _NOT if expr.op == "not" else _SIGN
    return _ATOM


class _Writer:
    """Prints nodes as pieces of one line."""

    def __init__(self, equals: str = " = "):
        self.pieces = [Piece()]
        self._equals = equals
        self._depth = 0

    def text(self, text: str) -> None:
        self.pieces[-1].text += text

    def expression(self, expr: syntax.Expr, binding: int = 0) -> None:
        """Print an expression, in brackets if it binds less tightly than its place asks for."""
        if _binding(expr) >= binding:
            return self._expression(expr)
        self._open("(")
        self._expression(expr)
        self._close(")")

    def call(self, call: syntax.Call, *, piped: bool = False, declared: bool = False) -> None:
        """Print a call: a stage of a pipe, the call of a `module` declaration, or a plain one."""
        if call.label:
            self.text(f"{call.label}: ")
        self.text(call.callee)
        # Where no semicolon stands, the parser tells tensors from hyperparameters by the place of the call.
        fixed_only = piped or declared
        divided = call.divided or (
            bool(call.tensors)
            if fixed_only
            else any(a.name for a in call.tensors) or any(not a.name for a in call.arguments)
        )
        if piped and not (divided or call.arguments):
            return
        self._open("(")
        if divided:
            self._row(self._argument, call.tensors)
            self._sign(";") if call.arguments else self.text(";")
            self._row(self._argument, call.arguments)
        else:
            self._row(self._argument, call.tensors + call.arguments)
        self._close(")")

    def signature(self, signature: syntax.Signature) -> None:
        self.text(signature.name)
        self._open("(")
        self._row(self._input, signature.inputs)
        if signature.parameters:
            self._sign(";")
            self._row(self._parameter, signature.parameters)
        self._close(")")

    def loop(self, variable: syntax.Name, start: syntax.Expr, stop: syntax.Expr) -> None:
        self.text(f"{variable.name} in ")
        self.expression(start, _NUMBER)
        self.text("..")
        self.expression(stop, _NUMBER)

    def row(self, values: Iterable[syntax.Expr]) -> None:
        self._row(self.expression, values)

    def _open(self, bracket: str) -> None:
        self.text(bracket)
        self._depth += 1

    def _close(self, bracket: str) -> None:
        self.text(bracket)
        self._depth -= 1

    def _sign(self, sign: str) -> None:
        """A comma or semicolon; within brackets the line may be broken behind it."""
        self.text(sign)
        if self._depth:
            self.pieces.append(Piece(rank=_COMMA + self._depth))
        else:
            self.text(" ")

    def _row(self, write, nodes: Iterable[syntax.Node]) -> None:
        for i, node in enumerate(nodes):
            if i:
                self._sign(",")
            write(node)

    def _expression(self, expr: syntax.Expr) -> None:
        if isinstance(expr, syntax.Literal):
            self.text(expr.text or _written(expr.value))
        elif isinstance(expr, syntax.Name):
            self.text(f"{expr.name}.{expr.dim}" if expr.dim else expr.name)
        elif isinstance(expr, syntax.ListOf):
            self._open("[")
            self._row(lambda item: self.expression(item, _NUMBER), expr.items)
            self._close("]")
        elif isinstance(expr, syntax.Unary):
            self.text("not " if expr.op == "not" else expr.op)
            self.expression(expr.operand, _binding(expr))
        elif isinstance(expr, syntax.Binary):
            _, left, right = _BINDING[expr.op]
            self.expression(expr.left, left)
            close = expr.op == "**" and _is_plain(expr.left) and _is_plain(expr.right)
            self.text(expr.op if close else f" {expr.op} ")
            self.expression(expr.right, right)
        elif isinstance(expr, syntax.Conditional):
            self.expression(expr.then, _NUMBER + 1)
            self.text(" if ")
            self.expression(expr.condition, _NUMBER + 1)
            self.text(" else ")
            self.expression(expr.otherwise, _NUMBER)
        elif isinstance(expr, syntax.Index):
            self.expression(expr.base, _ATOM)
            self._open("[")
            self.expression(expr.index, _NUMBER)
            self._close("]")
        elif isinstance(expr, syntax.Call):
            self.call(expr)
        else:
            self._pipe(expr)

    def _pipe(self, pipe: syntax.Pipe) -> None:
        self.expression(pipe.source, 0 if isinstance(pipe.source, syntax.Call) else _NUMBER)
        for call in pipe.calls:
            start = -1 if self._depth else call.span.start
            self.pieces.append(Piece("|> ", rank=self._depth, start=start))
            self.call(call, piped=True)

    def _argument(self, argument: syntax.Argument) -> None:
        if argument.name:
            self.text(argument.name + self._equals)
        self.expression(argument.value)

    def _input(self, item: syntax.Input) -> None:
        kinds = f": {' | '.join(item.kinds)}" if item.kinds else ""
        self.text(item.name + ("..." if item.many else "") + kinds)

    def _parameter(self, parameter: syntax.Parameter) -> None:
        self.text(parameter.name + (f": {parameter.type}" if parameter.type else ""))
        if parameter.default is not None:
            self.text(" = ")
            self.expression(parameter.default)


def _is_plain(expr: syntax.Expr) -> bool:
    return isinstance(expr, syntax.Name) or (isinstance(expr, syntax.Literal) and not isinstance(expr.value, str))


def _written(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return f'"{value}"' if isinstance(value, str) else str(value)


_ELSE = re.compile(r"^[ \t]*(else)[ \t]*:", re.M)


class _Flattener:
    """Turns blocks into lines. `code` is the source without comments."""

    def __init__(self, code: str):
        self.lines: list[Line] = []
        self._code = code

    def block(self, block: syntax.Block) -> None:
        writer = self._head(block.span.start, 0)
        writer.text("block ")
        writer.signature(block.signature)
        writer.text(":")
        self.lines[-1].name = block.name
        self._suite(block.body, 1)

    def _line(self, start: int, level: int) -> _Writer:
        writer = _Writer()
        self.lines.append(Line(level * INDENT, writer.pieces, start))
        return writer

    def _head(self, start: int, level: int) -> _Writer:
        writer = self._line(start, level)
        self.lines[-1].head = True
        return writer

    def _suite(self, body: Iterable[syntax.Statement], level: int) -> None:
        for statement in body:
            start = statement.span.start
            if isinstance(statement, syntax.For):
                writer = self._head(start, level)
                writer.text("for ")
                writer.loop(statement.variable, statement.start, statement.stop)
                writer.text(":")
                self._suite(statement.body, level + 1)
            elif isinstance(statement, syntax.If):
                self._if(statement, level, "if")
            else:
                self._simple(statement, self._line(start, level))

    def _simple(self, statement: syntax.Statement, writer: _Writer) -> None:
        if isinstance(statement, syntax.Assign):
            writer.text(", ".join(t.name for t in statement.targets) + " = ")
            writer.expression(statement.value)
        elif isinstance(statement, syntax.ModuleDecl):
            writer.text(f"module {statement.name.name} = ")
            writer.call(statement.call, declared=True)
        elif isinstance(statement, syntax.Require):
            writer.text("require ")
            writer.expression(statement.condition, _NUMBER)
            writer.text(f', "{statement.message}"' if statement.message else "")
        elif isinstance(statement, syntax.Return):
            writer.text("return ")
            writer.row(statement.values)
        else:
            raise TypeError(f"no statement: {statement}")

    def _if(self, statement: syntax.If, level: int, word: str) -> None:
        writer = self._head(statement.span.start, level)
        writer.text(f"{word} ")
        writer.expression(statement.condition, _NUMBER)
        writer.text(":")
        self._suite(statement.then, level + 1)
        if not statement.otherwise:
            return
        first = statement.otherwise[0]
        if isinstance(first, syntax.If) and self._code.startswith("elif", first.span.start):
            return self._if(first, level, "elif")
        # `else` has no node. Only comments stand between it and its suite, so it is the last one in front of that.
        *_, match = _ELSE.finditer(self._code, self.lines[-1].start, first.span.start)
        self._head(match.start(1), level).text("else:")
        self._suite(statement.otherwise, level + 1)
