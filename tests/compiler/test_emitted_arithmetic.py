"""Numbers beside tensors, classes left out, sizes of every kind: the emitted module computes what the text says."""

import pytest
import torch

import tokenmix
from tokenmix.dsl.diagnostics import FindingsError


def model_of(folder, *lines, head="block probe(x; n: int = 4):", stages="  - {blocks: probe(n=n)}"):
    text = "tokenmix: 1\nname: probe\ninput: [4, 8, 6]\nparameters: {n: 4}\nstages:\n" + stages + "\ndefinitions: |\n"
    text += "".join(f"  {line}\n" for line in [head, *(f"    {line}" for line in lines)])
    path = folder / "probe.yaml"
    path.write_text(text)
    return tokenmix.load(path)


# H = 8, W = 6, N = 48, n = 4. Numbers that hold an operator of their own, on either side of every sign.
NUMBERS = {
    "n": 4,
    "n - 1": 3,
    "H - W": 2,
    "-n": -4,
    "n * (H - 3)": 20,
    "n // 3 - H": -7,
    "1 if n > 3 else 2": 1,
    "N / 5": 9.6,
    "1 if H / 3 > 2 else 2": 1,
    "max(H / 3, 1)": 8 / 3,
    "sqrt(H / 2)": 2,
    "0.5 * (H / 3)": 4 / 3,
}


@pytest.mark.parametrize("number", NUMBERS)
def test_number_keeps_its_value_beside_a_tensor(number, tmp_path):
    value = NUMBERS[number]
    forms = {
        f"x - ({number})": lambda x: x - value,
        f"({number}) - x": lambda x: value - x,
        f"x + ({number})": lambda x: x + value,
        f"x * ({number})": lambda x: x * value,
        f"x / ({number})": lambda x: x / value,
        f"2 * x - ({number}) - (x - ({number}))": lambda x: 2 * x - value - (x - value),
        f"({number}) - (x - ({number})) * 3": lambda x: value - (x - value) * 3,
    }
    x = torch.randn(2, 4, 8, 6, dtype=torch.float64)
    for form, expected in forms.items():
        model = model_of(tmp_path, f"y = {form}", "return concat(y, x |> a: linear(n - 3))")
        assert model.findings == (), form
        with torch.no_grad():
            result = tokenmix.build(model).double()(x)[:, :4]
        torch.testing.assert_close(result, expected(x), rtol=1e-12, atol=1e-12, msg=form)


# One variant of every family with a classifier.
CLASSIFIERS = (
    *("mixformer_b0", "atmnet_xt", "emsnet_xxtiny", "mat_1", "partialformer_b0", "resnet18", "resnet50", "mobilenetv2"),
    *("deit_t", "swin_t", "pvtv2_b0", "convnext_t", "poolformer_s12", "resnet50_mixing", "mobilenetv2_mixing"),
)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_classifier_can_do_without_classes(name):
    model = tokenmix.load(name, classes=0)
    with torch.device("meta"):
        module = tokenmix.build(model)
    assert sum(p.numel() for p in module.parameters()) == model.cost().params


def test_sizes_of_every_kind_have_names(tmp_path):
    model = model_of(
        tmp_path,
        "order = x |> token_order",
        "s = attention_scores(x, x; heads = 2)",
        "y = x |> to_tokens |> ordered(order;)",
        "return weighted(s, y;) |> to_map(H, W) |> a: linear(C)",
        "",
        stages="  - {blocks: probe(n=n)}",
        head="""block ordered(x, o):
      require o.N > 1, "more than one token"
      return gather_tokens(x, o) * (o.N - 40)

  block weighted(s, y):
      require s.M == y.N and s.h == 2, "one weight per token"
      return weighted_sum(s |> softmax, y) * (s.M - 40)

  block probe(x; n: int = 4):
      require n == 4""",
    )
    assert model.findings == ()
    assert tokenmix.build(model)(torch.randn(2, 4, 8, 6)).shape == (2, 4, 8, 6)


def test_number_of_a_loop_is_not_read_behind_it(tmp_path):
    model = model_of(
        tmp_path, "for j in 0..2:", "    x = x |> a: linear(C)", "    k = j + n", "return x |> b: linear(k * C)"
    )
    assert model.findings == () and model.cost().params == 2 * 20 + 20 * 4 + 20
    with pytest.raises(FindingsError, match="TM1702"):
        tokenmix.build(model)


def test_label_in_a_spec_is_a_name_and_is_borne(tmp_path):
    def findings(init):
        path = tmp_path / "labels.yaml"
        path.write_text(f"tokenmix: 1\nname: labels\nextends: mixformer_b0\ninit: {init}\n")
        return [f.id for f in tokenmix.load(path).findings]

    assert findings("{labels: {fc2: zeros()}}") == []
    assert findings("{labels: {fcc2: zeros()}}") == ["TM1207"]
    assert findings("""{labels: {'fc2" in [] or print("run") or "b': zeros()}}""") == ["TM1211"]
    assert findings("{labels: {fc2: normal(-1)}}") == ["TM1302"]
    assert findings("{conv: uniform(-1)}") == ["TM1302"]
    assert findings("{conv: constant(-1)}") == []
