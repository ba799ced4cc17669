"""Emission: definitions of every form become classes that run as the graph says."""

import ast
import re
import subprocess
import sys
import textwrap

import pytest
import torch

import tokenmix
from tokenmix.compiler.verify import verify
from tokenmix.runtime.module import class_name, import_source


def load(tmp_path, definitions, blocks="mixer()", *, head="", extra="", size=(12, 10), repeat=2):
    text = textwrap.dedent(
        f"""\
        tokenmix: 1
        name: probe
        input: [8, {size[0]}, {size[1]}]
        {extra}
        stages:
          - blocks: {blocks}
            repeat: {repeat}
        {head}
        definitions: |
        """
    ) + textwrap.indent(textwrap.dedent(definitions), "  ")
    path = tmp_path / "probe.yaml"
    path.write_text(text)
    return tokenmix.load(path)


def run(model, size=(12, 10)):
    """Build, check the parameters, run forward and backward; the result and the module."""
    assert model.findings == (), "\n".join(str(f) for f in model.findings)
    verify(model.graph)
    module = tokenmix.build(model).double()
    graph = model.elaborate()
    named = {
        (f"{path}.{weight}" if weight else path): shape
        for _, path, node, reused in graph.walk()
        if not reused
        for weight, shape in node.weights.items()
    }
    assert {k: tuple(p.shape) for k, p in module.named_parameters()} == named
    x = torch.randn(2, 8, *size, dtype=torch.float64)
    result = module(x)
    expected = model.elaborate(size).outputs[0]
    assert tuple(result.shape[1:]) == expected.dims
    result.sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    return result, module, x


def emitted_class(model, name):
    source = model.source()
    return source[source.index(f"class {name}(") :].split("\n\n\n")[0]


def test_an_if_that_goes_one_way_everywhere_leaves_no_trace(tmp_path):
    definitions = """
    block mixer(x; wide: bool = true):
        if wide:
            y = x |> linear(2 * C) |> back: linear(C)
        else:
            y = x |> narrow: linear(C)
        return x + y
    """
    model = load(tmp_path, definitions)
    run(model)
    text = emitted_class(model, "Mixer")
    assert "if" not in text and "narrow" not in text and "wide" not in text


def test_an_if_that_goes_both_ways_stays(tmp_path):
    definitions = """
    block mixer(x; wide: bool):
        if wide:
            y = x |> up: linear(2 * C) |> down: linear(C)
        else:
            y = x |> narrow: linear(C)
        return x + y
    """
    model = load(tmp_path, definitions, blocks="[mixer(wide=true), mixer(wide=false)]", repeat=4)
    _, module, _ = run(model)
    assert "if wide:" in emitted_class(model, "Mixer") and "if self.wide:" in emitted_class(model, "Mixer")
    assert hasattr(module.stages[0].blocks[0], "up") and not hasattr(module.stages[0].blocks[1], "up")


def test_an_if_on_the_input_size_is_decided_at_run_time(tmp_path):
    definitions = """
    block mixer(x):
        y = x |> linear(C)
        if H % 2 == 1 and W > 3:
            y = y |> gelu
        else:
            y = y |> relu
        return x + y
    """
    model = load(tmp_path, definitions)
    _, module, x = run(model)
    block = module.stages[0].blocks[0]
    for size, function in ((12, 10), torch.relu), ((11, 10), torch.nn.functional.gelu), ((11, 3), torch.relu):
        x = torch.randn(1, *size, 8, dtype=torch.float64)
        assert torch.equal(block(x), x + function(block.linear(x)))
    run(model, (11, 9))


def test_loops_become_module_lists_and_conditions_in_them_module_dicts(tmp_path):
    definitions = """
    block mixer(x; depth: int):
        for j in 0..depth:
            x = x |> layers: linear(C)
            if j % 2 == 0:
                x = x |> norms: layer_norm
        for i in 1..3:
            for j in 0..2:
                x = x |> grid: linear(C)
        return x
    """
    model = load(tmp_path, definitions, blocks="mixer(depth=3)")
    _, module, x = run(model)
    block = module.stages[0].blocks[0]
    keys = {k.rsplit(".", 1)[0] for k in block.state_dict()}
    assert keys == {
        "layers.0", "layers.1", "layers.2", "norms.0", "norms.2", "grid.1_0", "grid.1_1", "grid.2_0", "grid.2_1"
    }  # fmt: skip
    y = x.permute(0, 2, 3, 1)
    expected = block.norms["0"](block.layers[0](y))
    expected = block.norms["2"](block.layers[2](block.layers[1](expected)))
    for key in ("1_0", "1_1", "2_0", "2_1"):
        expected = block.grid[key](expected)
    assert torch.equal(block(y), expected)


