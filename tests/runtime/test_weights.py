"""Checkpoints as they are published, loaded completely: the models compute what the references compute."""

import copy
import json
import pickle
from argparse import Namespace

import numpy
import pytest
import torch
from torch.nn import functional as F

import tokenmix
from tests.families.keys import ATMNET, MIXFORMER, randomise, renamed
from tests.reference import atmnet, mixformer
from tests.runtime.released import CLASSES, OURS, SMALL, paddle_state
from tokenmix.compiler.layouts import read_layout, shipped_layouts
from tokenmix.compiler.spec import shipped_specs
from tokenmix.runtime.checkpoints import CheckpointError, WeightsError, read_checkpoint
from tokenmix.runtime.weights import Mismatch, convert_weights, load_weights

CLOSE = 1e-9
RULES = {"mixformer": MIXFORMER, "atmnet": ATMNET}
# Square, not square, odd; MixFormer takes sides of 32k - 3 to 32k.
SIZES = {"mixformer": [(64, 64), (64, 96), (61, 95)], "atmnet": [(64, 64), (40, 72), (35, 51)]}


def reference(family, dense=False, window=7, classes=11, **options):
    extra = {"window": window} if family == "mixformer" else {}
    made = CLASSES[family](**{**SMALL[family], **options}, **extra, num_classes=classes, dense=dense).double()
    randomise(made)
    return made.eval()


def ours(family, **options):
    dense = options.pop("features_only", False)
    model = tokenmix.load(family, **{**OURS[family], "classes": 11, **options})
    return tokenmix.build(model, features_only=dense).double().eval()


def write(family, made, path):
    """The checkpoint of a reference as its authors write it, in the file that they would publish."""
    if family == "mixformer":
        path = path / "model.pdparams"
        path.write_bytes(pickle.dumps(paddle_state(made, getattr(made.layers[0].blocks[0], "window", 7)), protocol=4))
    else:
        path = path / "model.pth"
        raw = {key: torch.zeros_like(tensor) for key, tensor in made.state_dict().items()}
        rest = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 299, "acc_max": 82.1}
        torch.save({"model": raw, "model_ema": made.state_dict(), "args": Namespace(lr=1e-3), **rest}, path)
    return path


def images(size, batch=2):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def close(a, b):
    return ((a - b).norm() / b.norm()).item() < CLOSE


@pytest.mark.parametrize("family", SMALL)
def test_scores_and_gradients_equal_the_reference_after_loading_its_checkpoint(family, tmp_path):
    made = reference(family)
    module = ours(family)
    report = load_weights(module, write(family, made, tmp_path))
    assert not report.problems and not report.adapted
    for size in SIZES[family]:
        x = images(size)
        with torch.no_grad():
            assert close(module(x), made(x)), size
    x, y = images(SIZES[family][2]).requires_grad_(), images(SIZES[family][2]).requires_grad_()
    module(x).square().sum().backward()
    made(y).square().sum().backward()
    assert close(x.grad, y.grad)
    gradients = {name: p.grad for name, p in module.named_parameters()}
    for name, parameter in made.named_parameters():
        mine = gradients[renamed(name, RULES[family])].reshape(parameter.shape)
        # A bias in front of a norm over its own axis has no gradient but rounding.
        assert (mine - parameter.grad).norm() < max(1e-8 * parameter.grad.norm(), 1e-10), name


@pytest.mark.parametrize("family", SMALL)
def test_every_stage_equals_the_reference_as_a_dense_backbone(family, tmp_path):
    if family == "atmnet":  # its authors publish dense backbones too: norm_0 to norm_3, no head
        made, allow = reference(family, dense=True), ()
        path = tmp_path / "dense.pth"
        torch.save(made.state_dict(), path)
    else:
        classifier = reference(family)
        made, allow = reference(family, dense=True), ("head.*", "norms.*")
        for norm in made.norms:
            norm.reset_parameters()
        made.load_state_dict(classifier.state_dict(), strict=False)
        path = write(family, classifier, tmp_path)
    module = ours(family, features_only=True)
    load_weights(module, path, allow=allow)
    for size in SIZES[family]:
        with torch.no_grad():
            maps, others = module(images(size)), made(images(size))
        assert len(maps) == len(others) == 4 and all(close(a, b) for a, b in zip(maps, others, strict=True))


