"""What emitted modules are built from beside torch itself, one file each.

Every file needs torch only and can be inlined into a standalone source as it is: imports at the top, then
definitions. `HELPERS` maps the names that ops refer to (`Op.helpers`) to the files that define them.
"""

HELPERS: dict[str, str] = {
    "BatchNorm2d": "channels_last",
    "Conv2d": "channels_last",
    "DropPath": "drop_path",
    "HeadMixing": "attention",
    "GroupNorm": "channels_last",
    "Pointwise": "channels_last",
    "WindowAttention": "window_attention",
    "attention": "attention",
    "attention_scores": "attention",
    "concat_tokens": "tokens",
    "windowed_attention": "attention",
    "weighted_sum": "attention",
    "avg_pool": "pooling",
    "axial_sample": "axial_sample",
    "max_pool": "pooling",
    "pad_to": "padding",
    "resize": "pooling",
}
