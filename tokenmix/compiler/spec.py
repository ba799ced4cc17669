"""What a spec says, as records: its keys, parameters, figures. Where shipped specs lie.

Nothing is evaluated here; `plan` puts numbers in.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from tokenmix.blocks.cost import CONVENTIONS, Convention
from tokenmix.compiler.library import Library
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Finding, Mistake, nearest
from tokenmix.dsl.parser import parse_expression
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.yaml_reader import YamlMap, YamlNode, YamlScalar

__all__ = [
    "SPEC_KEYS",
    "Exact",
    "ParameterDecl",
    "Published",
    "Spec",
    "find_spec",
    "parse_scalar",
    "printed_number",
    "shipped_specs",
]

# Every key of a spec, in the order in which `tokenmix fmt` prints them.
SPEC_KEYS: dict[str, str] = {
    "tokenmix": "version of the language, 1",
    "name": "name of the model; the emitted class is called after it",
    "extends": "name of a spec to start from, beside this one or shipped",
    "with": "values for parameters of the extended spec",
    "doc": "what a reader should know",
    "source": "the paper: title, venue, arxiv, code, status",
    "parameters": "hyperparameters of the model: defaults, or type, default, min, max, length, choices and doc",
    "input": "shape of an image, [channels, height, width]",
    "stem": "block that turns the image into the first map",
    "stages": "the stages, one by one or as a comprehension with `for`",
    "features": "block put on each stage's map when the model is used as a dense backbone",
    "head": "block that turns the last map into the result",
    "init": "initialisation by kind of layer",
    "definitions": "block definitions of this spec, in the block language",
    "conventions": "counting rules of the paper: weights of tallies",
    "flops_rule": "the convention under which printed FLOPs are compared",
    "published": "figures printed in the paper, row by row",
    "exact": "integers the model must have; `tokenmix flops` fails if one is missed",
}
STAGE_KEYS = {
    "for": "the loop variable and its range, `i in 0..4`",
    "down": "block in front of the stage's blocks: a call, or {when: condition, block: call}",
    "blocks": "a block, or a list of blocks that take turns",
    "repeat": "how many blocks the stage has (default: each of `blocks` once)",
    "body": "one block that is the whole stage, instead of `blocks`",
}
PARAMETER_KEYS = ("type", "default", "min", "max", "length", "choices", "doc")
SOURCE_KEYS = ("title", "venue", "arxiv", "code", "status", "authors", "year")
PUBLISHED_KEYS = ("table", "input", "dense", "params", "flops", "rule", "note", "top1", "top5")
# Initial distributions of weights, with what they take: a standard deviation, a bound, a value or nothing.
DISTRIBUTIONS = {"trunc_normal": 1, "normal": 1, "uniform": 1, "constant": 1, "zeros": 0, "ones": 0}
INIT_KEYS = ("linear", "pointwise", "conv", "position_table")

_SPECS = (Path(__file__).parent.parent / "specs", Path(__file__).parent.parent.parent / "specs")


@dataclass(frozen=True)
class ParameterDecl:
    """A declared hyperparameter of a model."""

    name: str
    span: Span
    type: syntax.TypeRef | None
    default: YamlNode | None
    low: YamlScalar | None = None
    high: YamlScalar | None = None
    length: YamlNode | None = None
    choices: tuple[str, ...] = ()
    doc: str = ""


@dataclass(frozen=True)
class Published:
    """A row of printed figures. `printed` maps a quantity (params, flops, top1, ...) to the string as printed."""

    span: Span
    table: str
    input: tuple[int, int, int] | None
    dense: bool
    printed: Mapping[str, str]
    rule: str
    note: str = ""


@dataclass(frozen=True)
class Exact:
    """Integers the model must have at one input shape: `params`, or a convention or tally by name."""

    span: Span
    input: tuple[int, int, int] | None
    dense: bool
    values: Mapping[str, int]
    spans: Mapping[str, Span]


@dataclass
class Spec:
    """A spec with its bases folded in: nearest text first where both say something.

    Attributes:
        complete: whether every base could be read.
        present: top-level keys that the spec or a base has.
        guessed: whether values are missing for another mistake, so that their absence is no finding of its own.
    """

    name: str
    source: Source
    root: YamlMap
    values: dict[str, tuple[YamlMap, YamlNode]] = field(default_factory=dict)  # `with`, nearest wins
    parameters: dict[str, ParameterDecl] = field(default_factory=dict)
    keys: dict[str, YamlNode] = field(default_factory=dict)
    stages: dict[str, YamlNode] | None = None  # a comprehension, merged key by key
    paper: dict[str, str] = field(default_factory=dict)
    doc: str = ""
    input: tuple[int, int, int] | None = None
    input_span: Span | None = None
    init: dict[str, YamlScalar] = field(default_factory=dict)
    conventions: dict[str, Convention] = field(default_factory=lambda: dict(CONVENTIONS))
    flops_rule: str = "mac"
    published: list[Published] = field(default_factory=list)
    exact: list[Exact] = field(default_factory=list)
    definitions: list[Source] = field(default_factory=list)
    bases: list[Source] = field(default_factory=list)
    folder: Path | None = None
    complete: bool = True
    present: set[str] = field(default_factory=set)
    guessed: bool = False

    @property
    def is_family(self) -> bool:
        """Whether parameters without a value remain: a base to extend, not a model."""
        return any(p.default is None and name not in self.values for name, p in self.parameters.items())

    def library(self) -> Library:
        return Library(self.definitions, self.folder) if self.definitions or self.folder else _shipped_library()


@cache
def _shipped_library() -> Library:
    return Library()


@cache
def shipped_specs() -> dict[str, Path]:
    """Name -> file of the specs that come with tokenmix."""
    folder = next((f for f in _SPECS if f.is_dir()), None)
    return {p.stem: p for p in sorted(folder.rglob("*.yaml"))} if folder else {}


def find_spec(name: str, findings: list[Finding]) -> Path | None:
    """The file of a spec given by path or by the name of a shipped one."""
    path = Path(name)
    if path.suffix in (".yaml", ".yml") or os.path.exists(name):
        return path
    if name in shipped_specs():
        return shipped_specs()[name]
    near = nearest(name, shipped_specs())
    findings.append(
        Finding(
            "TM1005",
            f"no spec is called `{name}`",
            help=f"did you mean `{near[0]}`?"
            if near
            else "`tokenmix list specs` shows all; a file is given as a path, ending in .yaml",
        )
    )
    return None


def printed_number(text: str) -> tuple[str, int] | None:
    """Digits and power of ten of a printed figure: `3.6G` is ("3.6", 9)."""
    powers = {"K": 3, "M": 6, "G": 9, "T": 12}
    digits, unit = (text[:-1], text[-1]) if text and text[-1] in powers else (text, "")
    parts = digits.split(".")
    if len(parts) > 2 or not all(p.isdigit() and p for p in parts):
        return None
    return digits, powers.get(unit, 0)


def parse_scalar(node: YamlScalar) -> syntax.Expr:
    """A scalar of a spec as an expression; the same scalar is parsed once. Raises `Mistake`."""
    if node.value is None:
        raise Mistake("TM1202", "a value is missing here", node.span)
    known = vars(node)  # kept with the node: a stage's blocks are asked for again and again
    if "_expression" not in known:
        known["_expression"] = parse_expression(node.source)
    return known["_expression"]