@pytest.mark.parametrize(("family", "variant", "size"), [("mixformer", "B0", (61, 95)), ("atmnet", "xT", (35, 51))])
def test_shipped_variants_load_what_was_published(family, variant, size, tmp_path):
    variants = (mixformer if family == "mixformer" else atmnet).VARIANTS
    made = CLASSES[family](**variants[variant]).double().eval()
    randomise(made)
    module = tokenmix.build(f"{family}_{variant.lower()}").double().eval()
    report = load_weights(module, write(family, made, tmp_path))
    with torch.no_grad():
        assert close(module(images(size, 1)), made(images(size, 1)))
    counts = {kind: len(getattr(report, kind)) for kind in ("loaded", "transformed", "adapted", "fresh", "unused")}
    if family == "mixformer":
        # 826 entries: 52 per block and 46; 15 of them repeat the positions, and one more is bookkeeping.
        assert counts == {"loaded": 644, "transformed": 167, "adapted": 0, "fresh": 66, "unused": 16}
        assert all(left.name.endswith("num_batches_tracked") for left in report.fresh)
    else:
        assert counts == {"loaded": 210, "transformed": 20, "adapted": 0, "fresh": 0, "unused": 0}


def test_the_averaged_weights_are_preferred_and_others_can_be_chosen(tmp_path):
    made = reference("atmnet")
    path = write("atmnet", made, tmp_path)
    module = ours("atmnet")
    assert load_weights(module, path).entry == "model_ema"
    assert torch.equal(module.head.classifier.weight, made.head.weight)
    assert load_weights(module, path, entry="model").entry == "model"
    assert not module.head.classifier.weight.any()
    with pytest.raises(CheckpointError, match=r"no entry `model_em`.*did you mean `model_ema`"):
        load_weights(module, path, entry="model_em")


@pytest.mark.parametrize("family", SMALL)
def test_converted_files_load_as_our_own(family, tmp_path):
    path = write(family, reference(family), tmp_path)
    model = tokenmix.load(family, **OURS[family], classes=11)
    report = convert_weights(model, path, tmp_path / "ours.safetensors")
    module, other = ours(family), ours(family)
    load_weights(module, path)
    again = load_weights(other, tmp_path / "ours.safetensors")
    assert (report.layout, again.layout) == (next(iter(model.spec.layouts)), "tokenmix")
    assert not again.fresh and not again.unused and not again.transformed
    assert all(
        torch.equal(a, b) for a, b in zip(module.state_dict().values(), other.state_dict().values(), strict=True)
    )


def test_weights_that_stay_fresh_are_not_written(tmp_path):
    state = reference("atmnet").state_dict()
    del state["head.bias"]
    model = tokenmix.load("atmnet", **OURS["atmnet"], classes=11)
    report = convert_weights(model, state, tmp_path / "ours.safetensors", allow=["head.classifier.*"])
    assert [left.name for left in report.fresh] == ["head.classifier.bias"]
    written, _ = read_checkpoint(tmp_path / "ours.safetensors").state(None)
    assert set(ours("atmnet").state_dict()) - set(written) == {"head.classifier.bias"}


def test_other_classes_need_a_pattern_and_leave_the_head_fresh(tmp_path):
    made = reference("mixformer")
    path = write("mixformer", made, tmp_path)
    module = ours("mixformer", classes=5)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(Mismatch) as caught:
        load_weights(module, path)
    assert {p.name for p in caught.value.report.problems} == {"head.classifier.weight", "head.classifier.bias"}
    assert 'allow=["head.*"]' in str(caught.value)
    shapes = "the module's head.classifier.weight is [5, 1280]; the checkpoint's head.weight is [1280, 11]"
    assert f"{shapes}, transposed [11, 1280]" in str(caught.value)
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in before.items()), "half loaded"
    report = load_weights(module, path, allow=["head.classifier.*"])
    assert torch.equal(module.head.classifier.weight, before["head.classifier.weight"])
    assert torch.equal(module.head.last_proj.weight, made.last_proj.weight)
    assert [left.name for left in report.fresh][-2:] == ["head.classifier.weight", "head.classifier.bias"]
    assert report.fresh[-1].why == "allowed; the checkpoint's head.bias is [11]"


