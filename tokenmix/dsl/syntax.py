"""The syntax tree that block files and the expressions of specs share.

Nodes are plain frozen records. Equality ignores spans, so that text -> tree -> text -> tree can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

from tokenmix.dsl.source import Span

__all__ = [
    "Argument",
    "Assign",
    "Binary",
    "Block",
    "Call",
    "Conditional",
    "Expr",
    "For",
    "If",
    "Index",
    "Input",
    "ListOf",
    "Literal",
    "ModuleDecl",
    "Name",
    "Parameter",
    "Pipe",
    "Require",
    "Return",
    "Signature",
    "Statement",
    "TypeRef",
    "Unary",
]


@dataclass(frozen=True)
class Node:
    span: Span = field(compare=False, repr=False)


@dataclass(frozen=True)
class Literal(Node):
    """A number, string or boolean as written. Floats stay floats: `0.1` is a rate, not a fraction."""

    value: int | float | str | bool | Fraction
    text: str = field(compare=False, default="")


@dataclass(frozen=True)
class Name(Node):
    """A name, or `name.C`: a dimension of another tensor (`dim` is then `C`, `H`, `W` or `N`)."""

    name: str
    dim: str = ""


@dataclass(frozen=True)
class ListOf(Node):
    items: tuple[Expr, ...]


@dataclass(frozen=True)
class Unary(Node):
    op: str
    operand: Expr


@dataclass(frozen=True)
class Binary(Node):
    """Arithmetic, comparison or `and` / `or` of two expressions."""

    op: str
    left: Expr
    right: Expr


@dataclass(frozen=True)
class Conditional(Node):
    """`then if condition else otherwise`"""

    then: Expr
    condition: Expr
    otherwise: Expr


@dataclass(frozen=True)
class Index(Node):
    base: Expr
    index: Expr


@dataclass(frozen=True)
class Argument(Node):
    """A hyperparameter or tensor handed to a call; `name` is empty for a positional one."""

    name: str
    value: Expr


@dataclass(frozen=True)
class Call(Node):
    """`label: callee(tensors; hyperparameters)`.

    `divided` says whether a semicolon stands in the text: without one, the arguments of a piped call are
    hyperparameters and those of a plain call are tensors (or, for `max(a, b)`, numbers).
    """

    callee: str
    callee_span: Span = field(compare=False, repr=False)
    tensors: tuple[Argument, ...] = ()
    arguments: tuple[Argument, ...] = ()
    divided: bool = False
    label: str = ""
    bare: bool = False  # written without parentheses


@dataclass(frozen=True)
class Pipe(Node):
    """`source |> call |> call`: the flowing value is the first tensor of each call."""

    source: Expr
    calls: tuple[Call, ...]


Expr = Literal | Name | ListOf | Unary | Binary | Conditional | Index | Call | Pipe


@dataclass(frozen=True)
class Statement(Node):
    pass


@dataclass(frozen=True)
class Assign(Statement):
    targets: tuple[Name, ...]
    value: Expr


@dataclass(frozen=True)
class ModuleDecl(Statement):
    """`module name = op(...)`: one set of weights, used wherever `name` is called."""

    name: Name
    call: Call


@dataclass(frozen=True)
class Require(Statement):
    condition: Expr
    message: str


@dataclass(frozen=True)
class For(Statement):
    variable: Name
    start: Expr
    stop: Expr
    body: tuple[Statement, ...]


@dataclass(frozen=True)
class If(Statement):
    condition: Expr
    then: tuple[Statement, ...]
    otherwise: tuple[Statement, ...] = ()


@dataclass(frozen=True)
class Return(Statement):
    values: tuple[Expr, ...]


@dataclass(frozen=True)
class TypeRef(Node):
    """`int`, `[rate]` (`many`), or the choice of words `relative | none` (`names` has several entries)."""

    names: tuple[str, ...]
    many: bool = False

    def __str__(self) -> str:
        text = " | ".join(self.names)
        return f"[{text}]" if self.many else text


@dataclass(frozen=True)
class Parameter(Node):
    name: str
    type: TypeRef | None
    default: Expr | None = None


@dataclass(frozen=True)
class Input(Node):
    """A tensor input; `kinds` is empty where any kind will do, `many` marks the last input of a variadic op."""

    name: str
    kinds: tuple[str, ...] = ()
    many: bool = False


@dataclass(frozen=True)
class Signature(Node):
    """`name(tensors; hyperparameters)`, of a block or an op."""

    name: str
    inputs: tuple[Input, ...]
    parameters: tuple[Parameter, ...]


@dataclass(frozen=True)
class Block(Node):
    signature: Signature
    body: tuple[Statement, ...]
    doc: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.signature.name

    @property
    def name_span(self) -> Span:
        start = self.signature.span.start
        return self.signature.span.source.span(start, start + len(self.name))
