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
    "Status",
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
    "layouts": "layout files of checkpoints that others publish, the usual one first",
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
# What a status may tell apart, with the words that reports put in front.
STATUS_KEYS = {"stated": "Stated", "forced": "Forced by the numbers", "assumed": "Assumed"}
PUBLISHED_KEYS = ("paper", "table", "row", "input", "dense", "params", "flops", "rule", "note", "top1", "top5")
# Initial distributions of weights, with what they take: a standard deviation, a bound, a value or nothing.
DISTRIBUTIONS = {"trunc_normal": 1, "normal": 1, "uniform": 1, "constant": 1, "zeros": 0, "ones": 0}
INIT_KEYS = ("linear", "pointwise", "conv", "position_table", "labels")

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
    """A row of printed figures.

    Attributes:
        paper: the family whose paper prints the row; empty for the spec's own.
        row: what the paper calls the row; empty where the spec's name will do.
        printed: quantity (params, flops, top1, ...) -> the string as printed.
        note: why a figure misses.
    """

    span: Span
    paper: str
    table: str
    row: str
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


@dataclass(frozen=True)
class Status:
    """What a model rests on: a text, or what the paper states, what its numbers force and what is assumed."""

    text: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_reconstruction(self) -> bool:
        """Whether the paper does not state all of it."""
        return bool(self.parts.keys() & {"forced", "assumed"})

    def lines(self) -> list[str]:
        """A line for each part that there is."""
        if self.text:
            return [f"Status: {self.text}"]
        parts = [f"{STATUS_KEYS[key]}: {self.parts[key]}" for key in STATUS_KEYS if key in self.parts]
        return ["A reconstruction.", *parts] if self.is_reconstruction else parts

    def as_json(self) -> str | dict[str, str]:
        return dict(self.parts) or self.text


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
    numbered: dict[str, dict[str, YamlNode]] = field(default_factory=dict)  # what single stages of it have instead
    paper: dict[str, str] = field(default_factory=dict)
    status: Status = field(default_factory=Status)
    doc: str = ""
    input: tuple[int, int, int] | None = None
    input_span: Span | None = None
    init: dict[str, YamlScalar] = field(default_factory=dict)
    init_labels: dict[str, YamlScalar] = field(default_factory=dict)
    conventions: dict[str, Convention] = field(default_factory=lambda: dict(CONVENTIONS))
    flops_rule: str = "mac"
    published: list[Published] = field(default_factory=list)
    exact: list[Exact] = field(default_factory=list)
    definitions: list[Source] = field(default_factory=list)
    layouts: dict[str, Path] = field(default_factory=dict)  # of checkpoints, nearest first
    bases: list[Source] = field(default_factory=list)
    folder: Path | None = None
    complete: bool = True
    present: set[str] = field(default_factory=set)
    guessed: bool = False

    @property
    def is_family(self) -> bool:
        """Whether parameters without a value remain: a base to extend, not a model."""
        return any(p.default is None and name not in self.values for name, p in self.parameters.items())

    @property
    def family(self) -> str:
        """Name of the spec at the end of the chain that this one extends."""
        return Path(self.bases[-1].name).stem if self.bases else self.name

    def library(self) -> Library:
        return Library(self.definitions, self.folder) if self.definitions or self.folder else _shipped_library()


@cache
def _shipped_library() -> Library:
    return Library()


@cache
def shipped_specs() -> dict[str, Path]:
    """Name -> file of the specs that come with tokenmix; families and variants first, then ablations."""
    folder = next((f for f in _SPECS if f.is_dir()), None)
    if folder is None:
        return {}
    return {path.stem: path for path in [*sorted(folder.glob("*.yaml")), *sorted(folder.glob("ablations/*.yaml"))]}


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


# The unit of a figure that is printed without one: that of a column of its kind.
UNITS = {"params": "M", "flops": "G"}


def printed_number(text: str, unit: str = "") -> tuple[str, int] | None:
    """Digits and power of ten of a printed figure: `3.6G` is ("3.6", 9). Without a letter it is in the given unit."""
    powers = {"": 0, "K": 3, "M": 6, "G": 9, "T": 12}
    digits, unit = (text[:-1], text[-1]) if text and text[-1] in powers else (text, unit)
    parts = digits.split(".")
    if len(parts) > 2 or not all(p.isdigit() and p for p in parts):
        return None
    return digits, powers[unit]


def parse_scalar(node: YamlScalar) -> syntax.Expr:
    """A scalar of a spec as an expression; the same scalar is parsed once. Raises `Mistake`."""
    if node.value is None:
        raise Mistake("TM1202", "a value is missing here", node.span)
    known = vars(node)  # kept with the node: a stage's blocks are asked for again and again
    if "_expression" not in known:
        known["_expression"] = parse_expression(node.source)
    return known["_expression"]
