"""The names of Hugging Face transformers: ResNet, ViT, MobileNet-v1 and v2.

"huggingface" are those of the classes for image classification, "huggingface-model" those of the
networks without a head (ViTModel's pooling layer is our `representation_size`). ViT's files, and
transformers before 5, have older names: "huggingface-v4" and "huggingface-v4-model".

What the names cannot show is read from the `config.json` beside the weights, and where there is
none it is transformers' own default. A setting that makes another function than any of ours is
refused by its name; a network of ours that is none of theirs (a CIFAR stem, a distilled ViT) has
no such dialect. Dropout is left alone: it belongs to a training recipe, and is put elsewhere
here than there.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.dialects import Dialect, Fuse, Shapes
from flax_nets.layers.mobile import make_divisible

Settings = dict[str, Any]

RESNET = dict(
    embedding_size=64,
    hidden_sizes=(256, 512, 1024, 2048),
    depths=(3, 4, 6, 3),
    layer_type="bottleneck",
    hidden_act="relu",
    downsample_in_first_stage=False,
    downsample_in_bottleneck=False,
)
VIT = dict(
    hidden_size=768,
    num_hidden_layers=12,
    num_attention_heads=12,
    intermediate_size=3072,
    hidden_act="gelu",
    layer_norm_eps=1e-12,
    image_size=224,
    patch_size=16,
    pooler_act="tanh",
)
MOBILENET = dict(
    depth_multiplier=1.0, min_depth=8, hidden_act="relu6", tf_padding=True, layer_norm_eps=1e-3
)
MOBILENET_V2 = MOBILENET | dict(
    depth_divisible_by=8,
    expand_ratio=6.0,
    output_stride=32,
    first_layer_is_expansion=True,
    finegrained_output=True,
)
V1_DEPTHS, V2_DEPTHS = (1, 2, 2, 6, 2), (1, 2, 3, 4, 3, 3, 1)  # of the MobileNets; no setting


def settings_of(config: Mapping[str, Any], defaults: Settings) -> Settings:
    """What a config says of each setting, or the default; ValueError for another type."""
    settings = {name: config.get(name, default) for name, default in defaults.items()}
    for name, value in settings.items():
        default = defaults[name]
        if name in ("image_size", "patch_size") and isinstance(value, list) and value:
            if len(set(map(str, value))) > 1:
                raise ValueError(f"config.json: {name}={value} is no square, which ours has to be")
            value = value[0]
        if isinstance(value, list) and isinstance(default, tuple):
            value = tuple(value)
        numbers = (int, float) if isinstance(default, float) else type(default)
        good = isinstance(value, numbers) and isinstance(value, bool) == isinstance(default, bool)
        if isinstance(value, tuple):
            good = good and all(type(n) is int and n > 0 for n in value)
        elif isinstance(default, int | float) and not isinstance(default, bool):
            good = good and value > 0
        if not good:
            raise ValueError(f"config.json: {name} is {value!r}, expected one like {default!r}")
        settings[name] = type(default)(value)
    return settings


def require(settings: Settings, **only: Any) -> None:
    """ValueError for a setting that makes another function than ours."""
    for name, value in only.items():
        if settings[name] != value:
            raise ValueError(
                f"config.json: {name}={settings[name]!r} is a function that this network cannot "
                f"be; it takes {name}={value!r} alone"
            )


def configure_resnet(config: Mapping[str, Any] | None, shapes: Shapes) -> Settings:
    """`Dialect.configure`. Where a bottleneck has its stride is a setting there, a block here."""
    if config is None:
        return {}
    s = settings_of(config, RESNET)
    require(s, hidden_act="relu")
    if s["layer_type"] not in ("basic", "bottleneck"):
        require(s, layer_type="bottleneck")
    widening = 1 if s["layer_type"] == "basic" else 4
    if any(n % widening for n in s["hidden_sizes"]):
        raise ValueError(f"config.json: hidden_sizes={s['hidden_sizes']} must be multiples of 4")
    if len(s["hidden_sizes"]) != len(s["depths"]):
        raise ValueError(
            f"config.json: hidden_sizes={s['hidden_sizes']} and depths={s['depths']} differ in "
            "their number of stages"
        )
    widths = tuple(n // widening for n in s["hidden_sizes"])
    early = s["downsample_in_bottleneck"] and widening == 4
    return dict(
        block="stride_first" if early else s["layer_type"],
        depths=s["depths"],
        widths=widths,
        groups=1,
        base_width=64,
        stem="imagenet",
        stem_width=None if s["embedding_size"] == widths[0] else s["embedding_size"],
        first_stride=2 if s["downsample_in_first_stage"] else 1,
        shortcut="B",
    )


def configure_vit(config: Mapping[str, Any] | None, shapes: Shapes) -> Settings:
    """`Dialect.configure`. The size of the image is its own, not what the positions show."""
    if config is None:
        return {}
    s = settings_of(config, VIT)
    require(s, hidden_act="gelu")
    if "heads.pre_logits.weight" in shapes:
        require(s, pooler_act="tanh")
    usual = s["intermediate_size"] == 4 * s["hidden_size"]
    return dict(
        image_size=s["image_size"],
        patch_size=s["patch_size"],
        depth=s["num_hidden_layers"],
        width=s["hidden_size"],
        num_heads=s["num_attention_heads"],
        mlp_dim=None if usual else s["intermediate_size"],
        representation_size=None,
        pool="token",
        distilled=False,
        norm_eps=s["layer_norm_eps"],
    )


def widths_of(channels: tuple[int, ...], multiplier: float, usual: tuple[int, ...]) -> Settings:
    """The channels as a multiplier of the usual ones where ours rounds alike, or spelled out."""
    *rest, last = (make_divisible(multiplier * n) for n in usual)
    if len(usual) == 9:  # MobileNet-v2's head never gets narrower
        last = make_divisible(max(multiplier, 1.0) * usual[-1])
    if (*rest, last) == channels:
        return dict(width=multiplier, divisor=8, widths=usual)
    return dict(width=1.0, divisor=1, widths=channels)


def configure_mobilenet_v1(config: Mapping[str, Any] | None, shapes: Shapes) -> Settings:
    """`Dialect.configure`. Channels are cut to whole numbers, not rounded to multiples of 8."""
    if config is None:
        return {}
    s = settings_of(config, MOBILENET)
    require(s, hidden_act="relu6")
    usual = (32, 64, 128, 256, 512, 1024)
    channels = tuple(max(int(n * s["depth_multiplier"]), s["min_depth"]) for n in usual)
    return dict(
        depths=V1_DEPTHS,
        same=s["tf_padding"],
        eps=s["layer_norm_eps"],
        **widths_of(channels, s["depth_multiplier"], usual),
    )


def configure_mobilenet_v2(config: Mapping[str, Any] | None, shapes: Shapes) -> Settings:
    """`Dialect.configure`. Channels are rounded to multiples of a number of its own."""
    if config is None:
        return {}
    s = settings_of(config, MOBILENET_V2)
    require(
        s, hidden_act="relu6", expand_ratio=6.0, output_stride=32, first_layer_is_expansion=True
    )
    divisor, least, multiplier = s["depth_divisible_by"], s["min_depth"], s["depth_multiplier"]

    def divisible(n: float) -> int:
        nearest = max(least, int(round(n) + divisor / 2) // divisor * divisor)
        return nearest + divisor if nearest < 0.9 * round(n) else nearest

    usual = (32, 16, 24, 32, 64, 96, 160, 320, 1280)
    channels = [divisible(n * multiplier) for n in usual]
    if s["finegrained_output"] and multiplier < 1:
        channels[-1] = usual[-1]
    if any(divisible(6 * n) != 6 * n for n in channels[1:-2]):
        raise ValueError(
            f"config.json: min_depth={least} and depth_divisible_by={divisor} round the "
            "sixfold widths within the blocks, which ours does not"
        )
    return dict(
        depths=V2_DEPTHS,
        fixed_ends=False,
        same=s["tf_padding"],
        eps=s["layer_norm_eps"],
        **widths_of(tuple(channels), multiplier, usual),
    )


def layer_of(conv: str, norm: str, layer: str) -> list[tuple[str, str]]:
    """Renamings of a convolution and its batch norm, which are one `layer` there."""
    return [
        (f"{conv}.{{rest}}", f"{layer}.convolution.{{rest}}"),
        (f"{norm}.{{rest}}", f"{layer}.normalization.{{rest}}"),
    ]


def resnet(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """Theirs counts stages, and the convolutions of a block, from 0."""
    theirs = dict(stem="imagenet", shortcut="B", groups=1, base_width=64)
    if not theirs.items() <= arguments.items():
        return ()

    def dialect(name: str, prefix: str) -> Dialect:
        renames: list[tuple[str, str]] = []
        for stage in range(max(len(arguments["depths"]), 5)):  # a config may have more of them
            ours, theirs = f"layer{stage + 1}.{{n}}", f"{prefix}encoder.stages.{stage}.layers.{{n}}"
            parts = [(f"conv{i + 1}", f"bn{i + 1}", f"layer.{i}") for i in range(3)]
            for conv, norm, layer in [*parts, ("downsample.0", "downsample.1", "shortcut")]:
                renames += layer_of(f"{ours}.{conv}", f"{ours}.{norm}", f"{theirs}.{layer}")
        renames += layer_of("conv1", "bn1", f"{prefix}embedder.embedder")
        renames.append(("fc.{rest}", "classifier.1.{rest}"))
        return Dialect(
            name,
            "resnet",
            tuple(renames),
            arguments=dict(first_stride=1),
            model_type="resnet",
            configure=configure_resnet,
        )

    return dialect("huggingface", "resnet."), dialect("huggingface-model", "")


BLOCK = "encoder.layers.encoder_layer_{n}"
QKV = f"{BLOCK}.self_attention.in_proj_{{rest}}"
NEW = dict(
    block="layers.{n}",
    q="attention.q_proj",
    k="attention.k_proj",
    v="attention.v_proj",
    out="attention.o_proj",
    fc1="mlp.fc1",
    fc2="mlp.fc2",
)
OLD = dict(
    block="encoder.layer.{n}",
    q="attention.attention.query",
    k="attention.attention.key",
    v="attention.attention.value",
    out="attention.output.dense",
    fc1="intermediate.dense",
    fc2="output.dense",
)


def vit(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """Theirs keeps queries, keys and values apart."""
    if arguments["distilled"] or arguments["patch_norm"] or not arguments["class_token"]:
        return ()

    def dialect(name: str, prefix: str, names: Mapping[str, str]) -> Dialect:
        block = f"{prefix}{names['block']}"
        renames = [
            ("class_token", f"{prefix}embeddings.cls_token"),
            ("encoder.pos_embedding", f"{prefix}embeddings.position_embeddings"),
            ("conv_proj.{rest}", f"{prefix}embeddings.patch_embeddings.projection.{{rest}}"),
            *((f"{QKV}[{i}]", f"{block}.{names[part]}.{{rest}}") for i, part in enumerate("qkv")),
            (f"{BLOCK}.self_attention.out_proj.{{rest}}", f"{block}.{names['out']}.{{rest}}"),
            (f"{BLOCK}.ln_1.{{rest}}", f"{block}.layernorm_before.{{rest}}"),
            (f"{BLOCK}.ln_2.{{rest}}", f"{block}.layernorm_after.{{rest}}"),
            (f"{BLOCK}.mlp.0.{{rest}}", f"{block}.{names['fc1']}.{{rest}}"),
            (f"{BLOCK}.mlp.3.{{rest}}", f"{block}.{names['fc2']}.{{rest}}"),
            ("encoder.ln.{rest}", f"{prefix}layernorm.{{rest}}"),
            ("heads.pre_logits.{rest}", f"{prefix}pooler.dense.{{rest}}"),
            ("heads.head.{rest}", "classifier.{rest}"),
        ]
        return Dialect(
            name,
            "vit",
            tuple(renames),
            tensors=(Fuse(QKV, 3),),
            arguments=dict(norm_eps=1e-12),
            model_type="vit",
            configure=configure_vit,
            resize="transformers",
        )

    return (
        dialect("huggingface", "vit.", NEW),
        dialect("huggingface-model", "", NEW),
        dialect("huggingface-v4", "vit.", OLD),
        dialect("huggingface-v4-model", "", OLD),
    )


def mobilenet_v1(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """Theirs counts every convolution but the first, ours blocks within stages."""
    if arguments["depths"] != V1_DEPTHS:
        return ()

    def dialect(name: str, prefix: str) -> Dialect:
        parts = [("conv_stem", "bn1", "conv_stem")]
        layer = 0
        for stage, depth in enumerate(arguments["depths"]):
            for block in (f"blocks.{stage}.{i}" for i in range(depth)):
                parts.append((f"{block}.conv_dw", f"{block}.bn1", f"layer.{layer}"))
                parts.append((f"{block}.conv_pw", f"{block}.bn2", f"layer.{layer + 1}"))
                layer += 2
        return mobile(name, prefix, "mobilenet_v1", parts, momentum=0.9997)

    return dialect("huggingface", "mobilenet_v1."), dialect("huggingface-model", "")


def mobilenet_v2(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """Theirs takes the first block into the stem."""
    if arguments["depths"] != V2_DEPTHS:
        return ()

    def dialect(name: str, prefix: str) -> Dialect:
        first, last = "features.1.conv", f"features.{sum(arguments['depths']) + 1}"
        parts = [
            ("features.0.0", "features.0.1", "conv_stem.first_conv"),
            (f"{first}.0.0", f"{first}.0.1", "conv_stem.conv_3x3"),
            (f"{first}.1", f"{first}.2", "conv_stem.reduce_1x1"),
            (f"{last}.0", f"{last}.1", "conv_1x1"),
        ]
        for i in range(sum(arguments["depths"]) - 1):
            block, layer = f"features.{i + 2}.conv", f"layer.{i}"
            parts.append((f"{block}.0.0", f"{block}.0.1", f"{layer}.expand_1x1"))
            parts.append((f"{block}.1.0", f"{block}.1.1", f"{layer}.conv_3x3"))
            parts.append((f"{block}.2", f"{block}.3", f"{layer}.reduce_1x1"))
        head = [("classifier.1.{rest}", "classifier.{rest}")]
        return mobile(name, prefix, "mobilenet_v2", parts, momentum=0.997, renames=head)

    return dialect("huggingface", "mobilenet_v2."), dialect("huggingface-model", "")


def mobile(
    name: str,
    prefix: str,
    file: str,
    parts: list[tuple[str, str, str]],
    momentum: float,
    renames: Any = (),
) -> Dialect:
    """`parts`: a convolution of ours, its batch norm, and the layer there that has both."""
    configure = {"mobilenet_v1": configure_mobilenet_v1, "mobilenet_v2": configure_mobilenet_v2}
    named = [pair for conv, norm, layer in parts for pair in layer_of(conv, norm, prefix + layer)]
    return Dialect(
        name,
        file,
        (*named, *renames),
        arguments=dict(same=True, eps=1e-3, momentum=momentum),
        model_type=file,
        configure=configure[file],
    )


DIALECTS: tuple[Dialect, ...] = ()

MADE = {"resnet": resnet, "vit": vit, "mobilenet_v1": mobilenet_v1, "mobilenet_v2": mobilenet_v2}
