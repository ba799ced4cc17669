"""The references against the dossiers: sizes, names, costs and the worked examples.

Numbers come from architectures/mixformer.md, architectures/atmnet.md, targets/mixformer.yaml and targets/atmnet.yaml.
"""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import atmnet, mixformer

# variant: parameters, the same plus BN running statistics, multiply-adds at 224 (macs_conv_linear_matmul)
MIXFORMER_CLASSIFIER = {
    "B0": (5_098_767, 5_105_411, 402_169_668),
    "B1": (7_887_877, 7_896_737, 698_596_064),
    "B2": (9_894_848, 9_906_408, 897_987_200),
    "B3": (16_747_808, 16_762_556, 1_804_057_136),
    "B4": (34_797_572, 34_820_692, 3_475_237_888),
    "B5": (61_692_403, 61_721_575, 6_689_476_064),
    "B6": (119_505_054, 119_561_766, 12_561_810_368),
}
# mask_rcnn rows, backbone_only.params
MIXFORMER_DENSE_PARAMS = {"B1": 6_278_365, "B2": 8_285_336, "B3": 14_974_680, "B4": 32_860_828}
# variant: parameters, dense parameters, state dict entries, multiply-adds at 224 (no_norm)
ATMNET = {
    "xT": (15_349_128, 14_837_152, 230, 2_168_136_704),
    "T": (27_152_232, 26_640_256, 394, 3_954_178_816),
    "S": (38_631_448, 38_119_472, 576, 6_888_182_016),
    "B": (52_154_792, 51_642_816, 835, 10_112_901_888),
    "L": (76_238_032, 75_470_376, 694, 12_347_929_344),
}
ATMNET_OFFSET_BLOCKS = {
    "xT": [[0], [0], [0, 2], [0]],
    "T": [[0], [0], [0, 2, 4, 6, 8], [0]],
    "S": [[0], [0], [0, 6, 12], [0]],
    "B": [[0], [0, 6], [0, 6, 12, 18, 24], [0]],
    "L": [[0], [0], [0, 6, 12, 18], [0]],
}
# section 3 of the ATMNet dossier, X = [1, 2, 3, 4, 5]
SAMPLE_POINTS = [-2, -1, -0.75, -0.25, 0, 0.5, 1.25, 3.75, 4, 4.25, 4.999, 5, 5.5]
SAMPLE_VALUES = [0, 0, 0.25, 0.75, 1, 1.5, 2.25, 4.75, 5, 3.75, 0.005, 0, 0]
SAMPLE_SLOPES = [0, 1, 1, 1, 1, 1, 1, 1, -5, -5, -5, 0, 0]
SAMPLERS = [atmnet.sample_axis, atmnet.sample_axis_loops]


@functools.cache
def meta_mixformer(name: str, **options: bool) -> mixformer.MixFormer:
    with torch.device("meta"):
        return mixformer.MixFormer(**mixformer.VARIANTS[name], **options).eval()


@functools.cache
def meta_atmnet(name: str, **options: bool) -> atmnet.ATMNet:
    with torch.device("meta"):
        return atmnet.ATMNet(**atmnet.VARIANTS[name], **options).eval()


def tiny_mixformer(**options: object) -> mixformer.MixFormer:
    torch.manual_seed(0)
    model = mixformer.MixFormer((16, 32, 32, 48), (1, 1, 2, 1), (1, 2, 2, 3), num_classes=5, **options)
    return randomised(model)


def tiny_atmnet(**options: object) -> atmnet.ATMNet:
    torch.manual_seed(0)
    model = atmnet.ATMNet((8, 8, 16, 16), (2, 2, 4, 2), (2, 2, 2, 2), (2, 4, 4, 8), 2, num_classes=5, **options)
    return randomised(model)


def randomised(model: nn.Module) -> nn.Module:
    """Every parameter and statistic away from 0 and 1, so that no term of a formula can hide."""
    for entry in model.state_dict().values():
        if entry.is_floating_point():
            entry.copy_(torch.randn_like(entry) * 0.25)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.copy_(torch.rand_like(module.running_var) + 0.5)
    return model.double().eval()


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def macs(model: nn.Module, height: int, width: int) -> int:
    """Multiply-adds of convolutions, linears and matrix products in one forward pass, batch 1, whatever the weights."""
    # on the CPU with unset memory: tracing on the meta device takes four times as long
    model = copy.deepcopy(model).to_empty(device="cpu")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, 3, height, width))
    flops = counter.get_total_flops()
    assert flops % 2 == 0
    return flops // 2


