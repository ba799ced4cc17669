"""Bringing the entries of a checkpoint to the weights of a module: what goes where, what is done to it on the way.

Nothing is written here. `match` gives the values for every weight it could place and a report of all of them; whatever
is left over on either side is a problem unless a pattern allows it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from tokenmix.compiler.layouts import Layout, Rule, fits
from tokenmix.dsl.diagnostics import nearest

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Coverage", "Left", "Placed", "Problem", "Report", "common_prefix", "coverage", "is_finite", "match"]

_MAX_PREFIX = 4  # wrappers around wrappers
_SHOWN = 6  # names per line of a printed report, problems of a kind: three times as many


@dataclass(frozen=True)
class Placed:
    """A weight of the module that got a value.

    Attributes:
        name: its key in the module.
        shape: its shape.
        sources: the entries it comes from.
        source_shapes: their shapes.
        how: what was done to them; empty if nothing.
    """

    name: str
    shape: tuple[int, ...]
    sources: tuple[str, ...]
    source_shapes: tuple[tuple[int, ...], ...]
    how: str = ""


@dataclass(frozen=True)
class Left:
    """A weight that stays as it was, or an entry that is not used, and why."""

    name: str
    shape: tuple[int, ...] | None
    why: str


@dataclass(frozen=True)
class Problem:
    """What forbids loading: `missing`, `unused`, `shape`, `kind`, `check`, `parts` or `twice`."""

    kind: str
    name: str
    message: str


@dataclass(frozen=True)
class Report:
    """What became of every weight of the module and every entry of the checkpoint.

    Attributes:
        source: the file, or `the state dict`.
        layout: the layout that was used.
        entry: the nested entry that held the weights; None for the top.
        prefix: what stood in front of the names of all entries and was left out, as `module.`.
        loaded: copied as they are, under another name perhaps.
        transformed: transposed, reshaped, split or joined.
        adapted: fitted to another shape: position tables, first convolution.
        fresh: weights of the module that stay as they were.
        unused: entries that have no place and need none.
        not_finite: weights of the module whose values hold NaN or infinity. They are loaded all the same.
        problems: what forbids loading; empty in the report of a load that went through.
    """

    source: str
    layout: str
    entry: str | None
    prefix: str = ""
    loaded: tuple[Placed, ...] = ()
    transformed: tuple[Placed, ...] = ()
    adapted: tuple[Placed, ...] = ()
    fresh: tuple[Left, ...] = ()
    unused: tuple[Left, ...] = ()
    not_finite: tuple[str, ...] = ()
    problems: tuple[Problem, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        where = f", entry {self.entry}" if self.entry is not None else ""
        lines = [f"{self.source}{where}, layout {self.layout}"]
        if self.prefix:
            lines.append(f"  every entry is taken without its prefix {self.prefix}")
        for kind in ("loaded", "transformed", "adapted"):
            placed: tuple[Placed, ...] = getattr(self, kind)
            lines.append(f"  {kind:11} {len(placed):5}" + _grouped([(p.name, p.how) for p in placed if p.how]))
        for kind in ("fresh", "unused"):
            left: tuple[Left, ...] = getattr(self, kind)
            lines.append(f"  {kind:11} {len(left):5}" + _grouped([(item.name, item.why) for item in left]))
        if self.not_finite:
            found = _grouped([(name, "hold NaN or infinity") for name in self.not_finite])
            lines.append(f"  not finite  {len(self.not_finite):5}{found}")
        if self.problems:
            lines.append(f"  problems    {len(self.problems):5}")
            shown: dict[str, int] = {}
            for problem in self.problems:
                shown[problem.kind] = shown.get(problem.kind, 0) + 1
                if shown[problem.kind] <= 3 * _SHOWN:
                    lines.append(f"    {problem.message}")
            lines += [f"    and {n - 3 * _SHOWN} more: {kind}" for kind, n in shown.items() if n > 3 * _SHOWN]
        text = "\n".join(lines)  # names from a file may hold what steers a terminal
        return "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)


def _grouped(items: list[tuple[str, str]]) -> str:
    """Names under what was done with them, the first few of each group."""
    groups: dict[str, list[str]] = {}
    for name, why in items:
        groups.setdefault(why, []).append(name)
    text = ""
    for why, names in groups.items():
        more = f", ... ({len(names)} in all)" if len(names) > 2 else ""
        text += f"\n    {why}: {', '.join(names[:2])}{more}"
    return text


@dataclass(frozen=True)
class Coverage:
    """How a layout brings together the names of entries and weights.

    Attributes:
        placed: weights that get an entry.
        needed: weights that need one.
        used: entries that find a weight.
        entries: entries that should find one.
    """

    placed: int
    needed: int
    used: int
    entries: int

    @property
    def share(self) -> float:
        """Of the weights or of the entries: a part of a checkpoint has its layout too, and so has more than one."""
        return max(self.placed / max(self.needed, 1), self.used / max(self.entries, 1))


def coverage(wanted: Mapping[str, Tensor], names: Iterable[str], layout: Layout) -> Coverage:
    """How far a layout goes, by names alone."""
    needed = {key for key in wanted if not layout.is_fresh(key)}
    places = [
        set(layout.resolve(name)[1]) for name in names if layout.check(name) is None and not layout.is_ignored(name)
    ]
    used = sum(not needed.isdisjoint(targets) for targets in places)
    return Coverage(len(needed & set().union(*places)), len(needed), used, len(places))


def common_prefix(wanted: Mapping[str, Tensor], names: Iterable[str], layout: Layout) -> str:
    """What stands in front of all names and must be left out for any to fit, or nothing.

    Wrappers of modules put it there: `module.` of data-parallel training, `_orig_mod.` of `torch.compile`, `model.`.
    """
    names = list(names)
    if not names or coverage(wanted, names, layout).placed:
        return ""
    found, most = "", 0
    for length in range(1, _MAX_PREFIX + 1):
        prefix = "".join(f"{part}." for part in names[0].split(".")[:length])
        if not all(name.startswith(prefix) for name in names):
            break
        placed = coverage(wanted, [name.removeprefix(prefix) for name in names], layout).placed
        if placed > most:
            found, most = prefix, placed
    return found


def match(
    wanted: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    others: Mapping[str, str],
    layout: Layout,
    *,
    source: str,
    entry: str | None = None,
    prefix: str = "",
    allow: Iterable[str] = (),
    adapt: bool = True,
) -> tuple[dict[str, Tensor], Report]:
    """Values for the weights of a module, and the report. Nothing is copied into the module.

    Args:
        wanted: the module's state dict; its values say shapes and kinds of numbers.
        tensors: entries of the checkpoint.
        others: entries that are no tensors, and what they are.
        layout: where entries go.
        source, entry, prefix: for the report.
        allow: patterns of keys, on either side, that may stay fresh or unused.
        adapt: fit position tables and the first convolution to other shapes.
    """
    matching = _Matching(wanted, layout, tuple(allow), adapt)
    matching.place(tensors, others)
    matching.fill(tensors)
    matching.leave(tensors)
    lists = {kind: tuple(found) for kind, found in matching.lists.items()}
    broken = tuple(key for key, value in matching.values.items() if not is_finite(value))
    return matching.values, Report(source, layout.name, entry, prefix, not_finite=broken, **lists)


@dataclass
class _Use:
    """One entry on its way to a weight: the whole, a part of it, or a slice."""

    name: str
    rule: Rule | None
    index: int = 0  # among the targets of a rule that splits


@dataclass
class _Matching:
    wanted: Mapping[str, Tensor]
    layout: Layout
    allow: tuple[str, ...]
    adapt: bool
    values: dict[str, Tensor] = field(default_factory=dict)
    uses: dict[str, list[_Use]] = field(default_factory=dict)
    idle: dict[str, tuple[str, ...]] = field(default_factory=dict)  # entries without a weight -> where they would go

    def __post_init__(self) -> None:
        names = ("loaded", "transformed", "adapted", "fresh", "unused", "problems")
        self.lists: dict[str, list[Any]] = {name: [] for name in names}
        axes = (key for key, tensor in self.wanted.items() if tensor.ndim == 4)
        self.first_convolution = next(axes, None)

    def problem(self, kind: str, name: str, message: str) -> None:
        self.lists["problems"].append(Problem(kind, name, message))

    def place(self, tensors: Mapping[str, Tensor], others: Mapping[str, str]) -> None:
        """Find the weights that every entry goes to."""
        for name, tensor in tensors.items():
            check = self.layout.check(name)
            if check is not None:
                self.check(name, tensor)
            elif self.layout.is_ignored(name):
                self.lists["unused"].append(Left(name, tuple(tensor.shape), "dropped by the layout"))
            else:
                rule, targets = self.layout.resolve(name)
                for index, target in enumerate(targets):
                    if target in self.wanted:
                        self.uses.setdefault(target, []).append(_Use(name, rule, index))
                if not any(target in self.wanted for target in targets):
                    self.idle[name] = targets
        for name, kind in others.items():
            if self.layout.is_ignored(name):
                self.lists["unused"].append(Left(name, None, "dropped by the layout"))
            elif fits(name, self.allow):
                self.lists["unused"].append(Left(name, None, "allowed"))
            else:
                self.problem("unused", name, f"{name} is a {kind}, not a tensor; it has no place")

    def check(self, name: str, tensor: Tensor) -> None:
        """Hold a table that a checkpoint repeats against what it must be."""
        side = math.isqrt(tensor.shape[0]) if tensor.ndim == 2 else 0
        fits_size = tensor.ndim == 2 and tuple(tensor.shape) == (side**2, side**2)
        if fits_size and torch.equal(tensor.long().cpu(), _relative_position_index(side)):
            self.lists["unused"].append(Left(name, tuple(tensor.shape), "checked and dropped"))
        else:
            self.problem("check", name, f"{name} is not the table of relative positions that its model must have")

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Give every weight its value, or say why not."""
        for key, weight in self.wanted.items():
            uses = self.uses.get(key, [])
            shape = tuple(weight.shape)
            if not uses:
                if self.layout.is_fresh(key):
                    self.lists["fresh"].append(Left(key, shape, "not in checkpoints of this layout"))
                elif fits(key, self.allow):
                    self.lists["fresh"].append(Left(key, shape, "allowed"))
                else:
                    self.missing(key, shape, tensors)
                continue
            if len(uses) > 1 and any(use.rule is None or use.rule.part is None for use in uses):
                names = " and ".join(use.name for use in uses)
                self.problem("twice", key, f"{key} would come from {names}")
                continue
            self.fill_one(key, weight, uses, tensors)

    def fill_one(self, key: str, weight: Tensor, uses: list[_Use], tensors: Mapping[str, Tensor]) -> None:
        shape = tuple(weight.shape)
        sources = [tensors[use.name] for use in uses]
        value, how = self.transformed(key, uses, tensors)
        if value is None:
            return
        kind = "transformed" if how else "loaded"
        if self.adapt and tuple(value.shape) != shape:
            adapted = _adapted(key, value, weight, key == self.first_convolution)
            if adapted is not None:
                (value, done), kind = adapted, "adapted"
                how = f"{how}, {done}" if how else done
        if tuple(value.shape) != shape:
            came = " and ".join(f"{u.name} is {_shape(s.shape)}" for u, s in zip(uses, sources, strict=True))
            came = f"the checkpoint's {came}" + (f", {how} {_shape(value.shape)}" if how else "")
            if fits(key, self.allow) or all(fits(use.name, self.allow) for use in uses):
                self.lists["fresh"].append(Left(key, shape, f"allowed; {came}"))
                self.lists["unused"] += [Left(u.name, tuple(tensors[u.name].shape), "allowed") for u in uses]
            else:
                self.problem("shape", key, f"the module's {key} is {_shape(shape)}; {came}")
        elif value.is_complex() or value.is_floating_point() != weight.is_floating_point():
            theirs = f"the checkpoint's {uses[0].name} is {value.dtype}"
            self.problem("kind", key, f"the module's {key} is {weight.dtype}; {theirs}")
        else:
            self.values[key] = value
            names, shapes = tuple(u.name for u in uses), tuple(tuple(s.shape) for s in sources)
            self.lists[kind].append(Placed(key, shape, names, shapes, how))

    def transformed(self, key: str, uses: list[_Use], tensors: Mapping[str, Tensor]) -> tuple[Tensor | None, str]:
        """The entries of a weight put into the form it has in the module, and what was done."""
        rule = uses[0].rule
        if rule is None:
            return tensors[uses[0].name], ""
        done: dict[str, None] = {}
        pieces = []
        for use in sorted(uses, key=lambda u: (u.rule.part or 0) if u.rule else 0):
            assert use.rule is not None
            piece = tensors[use.name]
            if piece.ndim > 1 and use.rule.transpose:  # vectors are the same either way
                piece = piece.permute(*reversed(range(piece.ndim)))
                done["transposed"] = None
            if piece.ndim > 1 and use.rule.reshape is not None:
                try:
                    piece = piece.reshape([piece.shape[i] if n == 0 else n for i, n in enumerate(use.rule.reshape)])
                except (IndexError, RuntimeError):
                    reshape = _shape(use.rule.reshape)
                    self.problem(
                        "shape", key, f"{use.name} is {_shape(piece.shape)}, which does not reshape to {reshape}"
                    )
                    return None, ""
                done["reshaped"] = None
            pieces.append(piece)
        if len(rule.targets) > 1:
            done[f"part {uses[0].index} of {len(rule.targets)}"] = None
            split = self.slice(pieces[0], uses[0], tensors)
            if split is None:
                self.problem("parts", key, f"{uses[0].name} does not split evenly into {len(rule.targets)} weights")
            return split, ", ".join(done)
        if rule.part is not None:
            parts = self.layout.parts(rule)
            numbers = [use.rule.part for use in uses if use.rule]
            if sorted(n for n in numbers if n is not None) != list(range(parts)):
                names = ", ".join(use.name for use in uses)
                self.problem("parts", key, f"{key} is joined from {parts} entries; there are {names}")
                return None, ""
            done["joined"] = None
            try:
                return torch.cat(pieces, dim=rule.axis), ", ".join(done)
            except (IndexError, RuntimeError):
                shapes = ", ".join(_shape(p.shape) for p in pieces)
                self.problem("parts", key, f"{key}: entries of {shapes} cannot be joined along axis {rule.axis}")
                return None, ""
        return pieces[0], ", ".join(done)

    def slice(self, piece: Tensor, use: _Use, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """This weight's share of an entry: as large along the axis as the weights are, which must use it up."""
        assert use.rule is not None
        _, targets = self.layout.resolve(use.name)
        axis = use.rule.axis
        sizes = [self.wanted[t].shape[axis] if t in self.wanted and self.wanted[t].ndim > axis else -1 for t in targets]
        if -1 in sizes or piece.ndim <= axis or sum(sizes) != piece.shape[axis]:
            return None
        return piece.narrow(axis, sum(sizes[: use.index]), sizes[use.index])

    def missing(self, key: str, shape: tuple[int, ...], tensors: Mapping[str, Tensor]) -> None:
        shown = sum(problem.kind == "missing" for problem in self.lists["problems"])
        near: list[str] = []
        if shown < 3 * _SHOWN:  # looking is slow, and nobody reads more
            places = {target: name for name, targets in self.idle.items() for target in targets or (name,)}
            near = [places[n] for n in nearest(key, [p for p in places if p[-5:] == key[-5:]])]
        help = f"; the nearest unused entry is {near[0]}" if near else ""
        self.problem("missing", key, f"{key} {_shape(shape)} is not in the checkpoint{help}")

    def leave(self, tensors: Mapping[str, Tensor]) -> None:
        """Entries without a place: allowed, or problems."""
        for name, targets in self.idle.items():
            shape = tuple(tensors[name].shape)
            if any(fits(key, self.allow) for key in (name, *targets)):
                self.lists["unused"].append(Left(name, shape, "allowed"))
            else:
                place = f" (it would be {', '.join(targets)})" if targets and targets != (name,) else ""
                self.problem("unused", name, f"{name} {_shape(shape)} has no place in the module{place}")


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds numbers only, neither NaN nor infinity."""
    if not tensor.is_floating_point():
        return True
    # torch does not look into floats of 8 bits; all of them are floats of 32 bits too.
    return bool(torch.isfinite(tensor.float() if tensor.element_size() == 1 else tensor).all())


def _shape(shape: Iterable[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every query and key of a window, (w*w, w*w).

    Source: Swin Transformer (Liu et al. 2021), section 3.2: (qh - kh + w - 1) * (2w - 1) + (qw - kw + w - 1).
    """
    rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
    rows, columns = rows.reshape(-1), columns.reshape(-1)
    down = rows[:, None] - rows + window - 1
    right = columns[:, None] - columns + window - 1
    return down * (2 * window - 1) + right


def _adapted(key: str, value: Tensor, weight: Tensor, first: bool) -> tuple[Tensor, str] | None:
    """A value fitted to a weight of another shape where there is an accepted way to do so, and what was done."""
    if key.rpartition(".")[2] == "bias_table" and value.ndim == weight.ndim == 2:
        return _other_window(value, weight)
    if first and value.ndim == weight.ndim == 4 and value.shape[1] == 3:
        others = (value.shape[0], *value.shape[2:]) == (weight.shape[0], *weight.shape[2:])
        return _other_input(value, weight.shape[1]) if others else None
    return None


def _other_window(table: Tensor, weight: Tensor) -> tuple[Tensor, str] | None:
    """A table of relative positions for another window: bicubic over its (2w-1) x (2w-1) grid, head by head."""
    sides = [math.isqrt(t.shape[0]) for t in (table, weight)]
    whole = all(side**2 == t.shape[0] and side % 2 for side, t in zip(sides, (table, weight), strict=True))
    if not whole or table.shape[1] != weight.shape[1]:
        return None
    old, new = sides
    grid = table.T.reshape(1, -1, old, old)
    grid = F.interpolate(grid.to(_wide(grid)), size=(new, new), mode="bicubic", align_corners=False)
    windows = f"window {(old + 1) // 2} to {(new + 1) // 2}"
    return grid.reshape(-1, new * new).T.to(table.dtype), f"resized bicubically, {windows}"


def _other_input(kernel: Tensor, channels: int) -> tuple[Tensor, str]:
    """The first convolution for other images than RGB, with answers of the same size for equal channels.

    Source: timm's `adapt_input_conv`: the sum for one channel; else repeated in turn, times 3 / channels.
    """
    wide = kernel.to(_wide(kernel))
    if channels == 1:
        return wide.sum(dim=1, keepdim=True).to(kernel.dtype), "summed over the 3 input channels"
    repeated = wide.repeat(1, -(-channels // 3), 1, 1)[:, :channels] * (3 / channels)
    return repeated.to(kernel.dtype), f"repeated for {channels} input channels and rescaled"


def _wide(tensor: Tensor) -> torch.dtype:
    """A dtype in which to compute: half precision would round twice."""
    return tensor.dtype if tensor.dtype in (torch.float32, torch.float64) else torch.float32
