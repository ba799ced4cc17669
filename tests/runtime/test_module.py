"""Built modules behave as torch modules do."""

import copy
import pickle
import subprocess
import sys
import traceback

import pytest
import torch

import tokenmix

SMALL = ["mixformer_b0", "atmnet_xt"]


@pytest.fixture(scope="module", params=SMALL)
def module(request):
    torch.manual_seed(0)
    return tokenmix.build(request.param, num_classes=5).eval()


def test_batches_and_sizes_the_architecture_allows(module):
    with torch.no_grad():
        for batch, size in ((1, (32, 32)), (3, (61, 95)), (2, (96, 64))):
            assert module(torch.randn(batch, 3, *size)).shape == (batch, 5)


def test_a_size_the_architecture_does_not_take_is_refused_in_words():
    module = tokenmix.build("mixformer_b0", num_classes=5).eval()
    with pytest.raises(ValueError, match="even height and width"):
        module(torch.randn(1, 3, 60, 60))


def test_maps_have_strides_4_to_32_and_are_channels_first():
    for name, channels in (("mixformer_b0", (24, 48, 96, 192)), ("atmnet_xt", (64, 128, 320, 512))):
        maps = tokenmix.build(name, features_only=True).eval()(torch.randn(2, 3, 64, 96))
        assert [tuple(m.shape) for m in maps] == [
            (2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)
        ]


@pytest.mark.parametrize("name", SMALL)
def test_shapes_of_the_graph_are_those_of_the_run(name):
    model = tokenmix.load(name)
    module = tokenmix.build(model, features_only=True).eval()
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        # MixFormer takes sides of 32k - 3 to 32k, ATMNet any: these sizes are for both.
        size = [
            32 * int(torch.randint(1, 5, (), generator=generator)) - int(torch.randint(4, (), generator=generator))
            for _ in "HW"
        ]
        with torch.no_grad():
            maps = module(torch.randn(1, 3, *size))
        graph = model.elaborate(tuple(size), dense=True)
        assert [tuple(m.shape[1:]) for m in maps] == [output.dims for output in graph.outputs]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions(module, dtype):
    x = torch.randn(2, 3, 64, 64)
    other = copy.deepcopy(module).to(dtype)
    with torch.no_grad():
        result = other(x.to(dtype))
        truth = copy.deepcopy(module).double()(x.double())
    assert result.dtype == dtype
    assert (result.double() - truth).abs().max() < (1e-5 if dtype == torch.float64 else 0.1)


def test_mixed_precision(module):
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(module(torch.randn(2, 3, 64, 64))).all()


def test_a_training_step_reaches_every_weight(module):
    model = copy.deepcopy(module).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    model(torch.randn(2, 3, 64, 64)).square().sum().backward()
    optimiser.step()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_drop_path_is_drawn_in_training_only():
    torch.manual_seed(0)
    model = tokenmix.build("atmnet_xt", num_classes=5, drop_path=0.9)
    rates = [m.rate for m in model.modules() if type(m).__name__ == "DropPath"]
    assert rates[0] == 0 and rates[-1] == pytest.approx(0.9) and rates == sorted(rates)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert not torch.equal(model(x), model(x))
        assert torch.equal(model.eval()(x), model(x))


def test_meta_construction_allocates_nothing_and_can_be_filled(module):
    with torch.device("meta"):
        empty = tokenmix.build("mixformer_b0", num_classes=5)
    assert all(t.is_meta for t in (*empty.parameters(), *empty.buffers()))
    source = tokenmix.build("mixformer_b0", num_classes=5).eval()
    empty.load_state_dict(source.state_dict(), assign=True)
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(empty.eval()(x), source(x))


def test_initialisation_is_the_papers():
    torch.manual_seed(0)
    model = tokenmix.build("mixformer_b4")
    block = model.stages[3].blocks[0].attn
    assert block.proj.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attn.bias_table.std().item() == pytest.approx(0.02, rel=0.1)
    # Normal with std sqrt(2 / (k * k * Cin)), Cin not divided by the groups.
    assert block.dwconv.weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.05)
    assert block.projection.weight.std().item() == pytest.approx((2 / 512) ** 0.5, rel=0.02)
    assert block.proj.bias.abs().max() == 0 and block.dwconv.bias.abs().max() == 0
    model = tokenmix.build("atmnet_xt")
    body = model.stages[2].body
    # Normal with std sqrt(2 / (k * k * Cout / groups)).
    assert body.pos.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.05)
    assert model.stages[1].down.weight.std().item() == pytest.approx((2 / (9 * 128)) ** 0.5, rel=0.02)
    assert body.layers[0].atm.atm_w.weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_pickles_load_where_the_model_was_never_built(module, tmp_path):
    path, result = tmp_path / "model.pt", tmp_path / "result.pt"
    x = torch.randn(1, 3, 64, 64)
    torch.save((module, module.stages[1], x), path)
    code = (
        "import sys, torch\n"
        "model, stage, x = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.save((model.eval()(x), type(stage).__name__), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, path, result], check=True, capture_output=True)
    with torch.no_grad():
        ours = module(x)
    theirs, _ = torch.load(result)
    assert torch.allclose(ours, theirs.detach(), atol=1e-6)
    again = pickle.loads(pickle.dumps(module))
    assert type(again) is type(module) and again is not module


def test_tracebacks_show_the_emitted_lines():
    module = tokenmix.build("mixformer_b0").eval()
    try:
        module(torch.randn(1, 3, 60, 60))
    except ValueError:
        text = traceback.format_exc()
    assert 'raise ValueError("the map to be halved has an even height and width")' in text


def test_export_takes_dynamic_batches(module):
    x = torch.randn(2, 3, 64, 64)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},), strict=False)
    x = torch.randn(3, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(program.module()(x), module(x), atol=1e-5)


def test_one_graph_for_the_compiler(module):
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.allclose(compiled(x), module(x), atol=1e-5)


def test_wrong_arguments_of_build_are_told():
    with pytest.raises(tokenmix.FindingsError, match="did you mean `drop_path`"):
        tokenmix.build("mixformer_b0", drop_pth=0.1)
    with pytest.raises(tokenmix.FindingsError, match="TM1005"):
        tokenmix.build("mixformer_b9")
    with pytest.raises(TypeError):
        tokenmix.build(tokenmix.load("mixformer_b0"), window=5)


@pytest.mark.parametrize(("number", "error"), [(-1, ValueError), ("a", TypeError), (2.5, TypeError), (True, TypeError)])
def test_num_classes_is_held_against_the_parameter_of_the_spec(number, error):
    with pytest.raises(error, match=rf"`classes` of atmnet_xt, a whole number, at least 0; got {number!r}"):
        tokenmix.build("atmnet_xt", num_classes=number)


def test_num_classes_and_classes_are_not_both_given():
    with pytest.raises(TypeError, match="num_classes and classes say the same"):
        tokenmix.build("atmnet_xt", num_classes=3, classes=3)
    small = tokenmix.build("atmnet_xt", num_classes=torch.tensor(3).numpy()[()])  # an integer of numpy
    assert small.head.classifier.out_features == 3