# --- MixFormer


def mixformer_macs(name: str, height: int, width: int, dense: bool) -> int:
    """Multiply-adds by the closed form of dossier section 2; windows count at the padded size, the MLP does not."""
    dims, depths = mixformer.VARIANTS[name]["dims"], mixformer.VARIANTS[name]["depths"]
    H, W = -(-height // 4), -(-width // 4)
    half = dims[0] // 2
    total = 4 * H * W * (27 * half + 2 * 9 * half * half) + H * W * 4 * half * dims[0]
    for stage, (C, blocks) in enumerate(zip(dims, depths, strict=True)):
        D, s = C // 2, C // 16
        padded = -(-H // 7) * 7 * -(-W // 7) * 7
        mix = 15 * C * C // 4 + 9 * C + 49 * C + D * s + s
        total += blocks * (padded * mix + H * W * 8 * C * C + C * C // 8 + C // 8 * D)
        if stage < 3:
            H, W = H // 2, W // 2
            total += H * W * 4 * C * dims[stage + 1]
    return total if dense else total + H * W * dims[3] * 1280 + 1280 * 1000


@pytest.mark.parametrize("name", mixformer.VARIANTS)
def test_mixformer_classifier_has_the_published_size_and_cost(name: str) -> None:
    model = meta_mixformer(name)
    params, params_and_statistics, expected_macs = MIXFORMER_CLASSIFIER[name]
    statistics = sum(buffer.numel() for key, buffer in model.named_buffers() if "running_" in key)
    assert num_params(model) == params
    assert num_params(model) + statistics == params_and_statistics
    # the trace is taken small, where few windows are looped over
    assert mixformer_macs(name, 224, 224, dense=False) == expected_macs
    assert macs(model, 30, 64) == mixformer_macs(name, 30, 64, dense=False)


def test_mixformer_traced_cost_counts_every_window_at_its_padded_size() -> None:
    assert mixformer_macs("B1", 800, 1280, dense=True) == 14_514_483_956
    assert mixformer_macs("B4", 512, 2048, dense=True) == 77_106_325_904
    model = meta_mixformer("B1")
    assert macs(model, 224, 224) == 698_596_064
    assert macs(model, 158, 223) == mixformer_macs("B1", 158, 223, dense=False)


@pytest.mark.parametrize("name", MIXFORMER_DENSE_PARAMS)
def test_mixformer_dense_backbone_has_the_published_size(name: str) -> None:
    assert num_params(meta_mixformer(name, dense=True)) == MIXFORMER_DENSE_PARAMS[name]


@pytest.mark.parametrize("name", mixformer.VARIANTS)
def test_mixformer_state_dict_has_the_released_number_of_entries(name: str) -> None:
    keys = meta_mixformer(name).state_dict().keys()
    num_blocks = sum(mixformer.VARIANTS[name]["depths"])
    released = [key for key in keys if not key.endswith("num_batches_tracked")]
    # the released files also hold one relative_position_index per block
    assert len(released) + num_blocks == 52 * num_blocks + 46
    if name == "B1":
        assert len(released) + num_blocks == 826


def test_mixformer_state_dict_has_the_released_names_and_shapes() -> None:
    C0, C, D, h = 32, 64, 32, 4  # B1, block in stage 1
    batch_norm = ("weight", "bias", "running_mean", "running_var")
    expected = {
        "patch_embed.stem.0.weight": (C0 // 2, 3, 3, 3),
        "patch_embed.stem.6.weight": (C0 // 2, C0 // 2, 3, 3),
        "patch_embed.proj.weight": (C0, C0 // 2, 2, 2),
        "patch_embed.norm.weight": (C0,),
        "layers.0.downsample.reduction.weight": (C, C0, 2, 2),
        "norm.weight": (256,),
        "last_proj.weight": (1280, 256),
        "head.weight": (1000, 1280),
        **{f"patch_embed.stem.7.{part}": (C0 // 2,) for part in batch_norm},
        **{f"layers.0.downsample.norm.{part}": (C0,) for part in batch_norm},
    }
    block = {
        "norm1.weight": (C,),
        "norm2.bias": (C,),
        "attn.relative_position_bias_table": (169, h),
        "attn.proj_attn.weight": (D, C),
        "attn.proj_attn_norm.weight": (D,),
        "attn.proj_cnn.weight": (C, C),
        "attn.proj_cnn_norm.weight": (C,),
        "attn.dwconv3x3.0.weight": (C, 1, 3, 3),
        "attn.channel_interaction.0.weight": (C // 8, C, 1, 1),
        "attn.channel_interaction.3.weight": (D, C // 8, 1, 1),
        "attn.projection.weight": (D, C, 1, 1),
        "attn.qkv.weight": (3 * D, D),
        "attn.spatial_interaction.0.weight": (C // 16, D, 1, 1),
        "attn.spatial_interaction.3.weight": (1, C // 16, 1, 1),
        "attn.attn_norm.weight": (D,),
        "attn.proj.weight": (C, C),
        "mlp.fc1.weight": (4 * C, C),
        "mlp.fc2.weight": (C, 4 * C),
        **{f"attn.dwconv3x3.1.{part}": (C,) for part in batch_norm},
        **{f"attn.channel_interaction.1.{part}": (C // 8,) for part in batch_norm},
        **{f"attn.conv_norm.{part}": (D,) for part in batch_norm},
        **{f"attn.spatial_interaction.1.{part}": (C // 16,) for part in batch_norm},
    }
    expected.update({f"layers.1.blocks.1.{key}": shape for key, shape in block.items()})
    state = meta_mixformer("B1").state_dict()
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert "layers.3.downsample.norm.weight" not in state


def test_position_bias_row_of_a_key_pair_follows_the_formula() -> None:
    index = mixformer.relative_position_index(7)
    assert (index[0][0], index[0][1], index[0][7]) == (84, 83, 71)
    assert sorted({row for rows in index for row in rows}) == list(range(169))


def test_position_bias_selects_the_right_hand_neighbour() -> None:
    block = mixformer.MixingAttention(16, heads=1, window=7, kernel=3)
    with torch.no_grad():
        block.relative_position_bias_table.zero_()
        block.relative_position_bias_table[83] = 100.0
    v = torch.arange(2 * 7 * 14, dtype=torch.float32).reshape(1, 2, 7, 14)
    zero = torch.zeros_like(v)
    out = mixformer.window_attention(zero, zero, v, block.position_bias(), 7)
    inner = [column for column in range(14) if column % 7 != 6]
    torch.testing.assert_close(out[..., inner], v[..., [column + 1 for column in inner]])


def test_window_loop_equals_a_reshape_partition() -> None:
    torch.manual_seed(0)
    B, h, d, H, W, w = 2, 3, 4, 14, 21, 7
    bias = torch.randn(h, w * w, w * w, dtype=torch.float64)
    maps = [torch.randn(B, h * d, H, W, dtype=torch.float64) for _ in range(3)]
    tokens = [
        x.reshape(B, h, d, H // w, w, W // w, w).permute(0, 3, 5, 1, 4, 6, 2).reshape(-1, h, w * w, d) for x in maps
    ]
    fused = F.scaled_dot_product_attention(*tokens, attn_mask=bias)
    fused = fused.reshape(B, H // w, W // w, h, w, w, d).permute(0, 3, 6, 1, 4, 2, 5).reshape(B, h * d, H, W)
    torch.testing.assert_close(mixformer.window_attention(*maps, bias, w), fused)


def test_mixformer_padded_tokens_take_part_in_attention() -> None:
    model = tiny_mixformer()
    block = model.layers[0].blocks[0]
    seen = []
    block.attn.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x = torch.randn(1, 16, 8, 10, dtype=torch.float64)
    out = block(x)
    assert out.shape == x.shape
    assert seen[0].shape == (1, 16, 14, 14)
    assert seen[0][:, :, 8:].abs().sum() == 0 and seen[0][:, :, :, 10:].abs().sum() == 0
    assert seen[0][:, :, :8, :10].abs().min() > 0


@pytest.mark.parametrize(("height", "width"), [(60, 60), (64, 60), (65, 64), (92, 64)])
def test_mixformer_refuses_sizes_that_leave_an_odd_map(height: int, width: int) -> None:
    with pytest.raises(ValueError, match="even map"):
        meta_mixformer("B0")(torch.empty(1, 3, height, width, device="meta"))


def test_mixformer_pads_61_to_64_with_zeros_right_and_bottom() -> None:
    model = tiny_mixformer()
    images = torch.randn(1, 3, 61, 63, dtype=torch.float64)
    torch.testing.assert_close(model(images), model(F.pad(images, (0, 1, 0, 3))))


def test_mixformer_features_are_the_stage_outputs_before_downsampling() -> None:
    features = meta_mixformer("B1", dense=True)(torch.empty(1, 3, 94, 125, device="meta"))
    sizes = [(24, 32), (12, 16), (6, 8), (3, 4)]
    assert [tuple(x.shape) for x in features] == [
        (1, C, *size) for C, size in zip((32, 64, 128, 256), sizes, strict=True)
    ]
    plain, dense = tiny_mixformer(), tiny_mixformer(dense=True)
    dense.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 32, dtype=torch.float64)
    for x, normed, norm in zip(plain.forward_features(images), dense(images), dense.norms, strict=True):
        torch.testing.assert_close(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), normed)
    pooled = F.gelu(plain.last_proj(plain.norm(plain.forward_features(images)[3].flatten(2).transpose(1, 2)))).mean(1)
    torch.testing.assert_close(plain(images), plain.head(pooled))


def test_mixformer_trains_and_every_parameter_gets_a_gradient() -> None:
    model = tiny_mixformer(drop_path=0.0).train()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# --- ATMNet


def atmnet_macs(name: str, side: int) -> int:
    """Multiply-adds by the closed form of dossier section 8 without its LayerNorm terms, square image."""
    config = atmnet.VARIANTS[name]
    channels = config["channels"]
    side = (side + 1) // 4
    total = 147 * channels[0] * side * side
    for stage, (C, N, E) in enumerate(zip(channels, config["blocks"], config["mlp_ratios"], strict=True)):
        n, S, G = side * side, config["channels_per_offset"][stage], len(ATMNET_OFFSET_BLOCKS[name][stage])
        total += N * C * C * (4 + 2 * E) * n + N * C * C + G * n * 2 * C * C // S + 9 * G * C * n
        if stage < 3:
            side = (side + 1) // 2
            total += 9 * C * channels[stage + 1] * side * side
    return total + 1000 * channels[3]


@pytest.mark.parametrize("name", atmnet.VARIANTS)
def test_atmnet_has_the_published_size_and_cost(name: str) -> None:
    params, dense_params, entries, expected_macs = ATMNET[name]
    model = meta_atmnet(name)
    assert num_params(model) == params
    assert num_params(meta_atmnet(name, dense=True)) == dense_params
    assert len(model.state_dict()) == entries
    assert atmnet_macs(name, 224) == expected_macs
    assert macs(model, 66, 66) == atmnet_macs(name, 66)


@pytest.mark.parametrize("name", atmnet.VARIANTS)
def test_atmnet_offset_layers_sit_in_the_listed_blocks(name: str) -> None:
    model = meta_atmnet(name)
    found = [[j for j, block in enumerate(stage) if block.offset_layer is not None] for stage in model.blocks]
    assert found == ATMNET_OFFSET_BLOCKS[name]


def test_atmnet_state_dict_has_the_released_names_and_shapes() -> None:
    C, S, E = 320, 4, 4  # T, stage 2
    expected = {
        "patch_embed.proj.weight": (64, 3, 7, 7),
        "blocks.2.8.norm1.weight": (C,),
        "blocks.2.8.norm2.bias": (C,),
        "blocks.2.8.atm.atm_c.weight": (C, C),
        "blocks.2.8.atm.atm_h.weight": (C, C, 1, 1),
        "blocks.2.8.atm.atm_w.bias": (C,),
        "blocks.2.8.atm.fusion.fc1.weight": (C // 4, C),
        "blocks.2.8.atm.fusion.fc2.weight": (3 * C, C // 4),
        "blocks.2.8.atm.proj.weight": (C, C),
        "blocks.2.8.mlp.fc1.weight": (E * C, C),
        "blocks.2.8.mlp.fc2.weight": (C, E * C),
        "blocks.2.8.offset_layer.0.weight": (C,),
        "blocks.2.8.offset_layer.1.weight": (2 * C // S, C),
        "blocks.2.9.downsample.proj.weight": (512, C, 3, 3),
        "pos_blocks.2.proj.weight": (C, 1, 3, 3),
        "norm.weight": (512,),
        "head.weight": (1000, 512),
    }
    state = meta_atmnet("T").state_dict()
    assert {key: tuple(state[key].shape) for key in expected} == expected
    absent = ["blocks.2.8.atm.atm_c.bias", "blocks.2.9.offset_layer.0.weight", "blocks.3.2.downsample.proj.weight"]
    assert not [key for key in absent if key in state]
    dense = meta_atmnet("T", dense=True).state_dict()
    assert [f"norm_{i}.weight" in dense for i in range(4)] == [True] * 4
    assert "norm.weight" not in dense and "head.weight" not in dense


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("axis", [2, 3])
def test_sampling_gives_the_worked_example_and_its_slopes(sampler, axis: int) -> None:
    # one batch entry per sampling point, all read at index 0, so that p equals the offset
    line = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0], dtype=torch.float64)
    x = line.reshape(1, 1, 5, 1).expand(len(SAMPLE_POINTS), 1, 5, 1)
    offsets = torch.zeros(len(SAMPLE_POINTS), 1, 5, 1, dtype=torch.float64)
    offsets[:, 0, 0, 0] = torch.tensor(SAMPLE_POINTS, dtype=torch.float64)
    if axis == 3:
        x, offsets = x.transpose(2, 3), offsets.transpose(2, 3)
    offsets = offsets.clone().requires_grad_()
    y = sampler(x, offsets, axis)[:, 0, 0, 0]
    torch.testing.assert_close(y, torch.tensor(SAMPLE_VALUES, dtype=torch.float64))
    (slopes,) = torch.autograd.grad(y.sum(), offsets)
    torch.testing.assert_close(slopes[:, 0, 0, 0], torch.tensor(SAMPLE_SLOPES, dtype=torch.float64))


def random_sampling_case(axis: int) -> tuple[Tensor, Tensor, Tensor]:
    """Map, offsets (some of them whole numbers, some far outside) and upstream gradient, (2, 2, 3, 4) each."""
    torch.manual_seed(axis)
    x, offsets, upstream = (torch.randn(2, 2, 3, 4, dtype=torch.float64) for _ in range(3))
    offsets = offsets * 3
    offsets[0, 0] = offsets[0, 0].round()
    offsets[1, 1, 0] = torch.tensor([-50.0, 50.0, 1e6, -1e6])
    return x, offsets, upstream


@pytest.mark.parametrize("axis", [2, 3])
def test_vectorised_sampling_equals_the_loops_with_gradients(axis: int) -> None:
    x, offsets, upstream = random_sampling_case(axis)
    results = []
    for sampler in SAMPLERS:
        inputs = (x.clone().requires_grad_(), offsets.clone().requires_grad_())
        y = sampler(*inputs, axis)
        results.append((y.detach(), *torch.autograd.grad(y, inputs, upstream)))
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("axis", [2, 3])
def test_sampling_gradients_follow_the_written_formulas(axis: int) -> None:
    x, offsets, upstream = random_sampling_case(axis)
    x.requires_grad_()
    offsets.requires_grad_()
    got = torch.autograd.grad(atmnet.sample_axis(x, offsets, axis), (x, offsets), upstream)
    x, offsets = x.detach(), offsets.detach()
    grad_x, grad_offsets = torch.zeros_like(x), torch.zeros_like(offsets)
    for b, c, i, j in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        p = (i if axis == 2 else j) + offsets[b, c, i, j].item()
        low = int(p // 1)
        f = p - low
        for index, weight, sign in ((low, 1 - f, -1), (low + 1, f, 1)):
            if 0 <= index < x.shape[axis]:
                at = (b, c, index, j) if axis == 2 else (b, c, i, index)
                grad_x[at] += upstream[b, c, i, j] * weight
                grad_offsets[b, c, i, j] += upstream[b, c, i, j] * sign * x[at]
    torch.testing.assert_close(got, (grad_x, grad_offsets))


@pytest.mark.parametrize("axis", [2, 3])
def test_sampling_passes_gradcheck_away_from_integers(axis: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    whole = torch.randint(-5, 6, (2, 2, 3, 4))
    offsets = (whole + 0.1 + 0.8 * torch.rand(2, 2, 3, 4, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: atmnet.sample_axis(a, b, axis), (x, offsets))


@pytest.mark.parametrize("axis", [2, 3])
def test_sampling_equals_bilinear_grid_sample_with_zero_padding(axis: int) -> None:
    torch.manual_seed(0)
    H, W = 5, 6
    x, offsets = torch.randn(2, 3, H, W, dtype=torch.float64), 2 * torch.randn(2, 3, H, W, dtype=torch.float64)
    rows = torch.arange(H, dtype=torch.float64).reshape(H, 1).expand_as(x)
    columns = torch.arange(W, dtype=torch.float64).expand_as(x)
    rows, columns = (rows + offsets, columns) if axis == 2 else (rows, columns + offsets)
    grid = torch.stack([2 * columns / (W - 1) - 1, 2 * rows / (H - 1) - 1], dim=-1)  # (2, 3, H, W, 2)
    expected = F.grid_sample(x.reshape(6, 1, H, W), grid.reshape(6, H, W, 2), align_corners=True)
    torch.testing.assert_close(atmnet.sample_axis(x, offsets, axis), expected.reshape(2, 3, H, W))


def test_one_offset_moves_its_consecutive_channels_and_horizontal_comes_first() -> None:
    torch.manual_seed(0)
    mixer = atmnet.ATM(12, channels_per_offset=4)
    x = torch.randn(1, 12, 3, 5)
    offsets = torch.zeros(1, 6, 3, 5)
    offsets[:, 1] = 1.0  # horizontal, channels 4..7
    offsets[:, 5] = -1.0  # vertical, channels 8..11
    x_w, x_h = mixer.sample(x, offsets)
    expected_w, expected_h = x.clone(), x.clone()
    expected_w[:, 4:8] = F.pad(x[:, 4:8, :, 1:], (0, 1))
    expected_h[:, 8:12] = F.pad(x[:, 8:12, :-1], (0, 0, 1, 0))
    torch.testing.assert_close((x_w, x_h), (expected_w, expected_h))


@pytest.mark.parametrize("branch", [0, 1, 2])
def test_fusion_weights_are_ordered_w_h_c(branch: int) -> None:
    torch.manual_seed(0)
    mixer = atmnet.ATM(8, channels_per_offset=2)
    x, offsets = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4, 5)
    with torch.no_grad():
        mixer.fusion.fc2.bias.copy_(torch.eye(3)[branch].repeat(8) * 1000)
    x_w, x_h = mixer.sample(x, offsets)
    branches = [mixer.atm_w(x_w), mixer.atm_h(x_h), F.conv2d(x, mixer.atm_c.weight[:, :, None, None])]
    expected = mixer.proj(branches[branch].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(mixer(x, offsets), expected)


@pytest.mark.parametrize(
    ("side", "sides"),
    [
        (224, (56, 28, 14, 7)),
        (225, (56, 28, 14, 7)),
        (226, (56, 28, 14, 7)),
        (227, (57, 29, 15, 8)),
        (130, (32, 16, 8, 4)),
        (384, (96, 48, 24, 12)),
    ],
)
def test_atmnet_map_sides(side: int, sides: tuple[int, ...]) -> None:
    model = meta_atmnet("xT", dense=True)
    maps = model(torch.empty(1, 3, side, 64, device="meta"))
    assert [x.shape[1] for x in maps] == [64, 128, 320, 512]
    assert tuple(x.shape[2] for x in maps) == sides
    assert [x.shape[3] for x in maps] == [16, 8, 4, 2]


def test_atmnet_position_encoders_run_before_each_offset_making_block() -> None:
    model = meta_atmnet("T")
    runs = []
    handles = [
        encoder.register_forward_hook(lambda *_, stage=stage: runs.append(stage))
        for stage, encoder in enumerate(model.pos_blocks)
    ]
    model(torch.empty(1, 3, 64, 64, device="meta"))
    for handle in handles:
        handle.remove()
    assert runs == [0, 1, 2, 2, 2, 2, 2, 3]


def test_atmnet_reuses_one_offset_tensor_and_sums_its_gradients() -> None:
    model = tiny_atmnet()
    seen = []
    for block in model.blocks[2]:
        block.atm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[1]))
    logits = model(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    assert seen[0] is seen[1] and seen[2] is seen[3] and seen[0] is not seen[2]
    (gradient,) = torch.autograd.grad(logits.sum(), seen[2])
    assert gradient.abs().sum() > 0


def test_atmnet_head_norms_before_the_mean_and_dense_outputs_are_normed_copies() -> None:
    plain, dense = tiny_atmnet(), tiny_atmnet(dense=True)
    dense.load_state_dict(plain.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 48, dtype=torch.float64)
    features = plain.forward_features(images)
    torch.testing.assert_close(plain(images), plain.head(plain.norm(features[3].flatten(2).transpose(1, 2)).mean(1)))
    norms = [dense.norm_0, dense.norm_1, dense.norm_2, dense.norm_3]
    for x, normed, norm in zip(features, dense(images), norms, strict=True):
        torch.testing.assert_close(norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2), normed)


def test_atmnet_trains_and_every_parameter_gets_a_gradient() -> None:
    model = tiny_atmnet().train()
    model(torch.randn(2, 3, 64, 64, dtype=torch.float64)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


# --- both


@pytest.mark.parametrize("reference", [mixformer, atmnet])
def test_drop_path_is_per_sample_rescaled_and_only_in_training(reference) -> None:
    torch.manual_seed(0)
    drop = reference.DropPath(0.25)
    x = torch.rand(4000, 2, 1, 1) + 1
    assert drop.eval()(x) is x
    ratio = (drop.train()(x) / x).flatten(1)
    assert torch.equal(ratio[:, 0] > 0, ratio[:, 1] > 0)
    kept = ratio[:, 0] > 0
    torch.testing.assert_close(ratio[kept], torch.full_like(ratio[kept], 1 / 0.75))
    assert abs(kept.float().mean().item() - 0.75) < 0.03


def test_drop_path_rates_grow_linearly_over_all_blocks() -> None:
    expected = [0.05 * index / 19 for index in range(20)]
    blocks = [block for stage in meta_mixformer("B2").layers for block in stage.blocks]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(expected)
    expected = [0.1 * index / 17 for index in range(18)]
    blocks = [block for stage in meta_atmnet("T").blocks for block in stage]
    assert [block.drop_path.rate for block in blocks] == pytest.approx(expected)


def test_initial_weights_have_the_stated_spread() -> None:
    torch.manual_seed(0)
    mixing = mixformer.MixFormer(**mixformer.VARIANTS["B1"])
    block = mixing.layers[3].blocks[0]
    assert block.mlp.fc1.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert block.attn.relative_position_bias_table.std().item() == pytest.approx(0.02, rel=0.1)
    # depth-wise: full input width, not divided by groups
    assert block.attn.dwconv3x3[0].weight.std().item() == pytest.approx((2 / (9 * 256)) ** 0.5, rel=0.1)
    active = atmnet.ATMNet(**atmnet.VARIANTS["xT"])
    assert active.blocks[2][0].atm.atm_w.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert active.blocks[0][0].atm.atm_w.bias.abs().sum().item() == 0
    assert active.pos_blocks[3].proj.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    assert active.patch_embed.proj.weight.std().item() == pytest.approx((2 / (49 * 64)) ** 0.5, rel=0.1)
