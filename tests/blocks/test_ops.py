"""Every op three ways: by its rules, as its emitted module runs, and worked out by hand for a small odd shape."""

import math

import pytest
import torch

import tokenmix
from tokenmix.blocks.cost import CONVENTIONS, TALLIES
from tokenmix.blocks.op import KINDS
from tokenmix.blocks.ops import find_op, op_names
from tokenmix.compiler.graph import BlockGraph
from tokenmix.compiler.verify import verify
from tokenmix.runtime.audit import audit

# Op -> (expression on a map x of 6 channels, 5 high and 7 wide; parameters; tally), worked out by hand: 35 positions,
# 210 elements. Other ops an expression needs are listed in it and subtracted by looking at the op's own nodes only.
X = (6, 5, 7)
EXAMPLES = {
    # Padded to 6 x 8: 12 windows of 4 tokens, each asked by one token more.
    "abstract_window_attention": (
        "concat_tokens(y |> to_tokens, tokens)",
        0,
        {"macs_attention": 2 * (48 + 12) * 4 * 6, "softmax": (48 + 12) * 4 * 3},
    ),
    "add": ("x + x", 0, {"elementwise": 210}),
    "adaptive_avg_pool": ("x |> adaptive_avg_pool(3, 4)", 0, {"adaptive_pool": 210}),
    "attention": ("attention(x, x, x; heads = 2)", 0, {"macs_attention": 2 * 35 * 35 * 6, "softmax": 2 * 35 * 35}),
    "attention_scores": ("s", 0, {"macs_attention": 35 * 35 * 6}),
    "avg_pool": ("x |> avg_pool(3, stride = 2, padding = 1)", 0, {"pool": 210}),
    "axial_sample": ("axial_sample(x, x |> linear(3); axis = width)", 0, {"macs_sampling": 420}),
    # 35 queries, all but 4 of 35 keys.
    "background_attention": (
        "background_attention(x |> to_tokens, x, x, order; first = 4, heads = 2)",
        0,
        {"macs_attention": 2 * 35 * 31 * 6, "softmax": 2 * 35 * 31},
    ),
    "batch_norm": ("x |> batch_norm", 12, {"batch_norm": 210}),
    # Distances on a 3 x 4 grid, two groups: 6 * 3 * 4 output elements.
    "bilinear_sample": ("bilinear_sample(x, dx, dy; outside = border)", 0, {"grid_sample": 72, "macs_sampling": 288}),
    "channel_mean": ("x - channel_mean(x)", 0, {"mean": 210, "mean_out": 35}),
    "concat": ("concat(x, x |> relu)", 0, {}),
    "concat_tokens": ("concat_tokens(parameter(C), x |> to_tokens, x |> mean) |> token(36)", 0, {}),
    # Output 8 x 3 x 4; each element reads 3 channels (groups = 2) of a 3x3 window.
    "conv": ("x |> conv(8, 3, stride = 2, groups = 2)", 8 * 3 * 9 + 8, {"macs_conv": 96 * 27, "bias_conv": 96}),
    "crop": ("x |> crop(4, 3)", 0, {}),
    "drop_path": ("x |> drop_path(0.5)", 0, {}),
    "dwconv": ("x |> dwconv(3, stride = 2, bias = false)", 54, {"macs_conv": 6 * 12 * 9}),
    # Every input element meets the 2x2 kernel of its channel; output 3 x 10 x 14.
    "dwconv_transpose": ("x |> dwconv_transpose(3, 2)", 27, {"macs_conv": 210 * 4, "bias_conv": 420}),
    # 3 x 4 windows of 3x3 tokens, each added to its place.
    "fold": ("x |> unfold(3, 2, 1) |> fold(H, W, 3, 2, 1)", 0, {"elementwise": 12 * 9 * 6}),
    "gather_tokens": ("gather_tokens(x, order)", 0, {}),
    "gelu": ("x |> gelu", 0, {"gelu": 210}),
    "global_avg_pool": ("x |> global_avg_pool", 0, {"adaptive_pool": 210}),
    "group_norm": ("x |> group_norm(3)", 12, {"group_norm": 210}),
    "head_mixing": ("s", 9 + 3, {"macs_conv": 35 * 35 * 9, "bias_conv": 35 * 35 * 3}),
    "layer_norm": ("x |> layer_norm", 12, {"layer_norm": 210}),
    "linear": ("x |> linear(4)", 28, {"macs_linear": 35 * 24, "bias_linear": 140}),
    "max_pool": ("x |> max_pool(2, 2)", 0, {"pool": 210}),
    "mean": ("x |> mean", 0, {"mean": 210, "mean_out": 6}),
    "merge_windows": ("x |> pad_to(2) |> window_partition(2) |> merge_windows", 0, {}),
    "mul": ("x * x", 0, {"elementwise": 210}),
    # 3 x 4 windows of 3x3 places; every place reads nine.
    "outlook_attention": (
        "outlook_attention(a, x; heads = 2, kernel = 3, stride = 2)",
        0,
        {"softmax": 12 * 162, "macs_attention": 12 * 81 * 6, "elementwise": 12 * 9 * 6},
    ),
    "pad_to": ("x |> pad_to(4)", 0, {}),
    "parameter": ("x * parameter(C, 0.5)", 6, {}),
    "pointwise": ("x |> pointwise(4)", 28, {"macs_conv": 35 * 24, "bias_conv": 140}),
    "position_embedding": ("x |> position_embedding(4, 3)", 72, {"elementwise": 210}),
    "position_scores": ("weighted_sum(s, v)", 0, {}),
    "relu": ("x |> relu", 0, {"relu": 210}),
    "relu6": ("x |> relu6", 0, {"relu": 210}),
    "replace_tokens": ("replace_tokens(x, order, a)", 0, {}),
    "resize": ("x |> resize(3, 9)", 0, {"resize_bilinear": 162}),
    "roll": ("x |> roll(2, -3)", 0, {}),
    "scale": ("0.5 * x", 0, {"elementwise": 210}),
    "scatter_tokens": ("x |> gather_tokens(order;) |> scatter_tokens(order;) |> to_map(H, W)", 0, {}),
    "shift": ("1 - x", 0, {"elementwise": 210}),
    "sigmoid": ("x |> sigmoid", 0, {"activation": 210}),
    "silu": ("x |> silu", 0, {"activation": 210}),
    "softmax": ("x |> softmax", 0, {"softmax": 210}),
    "space_to_depth": ("x |> pad_to(4) |> space_to_depth(4)", 0, {}),
    "split": ("concat(a, b)", 0, {}),
    "split_channels": ("concat(b, a)", 0, {}),
    "split_tokens": ("concat_tokens(b, a)", 0, {}),
    "sub": ("x - (x |> relu)", 0, {"elementwise": 210}),
    "talking_heads_attention": (
        "y",
        2 * 15 + 5 + 3,
        {
            "macs_attention": 2 * 35 * 35 * 6,
            "macs_conv": 2 * 35 * 35 * 15,
            "bias_conv": 35 * 35 * 8,
            "softmax": 35 * 35 * 5,
        },
    ),
    "to_map": ("x |> to_tokens |> gelu |> to_map(H, W)", 0, {}),
    "to_tokens": ("x |> to_tokens |> gelu", 0, {}),
    "token": ("x |> to_tokens |> token(34)", 0, {}),
    "token_order": ("gather_tokens(x, order)", 0, {"mean": 210, "mean_out": 35}),
    "token_partition": ("gather_tokens(x, order; first = 4)", 0, {"mean": 210, "mean_out": 35}),
    "unfold": ("x |> unfold(2, 3)", 0, {}),
    "weighted_sum": ("s |> softmax |> weighted_sum(x;)", 0, {"macs_attention": 35 * 35 * 6}),
    # Padded to 6 x 8: 12 windows of 4 tokens; table (2 * 2 - 1)**2 x 3.
    "window_attention": (
        "y",
        27,
        {"macs_attention": 2 * 48 * 4 * 6, "softmax": 48 * 4 * 3},
    ),
    "window_merge": ("x |> pad_to(3) |> window_partition(3) |> window_merge(6, 9)", 0, {}),
    "window_partition": ("x |> pad_to(3) |> window_partition(3)", 0, {}),
}
BEFORE = {
    "abstract_window_attention": "    y = x |> pad_to(2)\n"
    "    y, tokens = abstract_window_attention(y, y, y, parameter(C, 0.5); heads = 3, window = 2)\n",
    "attention_scores": "    s = attention_scores(x, x; heads = 3) |> softmax |> weighted_sum(x;)\n",
    "bilinear_sample": "    dx, dy = x |> dwconv(3, stride = 2) |> linear(4) |> split(2)\n",
    "background_attention": "    order = x |> token_order\n",
    "gather_tokens": "    order = x |> token_order\n",
    "head_mixing": "    s = attention_scores(x, x; heads = 3) |> head_mixing(3) |> weighted_sum(x;)\n",
    "outlook_attention": "    a = x |> dwconv(3, stride = 2) |> pointwise(162)\n",
    "position_scores": "    s = x |> pointwise(18) |> position_scores(1, 2, 9)\n    v = x |> unfold(3, padding = 1)\n",
    "replace_tokens": "    order = x |> token_order\n    a = gather_tokens(x, order; first = 4)\n",
    "scatter_tokens": "    order = x |> token_order\n",
    "split_channels": "    a, b = x |> split_channels([4, 2])\n",
    "split_tokens": "    a, b = x |> to_tokens |> split_tokens(4)\n",
    "talking_heads_attention": "    y = x |> to_tokens\n"
    "    y = talking_heads_attention(y, y, y; heads = 3, inner = 5)\n",
    "token_order": "    order = x |> token_order\n",
    "token_partition": "    order = x |> token_partition(4)\n",
    "weighted_sum": "    s = attention_scores(x, x; heads = 2)\n",
    "split": "    a, b = x |> split(2, interleaved = true)\n",
    "window_attention": "    y = x |> pad_to(2)\n"
    "    y = window_attention(y, y, y; heads = 3, window = 2, bias = relative)\n",
}