def test_a_missing_and_a_left_over_entry_are_told_with_the_nearest_name():
    state = reference("atmnet").state_dict()
    state["blocks.0.0.norm_1.weight"] = state.pop("blocks.0.0.norm1.weight")
    module = ours("atmnet")
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(Mismatch) as caught:
        load_weights(module, state, layout="official")
    messages = [problem.message for problem in caught.value.report.problems]
    assert messages == [
        "stages.0.body.layers.0.norm1.weight [16] is not in the checkpoint",
        "blocks.0.0.norm_1.weight [16] has no place in the module",
    ]
    assert all(torch.equal(module.state_dict()[key], tensor) for key, tensor in before.items())


def test_the_report_says_everything_in_words_and_in_json(tmp_path):
    report = load_weights(ours("atmnet"), write("atmnet", reference("atmnet"), tmp_path))
    first = "stages.0.body.layers.0.atm"
    assert str(report).split("\n") == [
        f"{tmp_path / 'model.pth'}, entry model_ema, layout atmnet_official",
        "  loaded        227",
        "  transformed    22",
        f"    reshaped: {first}.atm_w.weight, {first}.atm_h.weight, ... (22 in all)",
        "  adapted         0",
        "  fresh           0",
        "  unused          0",
    ]
    record = json.loads(json.dumps(report.as_dict()))
    assert record["transformed"][0] == {
        "name": "stages.0.body.layers.0.atm.atm_w.weight",
        "shape": [16, 16],
        "sources": ["blocks.0.0.atm.atm_w.weight"],
        "source_shapes": [[16, 16, 1, 1]],
        "how": "reshaped",
    }
    assert record["layout"] == "atmnet_official" and record["problems"] == []


# Adaptations


def test_position_tables_are_resized_to_another_window(tmp_path):
    made = reference("mixformer")
    path = write("mixformer", made, tmp_path)
    module = ours("mixformer", window=5)
    report = load_weights(module, path)
    table = made.layers[2].blocks[1].attn.relative_position_bias_table.detach()
    expected = F.interpolate(table.T.reshape(1, 4, 13, 13), size=(9, 9), mode="bicubic", align_corners=False)
    found = module.stages[2].blocks[1].attn.attn.bias_table
    assert torch.equal(found, expected.reshape(4, 81).T)
    assert len(report.adapted) == 5
    assert report.adapted[0].how == "resized bicubically, window 7 to 5"
    assert (report.adapted[0].source_shapes, report.adapted[0].shape) == (((169, 1),), (81, 1))
    with pytest.raises(Mismatch, match=r"bias_table is \[81, 1\]"):
        load_weights(module, path, adapt=False)


@pytest.mark.parametrize("channels", [1, 2, 4, 7])
def test_the_first_convolution_takes_other_images(channels, tmp_path):
    (tmp_path / "other.yaml").write_text(
        f"tokenmix: 1\nname: other\nextends: atmnet_xt\ninput: [{channels}, 64, 64]\nwith: {{classes: 3}}\n"
    )
    made = atmnet.ATMNet(**{**atmnet.VARIANTS["xT"], "num_classes": 3})
    randomise(made)
    module = tokenmix.build(tmp_path / "other.yaml")
    report = load_weights(module, made.state_dict())
    kernel = made.patch_embed.proj.weight
    assert [placed.name for placed in report.adapted] == ["stem.weight"]
    if channels == 1:
        torch.testing.assert_close(module.stem.weight, kernel.sum(1, keepdim=True))
    else:
        torch.testing.assert_close(
            module.stem.weight, torch.cat([kernel] * 3, 1)[:, :channels] * (3 / channels), rtol=1e-6, atol=1e-7
        )


