"""The names of Windxy/Classic_Network_PyTorch, where its network is the same function as ours.

Its ResNet-18 and 34 and its SqueezeNet have native names, its ResNeXt-29 those of prlz77, its
ViT those of vit-pytorch. docs/dialects.md lists the networks that have no counterpart.
"""

from collections.abc import Mapping
from typing import Any

from convert.dialects import Dialect, Fuse, Unfold

LENET = Dialect(  # its third convolution is a dense layer on flattened maps of 5x5
    "windxy",
    "lenet",
    renames=(
        ("conv1.{rest}", "conv.0.{rest}"),
        ("conv2.{rest}", "conv.3.{rest}"),
        ("conv3.{rest}", "fc.0.{rest}"),
        ("fc1.{rest}", "fc.2.{rest}"),
        ("fc2.{rest}", "fc.4.{rest}"),
    ),
    tensors=(Unfold("conv3.weight", (5, 5)),),
    arguments=dict(activation="sigmoid"),
)

NIN = Dialect(  # its pooling rounds down, and its last block has the classes for all its widths
    "windxy",
    "nin",
    renames=tuple(
        (f"{ours}.{{rest}}", f"{2 * block + (block == 3)}.{2 * i}.{{rest}}")
        for block in range(4)
        for i, ours in enumerate(
            (f"conv{block + 1}", f"cccp{2 * block + 1}", f"cccp{2 * block + 2}")
        )
    ),
    arguments=dict(
        blocks=(
            (96, 11, 4, 0, 96, 96, "max"),
            (256, 5, 1, 2, 256, 256, "max"),
            (384, 3, 1, 1, 384, 384, "max"),
            (10, 3, 1, 1, 10, None, None),
        ),
        ceil_mode=False,
    ),
    prefix="model.",
)

GOOGLENET = Dialect(  # native names: the paper's network without two of its details
    "windxy", "googlenet", arguments=dict(original=True, local_norm=False, pool4=2)
)

DEPTH = 4  # blocks, and layers in each

DENSENET = Dialect(
    "windxy",
    "densenet",
    renames=(
        ("features.conv0.{rest}", "0.{rest}"),
        ("features.norm0.{rest}", "1.{rest}"),
        *(
            (
                f"features.denseblock{block + 1}.denselayer{layer + 1}.{ours}.{{rest}}",
                f"DenseBlosk_{block}.net.{layer}.{theirs}.{{rest}}",
            )
            for block in range(DEPTH)
            for layer in range(DEPTH)
            for ours, theirs in (("norm1", 0), ("conv1", 2))
        ),
        *(
            (
                f"features.transition{block + 1}.{ours}.{{rest}}",
                f"transition_block_{block}.{theirs}.{{rest}}",
            )
            for block in range(DEPTH - 1)
            for ours, theirs in (("norm", 0), ("conv", 2))
        ),
        ("features.norm5.{rest}", "BN.{rest}"),
        ("classifier.{rest}", "fc.1.{rest}"),
    ),
    arguments=dict(
        growth=32,
        depths=(DEPTH,) * DEPTH,
        stem_channels=64,
        bottleneck=0,
        compression=0.5,
        stem="imagenet",
        bias=True,
    ),
    prefix="net.",
)


def _chain(theirs: str, ours: str, length: int) -> dict[str, str]:
    return {f"{theirs}.{i}": f"{ours}_{i + 1}" for i in range(length)}


A = {
    "branch1": "branch1x1",
    **_chain("branch2", "branch5x5", 2),
    **_chain("branch3", "branch3x3dbl", 3),
    "branch4.1": "branch_pool",
}
B = {"branch1": "branch3x3", **_chain("branch2", "branch3x3dbl", 3)}
C = {
    "branch1": "branch1x1",
    **_chain("branch2", "branch7x7", 3),
    **_chain("branch3", "branch7x7dbl", 5),
    "branch4.1": "branch_pool",
}
D = {**_chain("branch1", "branch3x3", 2), **_chain("branch2", "branch7x7x3", 4)}
MODULES = {"5b": A, "5c": A, "5d": A, "6a": B, "6b": C, "6c": C, "6d": C, "6e": C, "7a": D}

INCEPTION_V3 = Dialect(  # all names outside of these modules are native
    "windxy",
    "inception_v3",
    renames=tuple(
        (f"Mixed_{module}.{ours}.{{rest}}", f"Mixed_{module}.{theirs}.{{rest}}")
        for module, branches in MODULES.items()
        for theirs, ours in branches.items()
    ),
)

PLUG_INS = Dialect(  # `se_block`, `ScaledDotProductAttention` and `Highway`
    "windxy",
    "",
    renames=(
        ("fc1.weight", "fc.0.weight"),
        ("fc2.weight", "fc.2.weight"),
        ("in_proj_{rest}[0]", "fc_q.{rest}"),
        ("in_proj_{rest}[1]", "fc_k.{rest}"),
        ("in_proj_{rest}[2]", "fc_v.{rest}"),
        ("out_proj.{rest}", "fc_o.{rest}"),
        ("{n}.transform.{rest}", "nonlinear.{n}.{rest}"),
        ("{n}.carry.{rest}", "linear.{n}.{rest}"),
        ("{n}.gate.{rest}", "gate.{n}.{rest}"),
    ),
    tensors=(
        Unfold("fc{n}.weight", (1, 1)),
        Fuse("in_proj_{rest}", 3, last="out_proj.weight"),
    ),
)

DIALECTS: tuple[Dialect, ...] = (LENET, NIN, GOOGLENET, DENSENET, INCEPTION_V3, PLUG_INS)


def vgg(arguments: Mapping[str, Any]) -> Dialect:
    """It counts convolutions within stages, torchvision through all layers."""
    renames, layer = [], 0
    for stage, depth in enumerate(arguments["depths"], 1):
        for i in range(depth):
            renames.append((f"features.{layer}.{{rest}}", f"vgg_block_{stage}.{2 * i}.{{rest}}"))
            layer += 3 if arguments["batch_norm"] else 2
        layer += 1  # pooling
    for ours, theirs in (0, 1), (3, 4), (6, 7):
        renames.append((f"classifier.{ours}.{{rest}}", f"fc.{theirs}.{{rest}}"))
    return Dialect("windxy", "vgg", tuple(renames), prefix="net.")


# File -> the dialect, where names depend on the constructor's arguments.
MADE = {"vgg": vgg}