def test_declared_modules_share_their_weights(tmp_path):
    definitions = """
    block half(x):
        return x |> linear(C)

    block mixer(x):
        module position = dwconv(3)
        module again = half()
        x = x + position(x)
        x = x + again(x) + position(x)
        return again(x)
    """
    model = load(tmp_path, definitions, repeat=1)
    _, module, x = run(model)
    block = module.stages[0].blocks[0]
    assert len(list(block.parameters())) == 4
    y = x.permute(0, 2, 3, 1)
    y = y + block.position(y)
    assert torch.allclose(block(x.permute(0, 2, 3, 1)), block.again(y + block.again(y) + block.position(y)))


def test_declared_modules_exist_only_where_they_are_used(tmp_path):
    definitions = """
    block mixer(x; k: int):
        module wide = linear(2 * C)
        module back = linear(C)
        if k > 2:
            x = wide(x) |> gelu |> narrow: linear(C)
        elif k == 2:
            x = wide(x) |> relu |> narrow: linear(C)
        for j in 0..k - 1:
            x = x |> layers: inner(j)
        return back(x) + x

    block inner(x; j: int):
        return x |> linear(C * (1 + j)) |> back: linear(C)
    """
    blocks = "[mixer(k=1), mixer(k=2), mixer(k=3)]"
    _, module, _ = run(load(tmp_path, definitions, blocks=blocks, repeat=3))
    assert [hasattr(block, "wide") for block in module.stages[0].blocks] == [False, True, True]
    run(load(tmp_path, definitions, blocks="mixer(k=1)"))


def test_weights_in_an_arm_that_depends_on_the_input_size_are_a_finding(tmp_path):
    definitions = """
    block mixer(x):
        if H % 2 == 0:
            x = x |> linear(C)
        return x
    """
    with pytest.raises(tokenmix.FindingsError, match="TM1702"):
        load(tmp_path, definitions).source()
    definitions = """
    block mixer(x):
        module mix = linear(C)
        if H % 2 == 0:
            x = mix(x) |> gelu
        else:
            x = mix(x)
        return x
    """
    run(load(tmp_path, definitions))


def test_blocks_take_and_give_several_tensors(tmp_path):
    definitions = """
    block pair(x, y; share: int):
        require y.C % share == 0, "y is shared evenly"
        z = y |> linear(2 * y.C / share)
        return x |> first: linear(C), z

    block mixer(x):
        y = x |> reduce: linear(C / 2)
        a, b = pair(x, y; share = 2)
        c, _ = pair(a, b; share = 4)
        return x + c
    """
    model = load(tmp_path, definitions, repeat=1)
    # The second result of the second pair goes nowhere.
    assert [f.id for f in model.findings] == [] or {f.id for f in model.findings} == {"TM1405"}


def test_one_block_on_maps_and_on_vectors_is_two_classes(tmp_path):
    definitions = """
    block tiny(x):
        return x |> batch_norm |> linear(C)

    block mixer(x):
        gate = x |> mean |> gate: tiny |> sigmoid
        return (x |> tiny) * gate
    """
    model = load(tmp_path, definitions)
    run(model)
    source = model.source()
    assert "class Tiny(" in source and "class TinyBlock(" in source
    assert "nn.BatchNorm1d(dim)" in source and " BatchNorm2d(dim)" in source


def test_words_choose_between_classes(tmp_path):
    definitions = """
    block mixer(x; bias: none | relative):
        return x |> qkv: linear(3 * C) |> inner(bias)

    block inner(x; bias: none | relative):
        q, k, v = x |> split(3)
        return window_attention(q, k, v; heads = 2, window = 2, bias = bias)
    """
    model = load(tmp_path, definitions, blocks="[mixer(bias=relative), mixer(bias=none)]")
    _, module, _ = run(model)
    assert module.stages[0].blocks[0].inner.window_attention.bias_table is not None
    assert module.stages[0].blocks[1].inner.window_attention.bias_table is None


