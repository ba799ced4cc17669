"""Text to syntax tree, for block files and for the expressions of specs."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

from lark import Lark, Transformer, Tree, v_args
from lark.exceptions import UnexpectedInput, VisitError
from lark.indenter import DedentError, Indenter

from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake
from tokenmix.dsl.limits import MAX_DEPTH, MAX_INTEGER, MAX_NESTING, MAX_TOKENS
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.syntax_errors import syntax_error

__all__ = ["RESERVED", "is_name", "parse_blocks", "parse_expression", "parse_loop", "parse_signature"]

# Words of the grammar, the dimension letters, and Python's own words: the emitted source uses names as they are.
RESERVED = frozenset(
    """and or not if else elif for in block module require return true false
    B C H W N
    False None True as assert async await break class continue def del except finally from global import is lambda
    nonlocal pass raise try while with yield self torch nn F super range enumerate str len min max sum""".split()  # noqa: SIM905
)


def is_name(word: str) -> bool:
    """Whether a word can name a model, block, parameter or value; the emitted source uses it as it is."""
    return word.isascii() and word.isidentifier() and word not in RESERVED and "_" not in (word[0], word[-1])


class _Indentation(Indenter):
    NL_type = "_NEWLINE"
    OPEN_PAREN_types = ["LPAR", "LSQB"]
    CLOSE_PAREN_types = ["RPAR", "RSQB"]
    INDENT_type = "_INDENT"
    DEDENT_type = "_DEDENT"
    tab_len = 4


@cache
def _lark() -> Lark:
    return Lark(
        Path(__file__).with_name("mix.lark").read_text(),
        parser="lalr",
        start=["blocks", "expression", "loop", "signature"],
        postlex=_Indentation(),
        propagate_positions=True,
        cache=_table_file(),
    )


def _table_file() -> str | bool:
    """Where the parse table is kept between runs: beside the compiled modules, under the same conditions as they are.

    It saves a tenth of a second at every start. Lark rebuilds it when the grammar, its version or Python's changes.
    """
    folder = Path(__file__).parent / "__pycache__"
    if sys.dont_write_bytecode or not os.access(folder, os.W_OK):
        return False
    return str(folder / f"mix.{sys.implementation.cache_tag}.table")


def parse_blocks(source: Source, start: int = 0, end: int | None = None) -> tuple[list[syntax.Block], list[Finding]]:
    """Every block definition of a file (or of a part of it), and the syntax errors of those that could not be read.

    A mistake in one block does not hide the others: after the first error each block is read on its own.
    """
    text = source.text[start:end]
    if len(text) > MAX_TOKENS and (too_long := _past_tokens(text)):
        span = source.span(start + too_long, start + too_long + 1)
        return [], [Finding("TM1004", f"the text has more than {MAX_TOKENS:,} words, numbers and signs", span)]
    try:
        return _with_docs(_parse(source, text + "\n", start, "blocks")), []
    except Mistake as mistake:
        first = mistake.finding
    blocks, findings = [], []
    for first_char, last_char in _chunks(text):
        try:
            blocks += _parse(source, text[first_char:last_char] + "\n", start + first_char, "blocks")
        except Mistake as mistake:
            findings.append(mistake.finding)
    return _with_docs(blocks), findings or [first]


def parse_expression(source: Source) -> syntax.Expr:
    """One expression, such as a value in a spec. Raises `Mistake`."""
    if len(source.text) > MAX_TOKENS // 10:
        raise Mistake("TM1004", f"an expression has at most {MAX_TOKENS // 10:,} characters", source.span(0, 1))
    return _parse(source, source.text, 0, "expression")


def parse_loop(source: Source) -> tuple[syntax.Name, syntax.Expr, syntax.Expr]:
    """The range of a loop, `i in 0..4`: variable, first value, end. Raises `Mistake`."""
    return _parse(source, source.text, 0, "loop")


@cache
def parse_signature(text: str) -> syntax.Signature:
    """The head of an op or block, `name(x: map; size: int = 3)`. Raises `Mistake`."""
    return _parse(Source("<signature>", text), text, 0, "signature")


def _past_tokens(text: str) -> int:
    """Where the first token beyond the limit stands; 0 if there is none."""
    tokens = (m.start(1) for m in re.finditer(r"#[^\n]*|(\w+|[^\w\s])", text) if m[1])
    return next((start for i, start in enumerate(tokens) if i == MAX_TOKENS), 0)


def _chunks(text: str) -> list[tuple[int, int]]:
    starts = [m.start() for m in re.finditer(r"^\S[^\n]*", text, re.M) if not m.group().startswith("#")] or [0]
    # A stray line between two blocks belongs to the block above it, where the mistake most likely began.
    heads = [s for s in starts if text.startswith("block", s)]
    starts = heads if heads and heads[0] == starts[0] else [starts[0], *heads]
    return list(zip(starts, [*starts[1:], len(text)], strict=True))


def _with_docs(blocks: list[syntax.Block]) -> list[syntax.Block]:
    """Attach the `##` lines that stand directly above each block."""
    documented = []
    for block in blocks:
        # A block may be cut out of a spec, where it is indented: the place is one in the outer text.
        source, (line, column) = block.span.source, block.span.position
        doc: list[str] = []
        while line > 1 and source.line(line - 1).rstrip().rfind("##", 0, column + 1) == column - 1:
            line -= 1
            doc.insert(0, source.line(line)[column + 1 :].removeprefix(" ").rstrip())
        documented.append(syntax.Block(block.span, block.signature, block.body, tuple(doc)))
    return documented


def _parse(source: Source, text: str, offset: int, start: str):
    _check_brackets(source, text, offset)
    try:
        tree = _lark().parse(text, start=start)
    except (UnexpectedInput, DedentError) as error:
        raise syntax_error(source, text, offset, error) from None
    _check_depth(source, tree, offset)
    return _Builder(source, offset).transform(tree)


def _check_brackets(source: Source, text: str, offset: int) -> None:
    depth = 0
    for match in re.finditer(r'"[^"\n]*"|#[^\n]*|[\[(]|[\])]', text):
        if match.group() in "([":
            depth += 1
        elif match.group() in ")]":
            depth -= 1
        if depth > MAX_NESTING:
            raise Mistake(
                "TM1104",
                f"brackets are nested more than {MAX_NESTING} deep",
                source.span(offset + match.start(), offset + match.end()),
                help="name the inner parts on lines of their own",
            )


def _check_depth(source: Source, tree: Tree, offset: int) -> None:
    """Signs, sums and bodies nest without brackets; whatever walks the tree later may then do so by recursion."""
    level, depth = [tree], 0
    while level:
        deeper = [child for node in level for child in node.children if isinstance(child, Tree)]
        depth += 1
        if depth > MAX_DEPTH:
            meta = level[0].meta
            start = offset + (0 if meta.empty else meta.start_pos)
            raise Mistake(
                "TM1104",
                f"operators and bodies are nested more than {MAX_DEPTH} deep "
                "(each term of a sum lies one deeper than the next)",
                source.span(start, start + 1 if meta.empty else offset + meta.end_pos),
                help="name the inner parts on lines of their own",
            )
        level = deeper


_PYTHON_WORDS = {
    "True": "write `true`",
    "False": "write `false`",
    "None": "leave the argument out, or use the word that its op has for it",
}


@v_args(meta=True)
class _Builder(Transformer):
    """Tree of tokens -> syntax records. One method per rule of the grammar, in its order."""

    def __init__(self, source: Source, offset: int):
        super().__init__()
        self._source = source
        self._offset = offset

    def _span(self, meta) -> Span:
        if meta.empty:
            return self._source.span(self._offset, self._offset)
        return self._source.span(self._offset + meta.start_pos, self._offset + meta.end_pos)

    def _token_span(self, token) -> Span:
        return self._source.span(self._offset + token.start_pos, self._offset + token.end_pos)

    def _defined(self, token) -> syntax.Name:
        """A name that is being defined here."""
        span = self._token_span(token)
        if not is_name(token):
            why = "names begin and end with a letter or digit" if "_" in (token[0], token[-1]) else "it is reserved"
            raise Mistake("TM1211", f"`{token}` cannot be used as a name: {why}", span, help="choose another name")
        return syntax.Name(span, str(token))

    def transform(self, tree):
        try:
            return super().transform(tree)
        except VisitError as error:
            if isinstance(error.orig_exc, Mistake):
                raise error.orig_exc from None
            raise

    def blocks(self, meta, children):
        return children

    def block(self, meta, children):
        signature, body = children
        return syntax.Block(self._span(meta), signature, body)

    def signature(self, meta, children):
        name, *rest = children
        inputs = tuple(c for c in rest if isinstance(c, syntax.Input))
        parameters = tuple(c for c in rest if isinstance(c, syntax.Parameter))
        return syntax.Signature(self._span(meta), self._defined(name).name, inputs, parameters)

    def input(self, meta, children):
        name, many, kinds = children
        return syntax.Input(self._span(meta), self._defined(name).name, kinds or (), many is not None)

    def kinds(self, meta, children):
        return tuple(str(c) for c in children)

    def parameter(self, meta, children):
        name, type_, default = children
        return syntax.Parameter(self._span(meta), self._defined(name).name, type_, default)

    def one(self, meta, children):
        return syntax.TypeRef(self._span(meta), tuple(str(c) for c in children))

    def many(self, meta, children):
        return syntax.TypeRef(self._span(meta), (str(children[0]),), many=True)

    def suite(self, meta, children):
        return tuple(children)

    def assign(self, meta, children):
        *targets, value = children
        names = (syntax.Name(self._token_span(t), "_") if t == "_" else self._defined(t) for t in targets)
        return syntax.Assign(self._span(meta), tuple(names), value)

    def module_decl(self, meta, children):
        name, call = children
        if not call.divided:  # `module pe = dwconv(3)`: no tensor flows yet, all arguments are hyperparameters
            call = replace(call, tensors=(), arguments=call.tensors + call.arguments)
        return syntax.ModuleDecl(self._span(meta), self._defined(name), call)

    def require(self, meta, children):
        condition, message = children
        return syntax.Require(self._span(meta), condition, str(message)[1:-1] if message else "")

    def return_(self, meta, children):
        return syntax.Return(self._span(meta), tuple(children))

    def for_(self, meta, children):
        (variable, start, stop), body = children
        return syntax.For(self._span(meta), variable, start, stop, body)

    def loop(self, meta, children):
        variable, start, stop = children
        return self._defined(variable), start, stop

    def if_(self, meta, children):
        condition, then, *otherwise = children
        return syntax.If(self._span(meta), condition, then, otherwise[0] if otherwise else ())

    def elif_(self, meta, children):
        return (self.if_(meta, children),)

    def else_(self, meta, children):
        return children[0]

    def pipe(self, meta, children):
        return syntax.Pipe(self._span(meta), children[0], tuple(children[1:]))

    def labelled(self, meta, children):
        label, call = children
        return _labelled(call, self._defined(label).name, self._span(meta))

    def stage(self, meta, children):
        label, name, arguments = children
        call = self._call(meta, name, arguments, piped=True)
        return _labelled(call, self._defined(label).name, self._span(meta)) if label else call

    def conditional(self, meta, children):
        then, condition, otherwise = children
        return syntax.Conditional(self._span(meta), then, condition, otherwise)

    def binary(self, meta, children):
        left, op, right = children
        return syntax.Binary(self._span(meta), str(op), left, right)

    def unary(self, meta, children):
        op, operand = children
        return syntax.Unary(self._span(meta), str(op), operand)

    def integer(self, meta, children):
        digits = children[0].replace("_", "")
        if len(digits) > 40 or int(digits) > MAX_INTEGER:
            raise self._too_large(meta)
        return syntax.Literal(self._span(meta), int(digits), str(children[0]))

    def float(self, meta, children):
        if float(children[0]) > MAX_INTEGER:
            raise self._too_large(meta)
        return syntax.Literal(self._span(meta), float(children[0]), str(children[0]))

    def _too_large(self, meta) -> Mistake:
        return Mistake(
            "TM1305", f"the number is larger than any that counts: the limit is {MAX_INTEGER:.0e}", self._span(meta)
        )

    def string(self, meta, children):
        return syntax.Literal(self._span(meta), str(children[0])[1:-1], str(children[0]))

    def true(self, meta, children):
        return syntax.Literal(self._span(meta), True, "true")

    def false(self, meta, children):
        return syntax.Literal(self._span(meta), False, "false")

    def name(self, meta, children):
        if children[0] in _PYTHON_WORDS:
            raise Mistake("TM1106", f"there is no `{children[0]}`", self._span(meta), help=_PYTHON_WORDS[children[0]])
        return syntax.Name(self._span(meta), str(children[0]))

    def dimension(self, meta, children):
        name, dim = children
        return syntax.Name(self._span(meta), str(name), str(dim))

    def index(self, meta, children):
        return syntax.Index(self._span(meta), children[0], children[1])

    def list(self, meta, children):
        return syntax.ListOf(self._span(meta), tuple(c for c in children if c is not None))

    def group(self, meta, children):
        return children[0]

    def call(self, meta, children):
        return self._call(meta, children[0], children[1], piped=False)

    def arguments(self, meta, children):
        divider = next((i for i, c in enumerate(children) if getattr(c, "type", "") == "SEMICOLON"), None)
        before = children if divider is None else children[:divider]
        after = [] if divider is None else children[divider + 1 :]
        return [a for a in before if a is not None], [a for a in after if a is not None], divider is not None

    def argument(self, meta, children):
        return syntax.Argument(self._span(meta), "", children[0])

    def keyword(self, meta, children):
        return syntax.Argument(self._span(meta), str(children[0]), children[1])

    def _call(self, meta, name, arguments, *, piped: bool) -> syntax.Call:
        before, after, divided = arguments or ([], [], False)
        if not divided and (piped or any(a.name for a in before)):
            # Named arguments are hyperparameters wherever they stand: `conv_stem(dim = 64)`.
            tensors = [] if piped else [a for a in before if not a.name]
            before, after = tensors, [a for a in before if piped or a.name]
        return syntax.Call(
            self._span(meta),
            str(name),
            self._token_span(name),
            tuple(before),
            tuple(after),
            divided,
            bare=arguments is None,
        )


# Rules named like Python words get an underscore as methods.
for _rule in ("return", "for", "if", "elif"):
    setattr(_Builder, _rule, getattr(_Builder, _rule + "_"))


def _labelled(call: syntax.Call, label: str, span: Span) -> syntax.Call:
    return replace(call, label=label, span=span)
