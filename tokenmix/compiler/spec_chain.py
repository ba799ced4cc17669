"""The files that make up a spec: itself, what it extends, what that extends."""

from __future__ import annotations

import os
import re
from pathlib import Path

from tokenmix.compiler.spec import (
    SPEC_KEYS,
    shipped_specs,
)
from tokenmix.dsl.diagnostics import Finding, nearest
from tokenmix.dsl.files import read_text
from tokenmix.dsl.limits import MAX_NESTING
from tokenmix.dsl.source import Source, Span
from tokenmix.dsl.yaml_reader import YamlMap, YamlNode, YamlScalar, corrected, read_yaml

__all__ = ["real_path", "spec_chain"]


def spec_chain(path: Path, findings: list[Finding]) -> tuple[list[tuple[Source, YamlMap]], bool]:
    """The spec and its bases, nearest first, and whether they are all there."""
    chain: list[tuple[Source, YamlMap]] = []
    seen: set[str] = set()
    link: Span | None = None
    while True:
        place = real_path(path)
        if place in seen:
            circle = " -> ".join([*(Path(s.name).stem for s, _ in chain), path.stem])
            findings.append(
                Finding(
                    "TM1209",
                    f"specs extend each other in a circle: {circle}",
                    link,
                    help="one of them must stand on its own",
                )
            )
            return chain, False
        if len(chain) > MAX_NESTING:
            findings.append(Finding("TM1104", f"more than {MAX_NESTING} specs extend each other", link))
            return chain, False
        seen.add(place)
        read = _document(path, findings)
        if read is None:
            return chain, False
        source, root = read
        if not isinstance(root, YamlMap):
            start = root.span.start
            findings.append(
                Finding(
                    "TM1101", "a spec is a map of keys and values", root.span.source.span(start, start + 1),
                    help="it begins with `tokenmix: 1`",
                )
            )  # fmt: skip
            return chain, False
        root = corrected(root, SPEC_KEYS, "a spec", findings)
        chain.append((source, root))
        base = root.get("extends")
        if base is None:
            return chain, True
        if not isinstance(base, YamlScalar) or not isinstance(base.value, str):
            findings.append(
                Finding("TM1301", "`extends` is the name of one spec", base.span, help="`extends: mixformer`")
            )
            return chain, False
        found = _find_base(base, source, findings)
        if found is None:
            return chain, False
        path, link = found, base.span


def real_path(path: Path | str) -> str:
    """The path with links followed, also where it leads nowhere."""
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):
        return str(path)


# Documents without findings, by name and text: many variants extend one family.
_DOCUMENTS: dict[tuple[str, str], tuple[Source, YamlNode]] = {}


def _document(path: Path, findings: list[Finding]) -> tuple[Source, YamlNode] | None:
    source = read_text(path, findings)
    if source is None:
        return None
    key = (source.name, source.text)
    if key not in _DOCUMENTS:
        before = len(findings)
        root = read_yaml(source, findings)
        if len(findings) > before:
            return (source, root) if root is not None else None
        if root is None:
            findings.append(
                Finding(
                    "TM1003",
                    f"{path} holds comments and nothing else",
                    source.span(0, 1),
                    help="a spec begins with `tokenmix: 1`",
                )
            )
            return None
        if len(_DOCUMENTS) >= 256:
            _DOCUMENTS.clear()
        _DOCUMENTS[key] = (source, root)
    return _DOCUMENTS[key]


def _find_base(name: YamlScalar, source: Source, findings: list[Finding]) -> Path | None:
    text = name.text.removesuffix(".yaml")
    parts = text.split("/")
    if not all(re.fullmatch(r"[\w.-]{1,100}", part) and part.strip(".") for part in parts) or len(parts) > 8:
        findings.append(
            Finding(
                "TM1001", f"`extends` names a spec beside this one or a shipped one, not `{name.text}`", name.span,
                help="write its name alone, without `..`, `/` at the start, or signs",
            )
        )  # fmt: skip
        return None
    beside = source.folder / f"{text}.yaml"
    shipped = shipped_specs().get(text)
    itself = real_path(beside) == real_path(source.name)
    if os.path.lexists(beside) and not (itself and shipped is not None and real_path(shipped) != real_path(beside)):
        return beside
    if shipped is not None:
        return shipped
    known = list(dict.fromkeys([p.stem for p in source.folder.glob("*.yaml")] + list(shipped_specs())))
    near = nearest(text, [k for k in known if k != Path(source.name).stem])
    findings.append(
        Finding(
            "TM1005",
            f"no spec `{text}` lies beside this one and none is shipped under that name",
            name.span,
            help=f"did you mean `{near[0]}`?" if near else "",
        )
    )
    return None