def test_numbers_lists_and_functions_become_python(tmp_path):
    definitions = """
    block mixer(x; widths: [int], rate: rate = 0.1):
        hidden = max(widths) * C // 3 + len(widths)
        for j in 0..len(widths):
            x = x |> layers: wide(widths[j] if j > 0 else hidden, rate)
        return x

    block wide(x; hidden: int, rate: rate):
        y = x |> up: linear(2 * hidden) |> gelu |> drop_path(rate) |> down: linear(C)
        return x + y
    """
    model = load(tmp_path, definitions, blocks='"mixer(widths=[3, 5, 4])"')
    _, module, _ = run(model)
    layers = module.stages[0].blocks[0].layers
    assert [layer.up.out_features for layer in layers] == [2 * (5 * 8 // 3 + 3), 10, 8]


def test_a_number_that_depends_on_an_arm_stays_a_choice(tmp_path):
    definitions = """
    block mixer(x; wide: bool):
        hidden = C
        if wide:
            hidden = 2 * C
            y = x |> gelu
        else:
            y = x |> relu
        return x + (y |> up: linear(hidden) |> down: linear(C))
    """
    model = load(tmp_path, definitions, blocks="[mixer(wide=true), mixer(wide=false)]", repeat=3)
    _, module, _ = run(model)
    assert [block.up.out_features for block in module.stages[0].blocks] == [16, 8, 16]


def test_one_channel_gates_keep_the_width_of_what_they_gate(tmp_path):
    definitions = """
    block mixer(x; groups: int):
        gate = x |> pointwise(groups) |> sigmoid
        return gate * x |> linear(C)
    """
    model = load(tmp_path, definitions, blocks="mixer(groups=1)")
    run(model)
    assert "nn.Linear(dim, dim)" in model.source()


def test_several_ramps_are_written_out(tmp_path):
    definitions = """
    block mixer(x; drop: rate, inner: rate):
        y = x |> linear(C) |> drop_path(inner)
        return x + drop_path(y; drop)
    """
    model = load(tmp_path, definitions, blocks='"mixer(drop=ramp(0.2), inner=ramp(0.4))"', repeat=3)
    _, module, _ = run(model)
    assert [b.drop_path_2.rate for b in module.stages[0].blocks] == pytest.approx([0, 0.1, 0.2])
    assert [b.drop_path.rate for b in module.stages[0].blocks] == pytest.approx([0, 0.2, 0.4])
    model = load(tmp_path, definitions, blocks='"mixer(drop=ramp(0.2), inner=ramp(0.2) / 2)"', repeat=3)
    _, module, _ = run(model)
    assert [b.drop_path.rate for b in module.stages[0].blocks] == pytest.approx([0, 0.05, 0.1])


def test_labels_have_initial_weights_of_their_own(tmp_path):
    definitions = """
        block mixer(x):
            for j in 0..2:
                x = x |> steps: linear(C) |> gelu
            x = x |> dwconv(3) |> spread: conv(C, 3, groups = 2) |> last: inner |> linear(C)
            return x |> absent_minded: linear(C)

        block inner(x):
            return x |> layer_norm |> conv(C, 1)
    """
    labels = "{steps: zeros(), spread: constant(kernel * groups), last: constant(in_channels)}"
    extra = f"init: {{linear: constant(0.5), conv: constant(0.25), labels: {labels}}}"
    model = load(tmp_path, definitions, extra=extra)
    _, module, _ = run(model)
    for block in module.stages[0].blocks:
        found = {name: set(w.flatten().tolist()) for name, w in block.named_parameters() if name.endswith("weight")}
        assert found == {
            **{"steps.0.weight": {0}, "steps.1.weight": {0}, "dwconv.weight": {0.25}, "spread.weight": {6}},
            **{"last.layer_norm.weight": {1}, "last.conv.weight": {8}},
            **{"linear.weight": {0.5}, "absent_minded.weight": {0.5}},
        }
    model = load(tmp_path, definitions, extra=extra.replace("zeros()", "zero()"))
    assert [f.id for f in model.findings] == ["TM1206"]


def test_stages_without_blocks_and_models_without_head(tmp_path):
    path = tmp_path / "probe.yaml"
    path.write_text(
        "tokenmix: 1\nname: probe\nfeatures: layer_norm()\nstages:\n"
        "  - {blocks: gelu_conv(), repeat: 0}\n"
        "  - {down: 'conv(out=4, kernel=2, stride=2, padding=0)', blocks: gelu_conv(), repeat: 1}\n"
        "definitions: |\n  block gelu_conv(x):\n      return x |> dwconv(3) |> gelu\n"
    )
    maps = tokenmix.build(path, features_only=True)(torch.randn(2, 3, 8, 6))
    assert [tuple(m.shape) for m in maps] == [(2, 3, 8, 6), (2, 4, 4, 3)]
    assert tokenmix.build(path)(torch.randn(2, 3, 8, 6)).shape == (2, 4, 4, 3)


def test_exact_division_adds_up(tmp_path):
    definitions = """
    block mixer(x):
        a = x |> one: linear(C / 2)
        b = x |> two: linear(3 * C / 4)
        return concat(a, b, a) |> proj: linear(C)
    """
    model = load(tmp_path, definitions)
    run(model)
    assert "self.proj = nn.Linear(7 * dim // 4, dim)" in model.source()


@pytest.mark.parametrize("size", [(12, 10), (13, 7), (5, 11)])
def test_quotients_of_sizes_are_rounded_as_the_language_says(tmp_path, monkeypatch, size):
    definitions = """
    block mixer(x; patch: int = 3):
        y = x |> avg_pool(2) |> resize(ceil(H / patch), ceil((H + W) / (2 * patch)))
        y = y |> resize(floor(W / patch) + 2, 20 - H // patch)
        y = y |> resize(-(H // patch) + 20, ceil(H * W / 7))
        return y |> linear(C) |> resize(H, W)
    """
    model = load(tmp_path, definitions)
    H, W = size
    sizes = [n.outputs[0].dims[1:] for _, _, n, _ in model.elaborate(size).walk() if n.target.name == "resize"]
    truth = [(-(-H // 3), -(-(H + W) // 6)), (W // 3 + 2, 20 - H // 3), (20 - H // 3, -(-H * W // 7)), size]
    assert sizes == truth * 2
    text = emitted_class(model, "Mixer")
    for formula in ("-(-H // self.patch)", "-(-(H + W) // (2 * self.patch))", "-(H // self.patch) + 20"):
        assert formula in text
    run(model, size)
    module = tokenmix.build(model)
    emitted = sys.modules[type(module).__module__]
    asked, resize = [], emitted.resize

    def noted(x, height, width, mode):
        asked.append((height, width))
        return resize(x, height, width, mode)

    monkeypatch.setattr(emitted, "resize", noted)
    module(torch.randn(1, 8, *size))
    assert asked == truth * 2


def test_a_block_in_the_place_of_another_need_not_read_all_it_is_given(tmp_path):
    model = load(tmp_path, "block mlp(x; expand: int = 4):\n    return x\n", "mlp(expand=2)")
    assert model.findings == ()
    model = load(tmp_path, "block own_mlp(x; expand: int = 4):\n    return x\n", "own_mlp(expand=2)")
    assert [f.id for f in model.findings] == ["TM1207"]
    model = load(tmp_path, "block mlp(x; expand: int = 4, other: int = 1):\n    return x\n", "mlp(expand=2)")
    assert [f.message for f in model.findings] == ["the hyperparameter `other` is never used"]


def test_a_class_without_weights_has_no_constructor(tmp_path):
    model = load(tmp_path, "## Twice.\nblock mixer(x):\n    return x + x\n")
    assert emitted_class(model, "Mixer").splitlines()[:4] == [
        "class Mixer(nn.Module):", '    """Twice."""', "", "    def forward(self, x: Tensor) -> Tensor:"
    ]  # fmt: skip


def test_a_long_constructor_is_broken_into_lines(tmp_path):
    definitions = """
    block part(x; wide_first: int, wide_second: int, wide_third: int):
        return x |> linear(wide_first) |> linear(wide_second) |> linear(wide_third) |> back: linear(C)
    block mixer(x; ratio: [int] = [1, 2]):
        return x |> part: part(C * (ratio[0] + ratio[1]), C * (ratio[0] + 3 * ratio[1]), C * (3 * ratio[0] + ratio[1]))
    """
    model = load(tmp_path, definitions)
    run(model)
    assert max(map(len, model.source().splitlines())) <= 120
    assert "self.part = Part(\n            dim,\n            wide_first=" in emitted_class(model, "Mixer")


def test_weights_that_depend_on_the_input_size_are_a_finding(tmp_path):
    model = load(tmp_path, "block mixer(x):\n    return x |> linear(N / 15) |> linear(C)\n")
    assert model.findings == ()
    with pytest.raises(tokenmix.FindingsError) as caught:
        model.source()
    assert [f.id for f in caught.value.findings] == ["TM1702"]


def test_a_doc_comment_cannot_leave_its_docstring(tmp_path):
    definitions = '''
    ## Harmless""" + __import__("os").getcwd() + """ \\\\ and \\""" too
    block mixer(x):
        require C > 1, "a message with { braces } and \\" + 1"
        return x |> linear(C)
    '''.replace('\\"', "'")
    model = load(tmp_path, definitions)
    assert model.findings == ()
    tree = ast.parse(model.source())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    assert "__import__" not in names
    run(model)


SHIPPED = ["mixformer_b0", "mixformer_b4", "atmnet_xt", "atmnet_l", "emsnet_xxtiny"]


@pytest.mark.parametrize("name", SHIPPED)
def test_emitted_lines_are_clean_python(name):
    source = tokenmix.load(name).source()
    ast.parse(source)
    assert max(map(len, source.splitlines())) <= 120
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,I", "--line-length", "120", "-"],
        input=source, text=True, capture_output=True,
    )  # fmt: skip
    assert checked.returncode == 0, checked.stdout


@pytest.mark.parametrize("name", SHIPPED)
def test_a_standalone_source_needs_torch_only_and_computes_the_same(name, tmp_path):
    model = tokenmix.load(name)
    source = model.source(standalone=True)
    imported = {n.split(".")[0] for n in re.findall(r"^(?:from|import) (\S+)", source, re.M)}
    assert imported <= {*sys.stdlib_module_names, "torch"}
    usual = getattr(import_source(model.source(), name), class_name(model))
    alone = getattr(import_source(source, name), class_name(model))
    with torch.device("meta"):
        ours, other = usual(num_classes=3), alone(num_classes=3)
    ours, other = ours.to_empty(device="cpu"), other.to_empty(device="cpu")
    ours.init_weights()
    other.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        # Fast kernels sum in another order than the reference that a standalone source holds.
        torch.testing.assert_close(ours.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-5)


def test_emission_is_deterministic():
    assert tokenmix.load("mixformer_b4").source() == tokenmix.load("mixformer_b4").source()


def test_overrides_change_the_emitted_model():
    model = tokenmix.load("mixformer_b1", classes=10, drop_path=0.1, window=5)
    assert model.findings == ()
    module = tokenmix.build(model)
    assert module.head.classifier.out_features == 10
    assert module.stages[0].blocks[0].attn.attn.window == 5
    assert module.stages[3].blocks[5].drop_path.rate == pytest.approx(0.1)
    assert model.cost().params == sum(p.numel() for p in module.parameters())


LEARNED = """\
tokenmix: 1
name: learned
input: [6, 8, 8]
stages:
  - body: scaled(each=[0.25, 0.5])
init:
  labels: {token: normal(0.02)}
definitions: |
  block scaled(x; each: [float], first: float = 2):
      x = x * (one: parameter(C, first)) + (token: parameter(C, 0.0))
      for j in 0..2:
          x = x * (rows: parameter(C, each[j]))
          for i in 0..2:
              if i != j:
                  x = x * (table: parameter(C, 3))
      return x
"""


def test_learned_parameters_stand_in_loops_and_begin_where_they_are_told(tmp_path):
    path = tmp_path / "learned.yaml"
    path.write_text(LEARNED)
    model = tokenmix.load(path)
    assert model.findings == ()
    module = tokenmix.build(model)
    state = module.state_dict()
    assert {k.removeprefix("stages.0.body."): v.unique().tolist() for k, v in state.items() if "token" not in k} == {
        "one": [2.0],
        "rows.0": [0.25],
        "rows.1": [0.5],
        "table.0_1": [3.0],
        "table.1_0": [3.0],
    }
    assert 0 < state["stages.0.body.token"].abs().max() < 0.2
    with torch.device("meta"):
        empty = tokenmix.build(model)
    empty = empty.to_empty(device="cpu")
    for parameter in empty.parameters():
        torch.nn.init.constant_(parameter, float("nan"))
    empty.init_weights()
    assert all(torch.equal(v, state[k]) or "token" in k for k, v in empty.state_dict().items())
    assert all(v.isfinite().all() for v in empty.state_dict().values())