def test_a_wrong_table_of_positions_is_refused():
    state = paddle_state(reference("mixformer"))
    state["layers.2.blocks.1.attn.relative_position_index"] = state[
        "layers.2.blocks.1.attn.relative_position_index"
    ].T.copy()
    with pytest.raises(Mismatch, match=r"layers\.2\.blocks\.1\.attn\.relative_position_index is not the table"):
        load_weights(ours("mixformer"), state)


# Which layout


def test_shipped_layouts_are_sound_and_named_by_a_family():
    named = {name for spec in shipped_specs() for name in tokenmix.load(spec).spec.layouts}
    findings = []
    assert all(read_layout(path, findings) for path in shipped_layouts().values()) and not findings
    assert named == set(shipped_layouts())


def test_auto_picks_by_names_and_says_which():
    module = ours("mixformer")
    assert load_weights(module, paddle_state(reference("mixformer"))).layout == "mixformer_paddle"
    assert load_weights(module, module.state_dict()).layout == "tokenmix"
    assert load_weights(module, {"model": module.state_dict(), "epoch": 3}).entry == "model"


def test_a_checkpoint_of_another_family_fits_no_layout():
    with pytest.raises(WeightsError) as caught:
        load_weights(ours("mixformer"), reference("atmnet").state_dict())
    text = str(caught.value)
    assert "fits no layout" in text and "mixformer_paddle" in text and "layouts of other families" in text
    assert "atmnet_official" in text and "patch_embed.proj.weight" in text


def test_a_part_of_a_checkpoint_is_told_by_what_it_lacks():
    module = ours("atmnet")
    state = module.state_dict()
    part = {key: state[key] for key in list(state)[:30]}
    for given in (part, dict(list(reference("atmnet").state_dict().items())[:30])):
        with pytest.raises(Mismatch) as caught:
            load_weights(module, given)
        text = str(caught.value)
        assert "is not in the checkpoint" in text and "Most weights are missing" in text
        assert "spec=" not in text and "allow=" not in text
    assert len(load_weights(module, part, allow=["*"]).loaded) == 30


def test_the_checkpoint_of_another_variant_gets_no_patterns_as_advice():
    module = tokenmix.build("mixformer_b0")
    with pytest.raises(Mismatch) as caught:
        load_weights(module, tokenmix.build("mixformer_b1").state_dict())
    text = str(caught.value)
    assert "the module's stem" in text and "another variant" in text and "allow=" not in text


