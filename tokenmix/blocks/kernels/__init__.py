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
    "DropPath": "drop_path",
    "HeadMixing": "attention",
    "GroupNorm": "channels_last",
    "Pointwise": "channels_last",
    "PositionEmbedding": "positions",
    "Stage": "stage",
    "WindowAttention": "window_attention",
    "attention": "attention",
    "attention_scores": "attention",
    "concat_tokens": "tokens",
    "windowed_attention": "attention",
    "weighted_sum": "attention",
    "avg_pool": "pooling",
    "axial_sample": "axial_sample",
    "bilinear_sample": "bilinear_sample",
    "space_to_depth": "windows",
    "window_merge": "windows",
    "window_partition": "windows",
    "gather_tokens": "token_order",
    "max_pool": "pooling",
    "pad_to": "padding",
    "roll": "positions",
    "scatter_tokens": "token_order",
    "token_order": "token_order",
    "resize": "pooling",
}

# Names with a fast path besides: the files of `tokenmix.fast` that emitted modules import them from instead. Standalone
# sources, and modules built with `kernels="reference"`, hold what stands in this folder.
FAST: dict[str, str] = {"WindowAttention": "window_attention", "axial_sample": "axial_sample"}
