"""The names of prlz77/ResNeXt.pytorch, which many ports of the CIFAR networks copied."""

from convert.dialects import Dialect

PARTS = {
    "conv1": "conv_reduce",
    "bn1": "bn_reduce",
    "conv2": "conv_conv",
    "bn2": "bn",
    "conv3": "conv_expand",
    "bn3": "bn_expand",
    "downsample.0": "shortcut.shortcut_conv",
    "downsample.1": "shortcut.shortcut_bn",
}

RESNEXT = Dialect(
    "prlz77",
    "resnext",
    renames=(
        ("conv1.{rest}", "conv_1_3x3.{rest}"),
        ("bn1.{rest}", "bn_1.{rest}"),
        *(
            (
                f"layer{i}.{{n}}.{ours}.{{rest}}",
                f"stage_{i}.stage_{i}_bottleneck_{{n}}.{theirs}.{{rest}}",
            )
            for i in (1, 2, 3)
            for ours, theirs in PARTS.items()
        ),
        ("fc.{rest}", "classifier.{rest}"),
    ),
)

DIALECTS: tuple[Dialect, ...] = (RESNEXT,)

MADE: dict = {}
