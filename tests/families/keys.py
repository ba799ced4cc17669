"""State-dict keys of the naive references (which are those of the released code) against ours."""

import re

import torch
from torch import nn

MIXFORMER = [
    (r"patch_embed\.stem\.(\d)\.", lambda m: f"stem.{'conv' if int(m[1]) % 3 == 0 else 'norm'}{int(m[1]) // 3 + 1}."),
    (r"patch_embed\.proj\.", "stem.proj."),
    (r"patch_embed\.norm\.", "stem.norm."),
    (r"layers\.(\d)\.downsample\.", lambda m: f"stages.{int(m[1]) + 1}.down."),
    (r"layers\.(\d)\.", r"stages.\1."),
    (r"\.relative_position_bias_table", ".attn.bias_table"),
    (r"\.dwconv3x3\.0\.", ".dwconv."),
    (r"\.dwconv3x3\.1\.", ".dwconv_norm."),
    (r"\.channel_interaction\.0\.", ".channel_reduce."),
    (r"\.channel_interaction\.1\.", ".channel_norm."),
    (r"\.channel_interaction\.3\.", ".channel_expand."),
    (r"\.spatial_interaction\.0\.", ".spatial_reduce."),
    (r"\.spatial_interaction\.1\.", ".spatial_norm."),
    (r"\.spatial_interaction\.3\.", ".spatial_expand."),
    (r"^norm\.", "head.norm."),
    (r"^last_proj\.", "head.last_proj."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

ATMNET = [
    (r"^patch_embed\.proj\.", "stem."),
    (r"^blocks\.(\d)\.(\d+)\.downsample\.proj\.", lambda m: f"stages.{int(m[1]) + 1}.down."),
    (r"^blocks\.(\d)\.(\d+)\.offset_layer\.0\.", r"stages.\1.body.offset_layers.\2.norm."),
    (r"^blocks\.(\d)\.(\d+)\.offset_layer\.1\.", r"stages.\1.body.offset_layers.\2.offsets."),
    (r"^blocks\.(\d)\.(\d+)\.", r"stages.\1.body.layers.\2."),
    (r"^pos_blocks\.(\d)\.proj\.", r"stages.\1.body.pos."),
    (r"\.fusion\.fc", ".fusion_fc"),
    (r"^norm_(\d)\.", r"norms.\1."),
    (r"^norm\.", "head.norm."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

MAT = [
    (r"^stem\.(\w+)\.(\d)\.", lambda m: f"stem.{m[1]}{int(m[2]) + 1}."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.offset_dw\.", ".offset_conv."),
    (r"\.offset_pw\.", ".offset_proj."),
    (r"\.feature_dw\.", ".conv."),
    (r"\.pw\.", ".proj."),
    (r"_bn\.", "_norm."),
    (r"\.pw_norm\.", ".proj_norm."),
    (r"\.cpe\.", ".position."),
    (r"\.dw\.", ".dwconv."),
    (r"\.out\.", ".proj."),
    (r"\.token$", ".abstract"),
    (r"^norm\.", "head.norm."),
    (r"^proj\.", "head.proj."),
    (r"^bn\.", "head.proj_norm."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

PARTIALFORMER = [
    (r"^stem\.(\d)\.", lambda m: f"stem.{'conv' if int(m[1]) % 3 == 0 else 'norm'}{int(m[1]) // 3 + 1}."),
    (r"^downs\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.down.reduction."),
    (r"^down_norms\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.down.norm."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.cpe\.", ".position."),
    (r"(\d)\.fc", r"\1.mlp.fc"),
    (r"(\d)\.conv\.", r"\1.mlp.dwconv."),
    (r"\.query_token", ".query"),
    (r"\.head_fc1\.", ".attend.logit_"),
    (r"\.head_fc2\.", ".attend.weight_"),
    (r"(logit|weight)_weight$", r"\1_mixing"),
    (r"\.w_o\.", ".proj."),
    (r"\.channel_", "."),
    (r"^norm\.", "head.norm."),
    (r"^proj", "head.proj"),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

_EMSNET_SCALE = [(r"\.pe\.", ".embed.proj."), (r"\.pe_bn\.", ".embed.norm.")]
_EMSNET_SCALE += [(r"\.prop\.up\.", ".propagate.spread."), (r"\.prop\.bn\.", ".propagate.norm.")]
_EMSNET_STATIC = [
    (r"\.w1\.", ".whiten.proj."),
    (r"\.dw\.", ".spatial."),
    (r"\.dw_bn\.", ".spatial_norm."),
    (r"\.w2\.", ".mix."),
    (r"\.w2_bn\.", ".mix_norm."),
    (r"\.w3\.", ".value."),
    (r"\.w3_bn\.", ".value_norm."),
    (r"\.p2\.", ".fine_scale."),
    (r"\.p4\.", ".coarse_scale."),
    (r"\.row\.", ".coordinate.along_width."),
    (r"\.column\.", ".coordinate.along_height."),
    (r"\.coord_bn\.", ".coordinate.norm."),
]
_EMSNET_DYNAMIC = [
    (r"\.dynamic\.c\.", ".dynamic.local."),
    (r"\.dynamic\.g\.", ".dynamic.whole."),
    (r"\.attention\.dw\.", ".attn.context."),
    (r"\.attention\.bn\.", ".attn.norm."),
    (r"\.attention\.m\.", ".attn.weights."),
    (r"\.attention\.n\.", ".attn.value."),
    (r"\.attention\.", ".attn."),
    (r"\.w4\.", ".mix."),
    (r"\.w4_bn\.", ".mix_norm."),
]
_EMSNET_BLOCK = [
    (r"^pe1\.", "stem.conv1."),
    (r"^pe1_bn\.", "stem.norm1."),
    (r"^pe1b\.", "stem.conv2."),
    (r"^pe1b_bn\.", "stem.norm2."),
    (r"^down\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.down.reduction."),
    (r"^down_bn\.(\d)\.", lambda m: f"stages.{int(m[1]) + 1}.down.norm."),
    (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
    (r"\.bn([12])\.", r".norm\1."),
    (r"\.(proj_in|proj_out)\.", r".mixer.\1."),
    (r"\.(static|dynamic|fuse)\.", r".mixer.interaction.\1."),
    (r"\.fuse_bn\.", ".mixer.interaction.fuse_norm."),
    (r"\.wide\.", ".mlp.fc1."),
    (r"\.narrow\.", ".mlp.fc2."),
    (r"^bn\.", "head.norm."),
    (r"^classifier\.", "head.classifier."),
]
EMSNET = [*_EMSNET_DYNAMIC, *_EMSNET_STATIC, *_EMSNET_SCALE, *_EMSNET_BLOCK]


def renamed(key: str, rules: list) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key, count=1)
    return key


def copy_weights(reference: nn.Module, module: nn.Module, rules: list) -> dict[str, str]:
    """Fill `module` with the weights of `reference`; every entry of both must find its partner. Returns the key map."""
    given, wanted = reference.state_dict(), module.state_dict()
    keys = {key: renamed(key, rules) for key in given}
    assert set(keys.values()) == set(wanted), set(keys.values()) ^ set(wanted)
    state = {ours: given[theirs].reshape(wanted[ours].shape) for theirs, ours in keys.items()}
    module.load_state_dict(state)
    return keys


def randomise(module: nn.Module, seed: int = 0) -> None:
    """Weights that leave nothing small or zero by chance: norms, biases and running statistics included."""
    # Large weights repeat a pool of numbers: drawing 120 million of them would take longer than every test.
    pool = torch.randn(999_983, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    start = 0
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if not tensor.is_floating_point():
            tensor.zero_()
            continue
        pool = pool.roll(-start % 7919)
        noise = pool.repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()].view(tensor.shape)
        start += tensor.numel()
        with torch.no_grad():
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.abs())
            elif tensor.ndim == 1:
                tensor.copy_((1 if name.endswith("weight") else 0) + 0.3 * noise)
            else:
                tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