@pytest.mark.parametrize("prefix", ["module.", "model.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrappers_are_left_out_and_told(prefix, tmp_path):
    module = ours("atmnet")
    for state, layout in ((ours("atmnet").state_dict(), "tokenmix"), (reference("atmnet").state_dict(), "official")):
        wrapped = {"state_dict": {prefix + key: tensor for key, tensor in state.items()}, "epoch": 3}
        torch.save(wrapped, tmp_path / "wrapped.pth")
        for name in ("auto", layout):
            report = load_weights(module, tmp_path / "wrapped.pth", name, entry="state_dict")
            assert report.prefix == prefix and f"without its prefix {prefix}" in str(report) and not report.fresh
        convert_weights(tokenmix.load("atmnet", **OURS["atmnet"], classes=11), wrapped, tmp_path / "ours.safetensors")
        assert set(read_checkpoint(tmp_path / "ours.safetensors").state(None)[0]) == set(module.state_dict())
    assert load_weights(module, module.state_dict()).prefix == ""


def test_a_prefix_that_some_entries_lack_stays():
    state = {f"module.{key}": tensor for key, tensor in ours("atmnet").state_dict().items()}
    with pytest.raises(WeightsError, match=r"fits no layout"):
        load_weights(ours("atmnet"), {**state, "queue": torch.zeros(3)})


def test_what_a_module_and_its_layers_share_is_no_prefix(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "tokenmix: 1\nname: one\ninput: [3, 8, 8]\nstages:\n  - {blocks: 'one_block()'}\n"
        "definitions: |\n  block one_block(x):\n      return x |> a: linear(C)\n"
    )
    module = tokenmix.build(tmp_path / "one.yaml")
    assert all(key.startswith("stages.0.blocks.0.") for key in module.state_dict())
    assert load_weights(module, module.state_dict()).prefix == ""
    wrapped = {f"module.{key}": tensor for key, tensor in module.state_dict().items()}
    assert load_weights(module, wrapped).prefix == "module."
    with pytest.raises(WeightsError) as caught:
        load_weights(module, {"a": torch.zeros(1)})
    assert "one names no `layouts`" in str(caught.value) and "spec=" not in str(caught.value)


def test_a_wrapped_module_is_filled_inside():
    module = ours("atmnet")
    state = ours("atmnet").state_dict()
    for wrapped in (torch.compile(module), torch.nn.DataParallel(module), torch.nn.DataParallel(torch.compile(module))):
        torch.nn.init.zeros_(module.stem.weight)
        assert len(load_weights(wrapped, state).loaded) == len(state)
        assert torch.equal(module.stem.weight, state["stem.weight"])


def test_values_that_are_not_finite_are_loaded_and_told(mine):
    module, state = mine
    state["patch.weight"][0, 0, 0, 0] = float("nan")
    state["block1.q.bias"][3] = float("inf")
    report = load_weights(module, state)
    assert report.not_finite == ("stem.weight", "stages.0.blocks.0.qk.bias")
    assert "  not finite      2\n    hold NaN or infinity: stem.weight, stages.0.blocks.0.qk.bias" in str(report)
    small = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in state.items() if key.startswith("patch")}
    assert load_weights(module, small, allow=["stages.*"]).not_finite == ("stem.weight",)


def test_a_module_of_its_own_needs_the_spec_for_the_familys_layouts():
    module = ours("atmnet")
    del module.tokenmix_spec
    state = reference("atmnet").state_dict()
    with pytest.raises(WeightsError, match=r"spec=\.\.\."):
        load_weights(module, state)
    assert load_weights(module, state, spec="atmnet_xt").layout == "atmnet_official"
    assert load_weights(module, state, "atmnet_official").layout == "atmnet_official"
    with pytest.raises(tokenmix.FindingsError, match="did you mean `atmnet_official`"):
        load_weights(module, state, "atmnet_offical")


def test_the_spec_is_remembered_through_copies_and_pickles():
    module = tokenmix.build("atmnet_xt", num_classes=3)
    assert copy.deepcopy(module).tokenmix_spec == pickle.loads(pickle.dumps(module)).tokenmix_spec == "atmnet_xt"
    assert "tokenmix_spec" not in module.state_dict()


SPEC = """tokenmix: 1
name: mine
input: [3, 16, 16]
stem: conv(out=8, kernel=4, stride=4, padding=0)
stages:
  - {blocks: mine, repeat: 2}
layouts: [theirs]
definitions: |
  block mine(x):
      q, k = x |> qk: linear(2 * C) |> split(2)
      y = q * k |> one: linear(C, bias = false)
      return x + (y |> two: linear(C, bias = false))
"""
LAYOUT = """layout: 1
state: [net]
keys:
  patch.*: stem.*
  block{i}.q.*: {to: "stages.0.blocks.{i-1}.qk.*", part: 0}
  block{i}.k.*: {to: "stages.0.blocks.{i-1}.qk.*", part: 1}
  block{i}.both:
    to: ["stages.0.blocks.{i-1}.one.weight", "stages.0.blocks.{i-1}.two.weight"]
    axis: 1
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.yaml").write_text(SPEC)
    (tmp_path / "layouts").mkdir()
    (tmp_path / "layouts" / "theirs.yaml").write_text(LAYOUT)
    module = tokenmix.build(tmp_path / "mine.yaml")
    state = {"patch.weight": torch.randn(8, 3, 4, 4), "patch.bias": torch.randn(8)}
    for i in (1, 2):
        for part in "qk":
            state |= {f"block{i}.{part}.weight": torch.randn(8, 8), f"block{i}.{part}.bias": torch.randn(8)}
        state[f"block{i}.both"] = torch.randn(8, 16)
    return module, state


def test_a_layout_of_ones_own_joins_and_splits(mine):
    module, state = mine
    report = load_weights(module, {"net": state, "step": 7})
    block = module.stages[0].blocks[1]
    assert torch.equal(block.qk.weight, torch.cat([state["block2.q.weight"], state["block2.k.weight"]]))
    assert torch.equal(block.qk.bias, torch.cat([state["block2.q.bias"], state["block2.k.bias"]]))
    assert torch.equal(torch.cat([block.one.weight, block.two.weight], 1), state["block2.both"])
    assert {placed.how for placed in report.transformed} == {"joined", "part 0 of 2", "part 1 of 2"}


def test_layouts_that_fit_equally_well_are_left_to_the_user(mine, tmp_path):
    module, state = mine
    (tmp_path / "again.yaml").write_text(LAYOUT)
    (tmp_path / "mine.yaml").write_text(SPEC.replace("[theirs]", "[theirs, again]"))
    with pytest.raises(WeightsError, match=r"several layouts equally well: theirs and again; choose"):
        load_weights(module, state)
    assert load_weights(module, state, "official").layout == "theirs"
    assert load_weights(module, state, "again").layout == "again"
    assert load_weights(module, state, str(tmp_path / "again.yaml")).layout == "again"


def test_names_in_a_report_cannot_steer_a_terminal(mine):
    module, state = mine
    report = load_weights(module, {**state, "\x1b[2Jx": torch.ones(1)}, allow=["*x"])
    assert "\x1b" not in str(report) and report.unused[0].name == "\x1b[2Jx"


def test_pieces_that_do_not_come_out_are_told(mine):
    module, state = mine
    del state["block1.k.bias"]
    state["block2.both"] = torch.randn(8, 15)
    with pytest.raises(Mismatch) as caught:
        load_weights(module, state)
    assert [problem.message for problem in caught.value.report.problems] == [
        "stages.0.blocks.0.qk.bias is joined from 2 entries; there are block1.q.bias",
        "block2.both does not split evenly into 2 weights",
        "block2.both does not split evenly into 2 weights",
    ]


# Dtypes, devices, sources


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_take_the_dtype_of_the_module(dtype, mine):
    module, state = mine
    load_weights(module.to(dtype), {key: tensor.double() for key, tensor in state.items()})
    assert module.stem.weight.dtype == dtype
    assert torch.equal(module.stem.weight, state["patch.weight"].to(dtype))


def test_numpy_arrays_of_any_making_are_taken(mine):
    module, state = mine
    arrays = {key: numpy.asfortranarray(tensor.numpy()).astype(">f8") for key, tensor in state.items()}
    arrays["patch.bias"].flags.writeable = False
    load_weights(module, arrays)
    assert torch.equal(module.stem.weight, state["patch.weight"])


def test_kinds_of_numbers_must_agree(mine):
    module, state = mine
    with pytest.raises(
        Mismatch, match=r"module's stem\.bias is torch\.float32; the checkpoint's patch\.bias is torch\.int64"
    ):
        load_weights(module, {**state, "patch.bias": torch.arange(8)})
    with pytest.raises(CheckpointError, match="holds no weights"):
        load_weights(module, {**state, "patch.bias": numpy.array(["a"] * 8)})
    with pytest.raises(CheckpointError, match="names of weights are texts"):
        load_weights(module, {3: torch.zeros(3)})
    with pytest.raises(CheckpointError, match="not from a int"):
        load_weights(module, 3)


def test_a_module_without_memory_is_refused(mine):
    _, state = mine
    with torch.device("meta"):
        module = tokenmix.build("atmnet_xt")
    with pytest.raises(WeightsError, match="meta device"):
        load_weights(module, state)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_values_go_to_the_device_of_the_module(mine):
    module, state = mine
    load_weights(module.cuda(), state)
    assert torch.equal(module.stem.weight.cpu(), state["patch.weight"])
