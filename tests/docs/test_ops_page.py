"""The page of ops says what the ops say, and its examples are sentences of the language."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
from pathlib import Path

import pytest

from tokenmix.blocks.ops import find_op
from tokenmix.compiler.graph import BlockGraph
from tokenmix.compiler.model import load
from tokenmix.dsl.diagnostics import render

DOCS = Path(__file__).parent.parent.parent / "docs"


def _generator():
    spec = importlib.util.spec_from_file_location("generate_ops", DOCS / "generate_ops.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("generate_ops", module)
    spec.loader.exec_module(module)
    return module


generate_ops = _generator()
NAMES = generate_ops.own_names()


def test_page_is_what_the_generator_writes(request):
    if request.config.getoption("--update-goldens", default=False):
        generate_ops.PAGE.write_text(generate_ops.page(), encoding="utf-8")
    text = generate_ops.PAGE.read_text(encoding="utf-8")
    assert text == generate_ops.page(), "run `python docs/generate_ops.py` and review the difference"


# How an input of an example comes out of a 16 x 8 x 12 image, by its kind or by its kind and dimensions.
MADE = {
    "map": "image |> relu",
    ("map", (162, 4, 6)): "image |> conv(162, 3, stride = 2)",
    "tokens": "image |> to_tokens",
    "windows": "image |> window_partition(4)",
    ("windows", (24, 9, 16)): "image |> unfold(3, 2, 1)",
    "vector": "image |> mean",
    "weight": "parameter(C)",
    "scores": "attention_scores(image, image; heads = 2)",
    "window_scores": "attention_scores(image |> window_partition(4), image |> window_partition(4); heads = 2)",
    "order": "image |> token_order",
}


@pytest.mark.parametrize("name", NAMES)
def test_example_of_the_page_is_counted_as_the_page_says(name, tmp_path):
    op = find_op(name)
    assert op is not None
    inputs, arguments, outputs = generate_ops.example(op)
    page = generate_ops.PAGE.read_text(encoding="utf-8")
    found = re.search(rf"^## {name}$.*?^example +(.*?)$", page, re.M | re.S)
    assert found is not None
    call = found[1]
    maps = [tensor.dims for tensor in inputs if tensor.kind == "map"]
    channels, height, width = max(maps, key=lambda dims: dims[1] * dims[2], default=(16, 8, 12))
    results = [f"y{i}" for i in range(len(outputs))]
    alike = len({str(output) for output in outputs}) == 1 or {output.kind for output in outputs} == {"map"}
    rows = [f"{y} |> to_tokens" if o.kind == "map" else y for y, o in zip(results, outputs, strict=True)]
    parts = f"concat({', '.join(results)})" if alike else f"concat_tokens({', '.join(rows)})"
    joined = results[0] if len(outputs) == 1 else parts
    lines = [
        f"{name} = {MADE.get((tensor.kind, tensor.dims), MADE.get(tensor.kind))}"
        for name, tensor in zip(generate_ops.input_names(op, len(inputs)), inputs, strict=True)
    ]
    lines += [f"{', '.join(results)} = {call}", f"return {joined}" if inputs else f"return image * {joined}"]
    (tmp_path / "op.mix").write_text("block use(image):\n" + textwrap.indent("\n".join(lines) + "\n", "    "))
    (tmp_path / "op.yaml").write_text(
        f"tokenmix: 1\nname: op\ninput: [{channels}, {height}, {width}]\nstages:\n  - {{blocks: use}}\n"
    )
    model = load(tmp_path / "op.yaml")
    assert not model.findings, render(model.findings)
    use = model.elaborate().nodes[0].target
    assert isinstance(use, BlockGraph)
    nodes = [n for n in use.nodes if n.target is op and n.outputs == outputs]
    node = nodes[-1]  # behind the `relu`s that make the inputs
    assert node.arguments.keys() == arguments.keys()
    assert node.weights == dict(op.weights(*inputs, **arguments))
    assert node.tally == op.cost(inputs, outputs, **arguments)
