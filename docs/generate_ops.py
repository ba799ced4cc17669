"""Write docs/ops.md from the ops themselves: `python docs/generate_ops.py`. A test keeps the page current.

Every op is shown with one example. Its inputs and hyperparameters are chosen here by kind, name and type; a choice that
the op's own check refuses is passed over. A new op needs no line in this file.
"""

from __future__ import annotations

import inspect
import itertools
import math
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from tokenmix.blocks.cost import TALLIES, Tally
from tokenmix.blocks.op import KINDS, Op, Tensor
from tokenmix.blocks.ops import find_op
from tokenmix.blocks.patterns import Elementwise
from tokenmix.compiler.bind import default_value
from tokenmix.dsl import syntax
from tokenmix.dsl.diagnostics import Mistake
from tokenmix.dsl.expressions import describe

PAGE = Path(__file__).with_name("ops.md")

# An input of each kind: small, not square.
INPUTS: dict[str, Tensor] = {
    "map": Tensor("map", (16, 8, 12)),
    "tokens": Tensor("tokens", (96, 16)),
    "windows": Tensor("windows", (6, 16, 16)),
    "vector": Tensor("vector", (16,)),
    "weight": Tensor("weight", (16,)),
    "scores": Tensor("scores", (2, 96, 96)),
    "window_scores": Tensor("window_scores", (6, 2, 16, 16)),
    "order": Tensor("order", (96,)),
}

# Calls that no mixture of these and of the values below makes: sizes that must fit each other.
CALLS: dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]] = {
    "window_merge": ((Tensor("windows", (6, 16, 16)),), {"height": 8, "width": 12}),
    "fold": (
        (Tensor("windows", (24, 9, 16)),),
        {"height": 8, "width": 12, "kernel": 3, "stride": 2, "padding": 1},
    ),
    "outlook_attention": (
        (Tensor("map", (162, 4, 6)), Tensor("map", (16, 8, 12))),
        {"heads": 2, "kernel": 3, "stride": 2},
    ),
}

# Values to try for a hyperparameter without a default, by its name, then by its type.
BY_NAME: dict[str, tuple[Any, ...]] = {
    "out": (32,),
    "kernel": (3,),
    "heads": (2,),
    "window": (4,),
    "height": (6,),
    "width": (10,),
    "multiple": (7,),
    "sizes": (4, 12),
    "parts": (2,),
    "size": (16,),
    "by": (0.5,),
}
BY_TYPE: dict[str, tuple[Any, ...]] = {
    "int": (2, 4, 1, 8, 16, 3),
    "odd": (3, 1, 5),
    "float": (0.5,),
    "rate": (0.1,),
    "bool": (True,),
    "str": ("text",),
}

HEAD = """# The ops

<!-- Written by docs/generate_ops.py from tokenmix/blocks/ops; a test compares the two. Edit the ops, not this page. -->

Everything in a model is made of these {count} primitive ops; a block is a definition over them (see
[language.md](language.md)). They are the only things with hand-written rules for shape, weights, cost and code, one
file per op in `tokenmix/blocks/ops`.

How to read an entry:

- The signature: what flows in stands before the `;`, with the kinds it may have; behind it stand the hyperparameters,
  with type and default. An input without a kind takes any; `...` takes any number of inputs.
- The example: one call, its inputs, the shape of its result, its weights as they are in the state dict, and its exact
  counts for one image, all computed by the op's own rules.
- `becomes` is what stands in the emitted source: a layer in the constructor, or an expression in `forward`. Maps are
  channels-last there, (B, H, W, C).

| kind | dimensions | what it is |
| :-- | :-- | :-- |
{kinds}

Values of the other kinds than {given} are for ops to come: no op here makes one.

| op | takes | in one line |
| :-- | :-- | :-- |
{table}
"""

WHAT_A_KIND_IS: dict[str, str] = {
    "map": "a feature map or image",
    "tokens": "tokens in a row",
    "windows": "tokens cut into windows",
    "vector": "one number per channel and image",
    "weight": "a learnable number per channel, the same for every image",
    "scores": "one number per head, query and key",
    "window_scores": "the same in every window",
    "order": "positions of tokens, first to last",
}

TAIL = """
## What is counted

The names of the counts. A convention (`mac`, `flops`, `fvcore`, `mmcv` or one of a spec's own) is a weighted sum of
them.

| count | what it counts, for one image |
| :-- | :-- |
{tallies}
"""


def page() -> str:
    """The whole of docs/ops.md."""
    ops = [op for name in own_names() if (op := find_op(name)) is not None]
    examples = {op.name: example(op) for op in ops}
    given = {tensor.kind for _, _, outputs in examples.values() for tensor in outputs}
    words = [f"`{kind}`" for kind in KINDS if kind in given]
    head = HEAD.format(
        count=len(ops),
        kinds="\n".join(f"| `{k}` | {', '.join(d)} | {WHAT_A_KIND_IS[k]} |" for k, d in KINDS.items()),
        given=" and ".join([", ".join(words[:-1]), words[-1]]),
        table="\n".join(f"| [`{op.name}`](#{op.name}) | {_takes(op)} | {_first_sentence(op)} |" for op in ops),
    )
    tail = TAIL.format(tallies="\n".join(f"| `{name}` | {what} |" for name, what in TALLIES.items()))
    return "\n".join([head, *(_section(op, *examples[op.name]) for op in ops), tail.lstrip("\n")])