def spec_of(tmp_path, op):
    expression = EXAMPLES[op][0]
    body = BEFORE.get(op, "") + f"    return {expression}\n"
    text = "tokenmix: 1\nname: probe\ninput: [6, 5, 7]\nstages:\n  - body: probe_block()\ndefinitions: |\n" + "".join(
        f"  {line}\n" for line in f"block probe_block(x):\n{body}".splitlines()
    )
    path = tmp_path / "probe.yaml"
    path.write_text(text)
    return path


@pytest.fixture(params=op_names())
def op(request):
    assert request.param in EXAMPLES, f"add an example for the op {request.param}"
    return request.param


def own_nodes(graph, op):
    return [(node, reused) for _, _, node, reused in graph.walk() if node.target.name == op]


def test_counts_are_those_worked_out_by_hand(op, tmp_path):
    model = tokenmix.load(spec_of(tmp_path, op))
    assert model.findings == ()
    nodes = own_nodes(model.elaborate(), op)
    _, params, tally = EXAMPLES[op]
    assert sum(n.num_params for n, _ in nodes) == params
    total = {}
    for node, _ in nodes[: 1 if op != "shift" else None]:
        for name, count in node.tally.items():
            total[name] = total.get(name, 0) + count
    assert total == tally


def test_the_emitted_module_has_the_shape_and_the_counts_of_the_graph(op, tmp_path):
    model = tokenmix.load(spec_of(tmp_path, op))
    verify(model.graph)
    graph = model.elaborate()
    module = tokenmix.build(model).double().eval()
    with torch.no_grad():
        result = module(torch.randn(2, *X, dtype=torch.float64))
    output = graph.outputs[0]
    expected = (output.dims[0], *output.dims[1:]) if output.kind == "map" else output.layout
    assert tuple(result.shape) == (2, *expected)
    assert sum(p.numel() for p in module.parameters()) == graph.num_params
    outcome = audit(model, X[1:])
    assert outcome.findings == [] and outcome.analytic == graph.count(CONVENTIONS["fvcore"])


def test_every_op_is_documented_and_named_after_its_file(op):
    found = find_op(op)
    assert found.name == op and len(found.doc) > 20
    for declared in found.signature.inputs:
        assert set(declared.kinds) <= set(KINDS)


def test_state_dict_keys_are_the_names_of_the_graph(op, tmp_path):
    model = tokenmix.load(spec_of(tmp_path, op))
    module = tokenmix.build(model)
    named = {
        (f"{path}.{weight}" if weight else path): shape
        for _, path, node, reused in model.elaborate().walk()
        if not reused
        for weight, shape in node.weights.items()
    }
    assert {k: tuple(v.shape) for k, v in module.named_parameters()} == named


def test_an_unknown_tally_is_refused():
    from tokenmix.blocks.cost import Tally

    with pytest.raises(KeyError):
        Tally(nonsense=1)
    assert all(TALLIES.values()) and math.prod(X) == 210
    assert isinstance(tokenmix.load("mixformer_b0").elaborate(), BlockGraph)
