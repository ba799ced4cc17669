"""Helper layers written into a standalone source: their definitions, and the imports these need."""

from __future__ import annotations

import ast
import re

__all__ = ["definitions", "import_lines"]

# Name -> module it is imported from ("" for `import name`), for what emission itself writes.
_USUAL = {"math": "", "OrderedDict": "collections", "torch": "", "Tensor": "torch", "nn": "torch", "F": "torch.nn"}
_ORIGINAL = {"F": "functional"}


def definitions(source: str, wanted: set[str]) -> tuple[str, dict[str, str]]:
    """The wanted classes and functions of a helper file with those that they use, and what the file imports.

    Args:
        source: text of a file of `blocks/kernels`: imports at the top, then definitions.
        wanted: names; those of other files are passed over.

    Returns:
        The definitions in their order, and name -> module of the imports.
    """
    tree = ast.parse(source)
    defined = {n.name: n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)}
    kept: set[str] = set()
    waiting = [name for name in defined if name in wanted]
    while waiting:
        name = waiting.pop()
        if name not in kept:
            kept.add(name)
            waiting += [n.id for n in ast.walk(defined[name]) if isinstance(n, ast.Name) and n.id in defined]
    bound: dict[str, str] = {}
    for node in tree.body:
        if isinstance(node, ast.ImportFrom):
            bound |= {alias.asname or alias.name: node.module or "" for alias in node.names}
        elif isinstance(node, ast.Import):
            bound |= {alias.asname or alias.name: "" for alias in node.names}
    lines = source.split("\n")
    texts = []
    for name, node in defined.items():
        if name in kept:
            first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
            texts.append("\n".join(lines[first - 1 : node.end_lineno]))
    return "\n\n\n".join(texts), bound


def import_lines(code: str, bound: dict[str, str]) -> list[str]:
    """Imports for the names that a source uses, the standard library first."""
    groups: dict[str, list[str]] = {}
    used = {name: module for name, module in {**_USUAL, **bound}.items() if re.search(rf"(?<![\w.]){name}\b", code)}
    for name, module in used.items():
        original = _ORIGINAL.get(name)
        groups.setdefault(module, []).append(f"{original} as {name}" if original else name)
    plain = {name: f"import {name}" for name in groups.pop("", [])}
    standard = [line for name, line in sorted(plain.items()) if name != "torch"]
    standard += [f"from {m} import {', '.join(sorted(n))}" for m, n in sorted(groups.items()) if not _is_torch(m)]
    torch = [plain["torch"]] if "torch" in plain else []
    torch += [f"from {m} import {', '.join(sorted(n))}" for m, n in sorted(groups.items()) if _is_torch(m)]
    return [*standard, *([""] if standard else []), *torch]


def _is_torch(module: str) -> bool:
    return module.split(".")[0] == "torch"
