"""State-dict keys of timm's (and torchvision's) models against ours, as plain data.

A rule is a pattern and its replacement, applied once each in the order written. Two replacements share the rows of one
tensor out among them, in order.
"""

Rules = list[tuple[str, str | tuple[str, ...]]]

RESNET: Rules = [
    (r"^conv1\.", r"stem.conv."),
    (r"^bn1\.", r"stem.norm."),
    (r"^layer1\.", r"stages.0.blocks."),
    (r"^layer2\.", r"stages.1.blocks."),
    (r"^layer3\.", r"stages.2.blocks."),
    (r"^layer4\.", r"stages.3.blocks."),
    (r"\.downsample\.0\.", r".shortcut."),
    (r"\.downsample\.1\.", r".shortcut_norm."),
    (r"\.bn(\d)\.", r".norm\1."),
    (r"^fc\.", r"head.classifier."),
]

MOBILENET: Rules = [
    (r"^conv_stem\.", r"stem.conv."),
    (r"^bn1\.", r"stem.norm."),
    (r"^blocks\.(\d)\.", r"stages.\1.blocks."),
    (r"^(stages\.0\..*)conv_dw\.", r"\1dwconv."),
    (r"^(stages\.0\..*)bn1\.", r"\1dwconv_norm."),
    (r"^(stages\.0\..*)conv_pw\.", r"\1narrow."),
    (r"^(stages\.0\..*)bn2\.", r"\1narrow_norm."),
    (r"\.conv_pw\.", r".widen."),
    (r"\.bn1\.", r".widen_norm."),
    (r"\.conv_dw\.", r".dwconv."),
    (r"\.bn2\.", r".dwconv_norm."),
    (r"\.conv_pwl\.", r".narrow."),
    (r"\.bn3\.", r".narrow_norm."),
    (r"^conv_head\.", r"head.conv."),
    (r"^bn2\.", r"head.norm."),
    (r"^classifier\.", r"head.classifier."),
]

VIT: Rules = [
    (r"^cls_token$", r"stem.class_token"),
    (r"^pos_embed$", (r"stem.class_position", r"stem.position.table")),
    (r"^patch_embed\.", r"stem."),
    (r"^blocks\.", r"stages.0.blocks."),
    (r"^norm\.", r"head.norm."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

SWIN: Rules = [
    (r"^patch_embed\.", r"stem."),
    (r"^layers\.(\d)\.downsample\.", r"stages.\1.down."),
    (r"^layers\.", r"stages."),
    (r"\.attn\.relative_position_bias_table", r".attn.attn.bias_table"),
    (r"^norm\.", r"head.norm."),
    (r"^head\.fc\.", r"head.classifier."),
]

PVT: Rules = [
    (r"^patch_embed\.", r"stem."),
    (r"^stages\.(\d)\.downsample\.", r"stages.\1.down."),
    (r"^stages\.(\d)\.blocks\.", r"stages.\1.body.layers."),
    (r"^stages\.(\d)\.norm\.", r"stages.\1.body.norm."),
    (r"\.attn\.sr\.", r".attn.reduction."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]

CONVNEXT: Rules = [
    (r"^stem\.0\.", r"stem.proj."),
    (r"^stem\.1\.", r"stem.norm."),
    (r"\.downsample\.0\.", r".down.norm."),
    (r"\.downsample\.1\.", r".down.reduction."),
    (r"\.conv_dw\.", r".dwconv."),
    (r"^head\.fc\.", r"head.classifier."),
]

POOLFORMER: Rules = [
    (r"^stem\.conv\.", r"stem."),
    (r"\.downsample\.conv\.", r".down."),
    (r"\.layer_scale(\d)\.scale", r".scale\1"),
    (r"\.mlp\.fc", r".fc"),
    (r"^head\.fc\.", r"head.classifier."),
]

# torchvision's, where timm pads in another place.
SWIN_TORCHVISION: Rules = [
    (r"^features\.0\.0\.", r"stem.proj."),
    (r"^features\.0\.2\.", r"stem.norm."),
    (r"^features\.1\.", r"stages.0.blocks."),
    (r"^features\.2\.", r"stages.1.down."),
    (r"^features\.3\.", r"stages.1.blocks."),
    (r"^features\.4\.", r"stages.2.down."),
    (r"^features\.5\.", r"stages.2.blocks."),
    (r"^features\.6\.", r"stages.3.down."),
    (r"^features\.7\.", r"stages.3.blocks."),
    (r"\.attn\.relative_position_bias_table", r".attn.attn.bias_table"),
    (r"\.mlp\.0\.", r".mlp.fc1."),
    (r"\.mlp\.3\.", r".mlp.fc2."),
    (r"^norm\.", r"head.norm."),
    (r"^head\.(weight|bias)", r"head.classifier.\1"),
]
