"""The primitive ops, one file each, found by name.

An op called `name` is the object `op` in `tokenmix.blocks.ops.name`. Packages may add ops through the entry point
group `tokenmix.ops` (entry name = op name, value = the `Op` object); specs and block files cannot.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from tokenmix.blocks.op import Op

__all__ = ["find_op", "op_names"]


@cache
def op_names() -> tuple[str, ...]:
    """Names of all ops, those of installed packages included."""
    own = [m.name for m in pkgutil.iter_modules(__path__)]
    return tuple(sorted({*own, *_entry_points()}))


@cache
def find_op(name: str) -> Op | None:
    """The op of that name, or None. Only its own file is imported."""
    if name in {m.name for m in _own()}:
        return importlib.import_module(f"{__name__}.{name}").op
    entry = _entry_points().get(name)
    if entry is None:
        return None
    op = entry.load()
    if not isinstance(op, Op) or op.name != name:
        raise TypeError(f"entry point `{name}` of group tokenmix.ops is not an op of that name: {op!r}")
    return op


@cache
def _own() -> tuple[pkgutil.ModuleInfo, ...]:
    return tuple(pkgutil.iter_modules(__path__))


@cache
def _entry_points() -> dict:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group="tokenmix.ops")}
