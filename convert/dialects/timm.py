"""timm's names for networks that torchvision has too."""

from collections.abc import Mapping
from typing import Any

from convert.dialects import Dialect, Fold

VGG = Dialect(  # its head is made of convolutions, which slide over maps larger than 7x7
    "timm",
    "vgg",
    renames=(
        ("classifier.0.{rest}", "pre_logits.fc1.{rest}"),
        ("classifier.3.{rest}", "pre_logits.fc2.{rest}"),
        ("classifier.6.{rest}", "head.fc.{rest}"),
    ),
    tensors=(Fold("classifier.0.weight", (7, 7)), Fold("classifier.3.weight", (1, 1))),
    arguments=dict(head="conv"),
)

BLOCK = "encoder.layers.encoder_layer_{n}"

VIT = Dialect(
    "timm",
    "vit",
    renames=(
        ("class_token", "cls_token"),
        ("encoder.pos_embedding", "pos_embed"),
        ("conv_proj.{rest}", "patch_embed.proj.{rest}"),
        (f"{BLOCK}.ln_1.{{rest}}", "blocks.{n}.norm1.{rest}"),
        (f"{BLOCK}.self_attention.in_proj_{{rest}}", "blocks.{n}.attn.qkv.{rest}"),
        (f"{BLOCK}.self_attention.out_proj.{{rest}}", "blocks.{n}.attn.proj.{rest}"),
        (f"{BLOCK}.ln_2.{{rest}}", "blocks.{n}.norm2.{rest}"),
        (f"{BLOCK}.mlp.0.{{rest}}", "blocks.{n}.mlp.fc1.{rest}"),
        (f"{BLOCK}.mlp.3.{{rest}}", "blocks.{n}.mlp.fc2.{rest}"),
        ("encoder.ln.{rest}", "norm.{rest}"),
        ("heads.pre_logits.{rest}", "pre_logits.fc.{rest}"),
        ("heads.head.{rest}", "head.{rest}"),
    ),
    resize="timm",
)

DIALECTS: tuple[Dialect, ...] = (VGG, VIT)


def mobilenet_v2(arguments: Mapping[str, Any]) -> Dialect:
    """timm counts blocks within stages, torchvision through all of them."""
    renames = [("features.0.0.{rest}", "conv_stem.{rest}"), ("features.0.1.{rest}", "bn1.{rest}")]
    block = 0
    for stage, depth in enumerate(arguments["depths"]):
        for i in range(depth):
            block += 1
            ours, theirs = f"features.{block}.conv", f"blocks.{stage}.{i}"
            parts = "0.0 conv_pw, 0.1 bn1, 1.0 conv_dw, 1.1 bn2, 2 conv_pwl, 3 bn3"
            if stage == 0:  # no expansion
                parts = "0.0 conv_dw, 0.1 bn1, 1 conv_pw, 2 bn2"
            for part, name in (pair.split() for pair in parts.split(", ")):
                renames.append((f"{ours}.{part}.{{rest}}", f"{theirs}.{name}.{{rest}}"))
    renames += [
        (f"features.{block + 1}.0.{{rest}}", "conv_head.{rest}"),
        (f"features.{block + 1}.1.{{rest}}", "bn2.{rest}"),
        ("classifier.1.{rest}", "classifier.{rest}"),
    ]
    return Dialect("timm", "mobilenet_v2", tuple(renames))


def mobilenet_v3(arguments: Mapping[str, Any]) -> Dialect:
    """timm's stages are the blocks of one width, its last layer but one a convolution."""
    renames = [("features.0.0.{rest}", "conv_stem.{rest}"), ("features.0.1.{rest}", "bn1.{rest}")]
    rows = arguments["rows"]
    stage, i, before = -1, 0, 16
    for block, (_, expanded, channels, excite, _, _) in enumerate(rows, 1):
        new = block == 1 or channels != before
        stage, i = (stage + 1, 0) if new else (stage, i + 1)
        ours, theirs = f"features.{block}.block", f"blocks.{stage}.{i}"
        parts = [("conv_pw", "bn1"), ("conv_dw", "bn2"), ("conv_pwl", "bn3")]
        if expanded == before:
            parts = [("conv_dw", "bn1"), ("conv_pw", "bn2")]
        if excite and not arguments["minimal"]:
            squeeze = len(parts) - 1
            parts.insert(squeeze, ("se.conv_reduce", "se.conv_expand"))
        for part, names in enumerate(parts):
            leaves = ("fc1", "fc2") if names[0].startswith("se.") else ("0", "1")
            for leaf, name in zip(leaves, names, strict=True):
                renames.append((f"{ours}.{part}.{leaf}.{{rest}}", f"{theirs}.{name}.{{rest}}"))
        before = channels
    last = len(rows) + 1
    renames += [
        (f"features.{last}.0.{{rest}}", f"blocks.{stage + 1}.0.conv.{{rest}}"),
        (f"features.{last}.1.{{rest}}", f"blocks.{stage + 1}.0.bn1.{{rest}}"),
        ("classifier.0.{rest}", "conv_head.{rest}"),
        ("classifier.3.{rest}", "classifier.{rest}"),
    ]
    google = arguments["same"] or arguments["rw"]
    return Dialect(
        "timm",
        "mobilenet_v3",
        tuple(renames),
        tensors=(Fold("classifier.0.weight", (1, 1)),),
        arguments=dict(eps=1e-3 if google else 1e-5, momentum=0.1),
    )


# File -> the dialect, where names depend on the constructor's arguments.
MADE = {"mobilenet_v2": mobilenet_v2, "mobilenet_v3": mobilenet_v3}