def example(op: Op) -> tuple[tuple[Tensor, ...], dict[str, Any], tuple[Tensor, ...]]:
    """Inputs, hyperparameters and outputs of a small call. Raises `LookupError` if no choice passes the op's check."""
    given = [CALLS[op.name]] if op.name in CALLS else ((i, a) for i in _inputs(op) for a in _arguments(op))
    for inputs, arguments in given:
        try:
            op.check(*inputs, **arguments)
            outputs = op.shape(*inputs, **arguments)
        except Mistake:
            continue
        return inputs, arguments, outputs if isinstance(outputs, tuple) else (outputs,)
    raise LookupError(f"no example fits {op.signature_text}: give its hyperparameters values in {Path(__file__).name}")


def own_names() -> list[str]:
    """The ops of this package, without those that installed packages add."""
    import tokenmix.blocks.ops as package

    return sorted(p.stem for folder in package.__path__ for p in Path(folder).glob("*.py") if p.stem != "__init__")


def _inputs(op: Op) -> Iterator[tuple[Tensor, ...]]:
    choices = []
    for declared in op.signature.inputs:
        choices += [[INPUTS[kind] for kind in declared.kinds or KINDS]] * (2 if declared.many else 1)
    yield from itertools.product(*choices)


def _arguments(op: Op) -> Iterator[dict[str, Any]]:
    choices = [_values(p, op) for p in op.signature.parameters]
    for values in itertools.product(*choices):
        yield dict(zip((p.name for p in op.signature.parameters), values, strict=True))


def _values(parameter: syntax.Parameter, op: Op) -> tuple[Any, ...]:
    if parameter.type is not None and len(parameter.type.names) > 1:
        return parameter.type.names[::-1]  # the first is the plainest, `none`; the last shows more
    if parameter.default is not None:
        return (default_value(parameter, op.name),)
    assert parameter.type is not None
    values = (*BY_NAME.get(parameter.name, ()), *BY_TYPE[parameter.type.names[0]])
    return tuple((v, v) for v in values) if parameter.type.many else values


def _section(op: Op, inputs: tuple[Tensor, ...], arguments: dict[str, Any], outputs: tuple[Tensor, ...]) -> str:
    tally = op.cost(inputs, outputs, **arguments)
    assert isinstance(tally, Tally)
    names = input_names(op, len(inputs))
    rows = [
        ("example", _call(op, inputs, arguments)),
        *((name, str(tensor)) for name, tensor in zip(names, inputs, strict=True)),
        ("gives", ", ".join(map(str, outputs))),
        ("weights", _weights(op.weights(*inputs, **arguments))),
        ("counts", ", ".join(f"{name} {count:,}" for name, count in tally.items()) or "none"),
        ("becomes", op.module(*inputs, **arguments) or op.forward(*names, inputs=inputs, **arguments)),
    ]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name.ljust(width)}  {value}" for name, value in rows]
    return "\n".join([f"## {op.name}", "", *_doc(op), "", "```text", *_signature(op), "", *lines, "```", ""])


def _signature(op: Op) -> list[str]:
    text = op.signature_text
    if len(text) <= 110:
        return [text]
    name, rest = text.split("(", 1)
    tensors, _, parameters = rest.partition("; ")
    indent = " " * (len(name) + 1)
    return [f"{name}({tensors};", f"{indent}{parameters}"]


def _doc(op: Op) -> list[str]:
    """The docstring with its lines joined to paragraphs; the source stands in a paragraph of its own."""
    text = re.sub(r"\nSource:", "\n\nSource:", inspect.cleandoc(op.doc))
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        text = _escaped(" ".join(paragraph.split()))
        wrapped = textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False)
        lines += ["", *wrapped] if lines else wrapped
    return lines


def _escaped(text: str) -> str:
    """Signs that markdown reads as layout, outside of code."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*<\[\]])", r"\\\1", p) for p in parts)


def _first_sentence(op: Op) -> str:
    text = " ".join(op.doc.split())
    return _escaped(re.split(r"\. (?=[A-Z`])", text)[0].rstrip("."))


def _takes(op: Op) -> str:
    kinds = [" \\| ".join(i.kinds or ["any"]) + (" ..." if i.many else "") for i in op.signature.inputs]
    return ", ".join(kinds) or "nothing"


def input_names(op: Op, count: int) -> list[str]:
    names = [i.name for i in op.signature.inputs]
    if names and op.signature.inputs[-1].many:
        last = names.pop()
        names += [f"{last}_{k}" for k in range(1, count - len(names) + 1)]
    return names


def _call(op: Op, inputs: tuple[Tensor, ...], arguments: dict[str, Any]) -> str:
    """The example in the block language; hyperparameters at their defaults are left out."""
    names = input_names(op, len(inputs))
    if isinstance(op, Elementwise):
        return f" {op.sign} ".join(names)
    if op.name in ("scale", "shift"):
        return f"{names[0]} {'*' if op.name == 'scale' else '+'} {describe(arguments['by'])}"
    given = []
    for parameter in op.signature.parameters:
        value = arguments[parameter.name]
        if parameter.default is None or value != default_value(parameter, op.name):
            word = parameter.type is not None and len(parameter.type.names) > 1
            given.append(f"{parameter.name} = {value if word else describe(value)}")
    if len(names) == 1:
        return f"{names[0]} |> {op.name}" + (f"({', '.join(given)})" if given else "")
    return f"{op.name}({', '.join(names)}{'; ' if names and given else ''}{', '.join(given)})"


def _weights(weights: Mapping[str, tuple[int, ...]]) -> str:
    if not weights:
        return "none"
    total = sum(math.prod(shape) for shape in weights.values())
    shown = [f"{name} ({', '.join(map(str, shape))})".strip() for name, shape in weights.items()]
    return f"{', '.join(shown)}: {total:,} parameters"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE} written")
