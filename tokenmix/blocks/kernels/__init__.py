"""What emitted modules are built from beside torch itself, one file each.

Every file needs torch only and can be inlined into a standalone source as it is: imports at the top, then
definitions. `HELPERS` maps the names that ops refer to (`Op.helpers`) to the files that define them.
"""

HELPERS: dict[str, str] = {
    "AxialConv2d": "channels_last",
    "ConvTranspose2d": "channels_last",
    "adaptive_avg_pool": "pooling",
    "fold": "folding",
    "unfold": "folding",
    "BatchNorm2d": "channels_last",
    "Conv2d": "channels_last",
    "FusedConv2d": "channels_last",
    "DropPath": "drop_path",
    "HeadMixing": "attention",
    "GroupNorm": "channels_last",
    "FusedLinear": "channels_last",
    "Pointwise": "channels_last",
    "FusedPointwise": "channels_last",
    "PositionEmbedding": "positions",
    "Stage": "stage",
    "WindowAttention": "window_attention",
    "abstract_window_attention": "window_attention",
    "attention": "attention",
    "attention_scores": "attention",
    "concat_tokens": "tokens",
    "outlook_attention": "outlook_attention",
    "windowed_attention": "attention",
    "weighted_sum": "attention",
    "avg_pool": "pooling",
    "crop": "padding",
    "axial_sample": "axial_sample",
    "bilinear_sample": "bilinear_sample",
    "space_to_depth": "windows",
    "window_merge": "windows",
    "window_partition": "windows",
    "background_attention": "token_order",
    "gather_tokens": "token_order",
    "max_pool": "pooling",
    "pad_to": "padding",
    "roll": "positions",
    "replace_tokens": "token_order",
    "scatter_tokens": "token_order",
    "TalkingHeadsAttention": "talking_heads",
    "token_order": "token_order",
    "token_partition": "token_order",
    "resize": "padding",
}

# Names with a fast path besides: the files of `tokenmix.fast` that emitted modules import them from instead. Standalone
# sources, and modules built with `kernels="reference"`, hold what stands in this folder.
FAST: dict[str, str] = {
    "AxialConv2d": "axial_conv",
    "FusedConv2d": "fused_layers",
    "ConvTranspose2d": "conv_transpose",
    "FusedLinear": "fused_layers",
    "FusedPointwise": "fused_layers",
    "TalkingHeadsAttention": "talking_heads",
    "WindowAttention": "window_attention",
    "abstract_window_attention": "window_attention",
    "attention": "attention",
    "axial_sample": "axial_sample",
    "background_attention": "token_order",
    "outlook_attention": "outlook_attention",
    "token_partition": "token_order",
    "windowed_attention": "attention",
}

# Helpers that are another one with something added: fresh weights are drawn as for that one.
KINDS: dict[str, str] = {"FusedConv2d": "Conv2d", "FusedPointwise": "Pointwise"}
