"""What the parity tests run: for each file of networks its inputs and its reduced forms.

`full` names every block type and the smallest variant of a family, with overrides that make it
cheap without leaving out a kind of block: outputs, stages, train mode, all gradients, statistics.
Every other variant is compared by outputs after `reduce`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from flax_nets import registry
from flax_nets.models.mobilenet_v3 import LARGE, SMALL

Overrides = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Family:
    """One row per file.

    Args:
      full: variant -> overrides under which it is compared in full.
      reduce: the arguments of any other variant -> overrides that make it cheap.
      image: side of the input in pixels; or a dict variant -> side with a "default".
      batch: images per batch; train mode needs 16 values per channel in the last batch norm.
      parameters: variant -> number of trained numbers, from the paper or the reference.
      libraries: "torchvision/name" or "timm/name" -> arguments there, for the comparison of the
        Flax side with the library itself.
    """

    full: Mapping[str, Overrides]
    reduce: Callable[[Mapping[str, Any]], Overrides] = lambda arguments: {}
    image: int | Mapping[str, int] = 64
    batch: int = 4
    parameters: Mapping[str, int] = dataclasses.field(default_factory=dict)
    libraries: Mapping[str, Overrides] = dataclasses.field(default_factory=dict)

    def side(self, name: str) -> int:
        return (
            self.image
            if isinstance(self.image, int)
            else self.image.get(name, self.image["default"])
        )


def _ends(rows: tuple) -> tuple:
    """The first and last rows of MobileNet-v3's tables: every kind of block, every stride."""
    return rows[:5] + rows[-3:-1]


def narrow_blocks(name: str) -> tuple[tuple[Any, ...], ...]:
    """The blocks of a network in network with a sixteenth of their channels."""
    blocks = registry.resolve(name).arguments["blocks"]
    return tuple((c // 16, *rows, a // 16, b and b // 16, pool) for c, *rows, a, b, pool in blocks)


FAMILIES = {
    "lenet": Family(
        full={"lenet5": {}, "lenet5_1998": {}},
        image=32,
        parameters={"lenet5": 61_706, "lenet5_1998": 60_000},
    ),
    "alexnet": Family(
        full={
            "alexnet": dict(widths=(8, 8, 12, 8, 8), hidden=24, num_classes=10),
            "alexnet_2012": dict(widths=(8, 8, 12, 12, 8), hidden=24, num_classes=10),
        },
        reduce=lambda a: dict(widths=(8, 8, 12, 8, 8), hidden=24),
        parameters={"alexnet": 61_100_840, "alexnet_2012": 60_965_224},
        libraries={"torchvision/alexnet": {}},
    ),
    "nin": Family(
        full={
            "nin_imagenet": dict(blocks=narrow_blocks("nin_imagenet"), num_classes=10),
            "nin_cifar10": dict(blocks=narrow_blocks("nin_cifar10")),
        },
        image={"nin_imagenet": 96, "default": 32},
        parameters={"nin_imagenet": 7_595_176, "nin_cifar10": 966_986},
    ),
    "vgg": Family(
        full={
            "vgg11": dict(widths=(8, 8, 12, 16, 16), hidden=24, num_classes=10),
            "vgg11_bn": dict(widths=(8, 8, 12, 16, 16), hidden=24, num_classes=10),
            "vgg16_c": dict(
                depths=(1, 1, 2, 2, 2),
                widths=(8, 8, 12, 16, 16),
                hidden=24,
                num_classes=10,
                head="conv",
            ),
        },
        reduce=lambda a: dict(widths=(8, 8, 12, 16, 16), hidden=24),
        image={"vgg16_c": 256, "default": 64},
        libraries={"torchvision/vgg11": {}, "timm/vgg11": {}},
        parameters={
            "vgg11": 132_863_336,
            "vgg13": 133_047_848,
            "vgg16": 138_357_544,
            "vgg16_bn": 138_365_992,
            "vgg16_c": 133_638_952,
            "vgg19": 143_667_240,
        },
    ),
    "squeezenet": Family(
        full={
            "squeezenet1_0_bypass": dict(
                fires=4, pools=(0, 3), base=32, increment=32, num_classes=10
            ),
            "squeezenet1_0_complex_bypass": dict(
                fires=4, pools=(0, 3), base=32, increment=32, num_classes=10
            ),
            "squeezenet1_1": dict(base=32, increment=32, num_classes=10),
        },
        reduce=lambda a: dict(base=32, increment=32, num_classes=10),
        parameters={"squeezenet1_0": 1_248_424, "squeezenet1_1": 1_235_496},
        libraries={"torchvision/squeezenet1_1": {}},
    ),
    "highway": Family(
        full={
            "highway_mlp": dict(depth=4),
            "highway_mlp_linear": dict(depth=4, activation="tanh"),
            "highway19_cifar": dict(widths=(8, 12), highways=(2, 1)),
        },
        reduce=lambda a: dict(highways=(2, 2, 2)),
        image=28,
        parameters={"highway19_cifar": 2_256_838, "highway32_cifar": 1_255_270},
    ),
    "googlenet": Family(
        full={  # the paper's heads take images of 224 pixels alone: tests/test_inception.py
            "googlenet": dict(transform_input=True),
            "googlenet_2014": dict(aux_logits=False),
        },
        parameters={"googlenet": 13_004_888, "googlenet_2014": 13_378_280},
        libraries={"torchvision/googlenet": {}},
    ),
    "resnet": Family(
        full={
            "resnet18": dict(depths=(1, 1, 1, 1)),
            "resnet50": dict(depths=(1, 1, 1, 1)),
            "resnet20_cifar": dict(depths=(1, 1, 1)),
        },
        reduce=lambda a: dict(depths=(1,) * len(a["depths"])),
        parameters={"resnet18": 11_689_512, "resnet50": 25_557_032, "resnet20_cifar": 269_722},
        libraries={"torchvision/resnet18": {}, "timm/resnet26": {}},
    ),
    "inception_v3": Family(
        full={  # the head takes images of 299 pixels: tests/test_inception.py
            "inception_v3": dict(aux_logits=False, transform_input=True),
        },
        image=139,
        parameters={"inception_v3": 27_161_264},
        libraries={"timm/inception_v3": {}},
    ),
    "inception_v4": Family(
        full={
            "inception_v4": dict(depths=(1, 1, 1)),
            "inception_resnet_v2": dict(depths=(1, 1, 1)),
        },
        reduce=lambda a: dict(depths=(1, 1, 1)),
        image=139,
        parameters={"inception_v4": 42_679_816, "inception_resnet_v2": 55_843_464},
    ),
    "densenet": Family(
        full={
            "densenet121": dict(depths=(1, 2, 1)),
            "densenet40_k12_cifar": dict(depths=(2, 1)),
        },
        reduce=lambda a: dict(depths=(2,) + (1,) * (len(a["depths"]) - 1)),
        parameters={
            "densenet121": 7_978_856,
            "densenet161": 28_681_000,
            "densenet169": 14_149_480,
            "densenet201": 20_013_928,
            "densenet40_k12_cifar": 1_019_722,
            "densenet_bc100_k12_cifar": 769_162,
        },
        libraries={"timm/densenet121": dict(block_config=(2, 2, 2, 2))},  # all is 60 s of compiling
    ),
    "xception": Family(
        full={"xception": dict(middle=1), "xception41": dict(middle=1)},
        reduce=lambda a: dict(middle=1),
        parameters={
            "xception": 22_855_952,
            "xception41": 26_969_560,
            "xception65": 39_916_312,
            "xception71": 42_338_736,
        },
        libraries={"timm/legacy_xception": {}},
    ),
    "resnext": Family(
        full={
            "resnext50_32x4d": dict(depths=(1, 1, 1, 1)),
            "resnext29_8x64d_cifar": dict(
                depths=(1, 1), widths=(64, 128), widening=3, cardinality=4, base_width=16
            ),
        },
        reduce=lambda a: dict(depths=(1,) * len(a["depths"])),
        image={"default": 64, "resnext29_8x64d_cifar": 16, "resnext29_16x64d_cifar": 16},
        parameters={"resnext50_32x4d": 25_028_904, "resnext29_8x64d_cifar": 34_426_698},
        libraries={"torchvision/resnext50_32x4d": {}},
    ),
    "mobilenet_v1": Family(
        full={"mobilenetv1_025": dict(depths=(1, 2, 1, 1, 1))},
        reduce=lambda a: dict(depths=(1, 1, 1, 1, 1)),
        parameters={"mobilenetv1_100": 4_231_976, "mobilenetv1_125": 6_270_840},
        libraries={"timm/mobilenetv1_100": {}},
    ),
    "shufflenet": Family(
        full={
            "shufflenet_v1_x0_5_g3": dict(depths=(2, 1, 1)),
            "shufflenet_v2_x0_5": dict(depths=(2, 1, 1)),
        },
        reduce=lambda a: dict(depths=(1, 2, 1)),
        parameters={
            "shufflenet_v1_x1_0_g3": 1_864_728,
            "shufflenet_v1_x1_0_g8": 2_433_768,
            "shufflenet_v2_x0_5": 1_366_792,
            "shufflenet_v2_x1_0": 2_278_604,
            "shufflenet_v2_x1_5": 3_503_624,
            "shufflenet_v2_x2_0": 7_393_996,
        },
        libraries={"torchvision/shufflenet_v2_x0_5": {}},
    ),
    "senet": Family(
        full={
            "seresnet18": dict(depths=(1, 1, 1, 1)),
            "seresnext50_32x4d": dict(depths=(1, 1, 1, 1)),
            "senet154": dict(depths=(1, 1, 1, 1), groups=8),
            "legacy_seresnet18": dict(depths=(1, 1, 1, 1)),
            "legacy_seresnet50": dict(depths=(1, 1, 1, 1)),
            "legacy_seresnext26_32x4d": dict(depths=(1, 1, 1, 1)),
            "legacy_senet154": dict(depths=(1, 1, 1, 1), groups=8),
            "se_inception_v3": dict(aux_logits=False),
        },
        reduce=lambda a: dict(depths=(1, 1, 1, 1)),
        image={"default": 64, "se_inception_v3": 139},
        parameters={
            "seresnet50": 28_088_024,
            "legacy_seresnet50": 28_088_024,
            "senet154": 115_088_984,
            "legacy_senet154": 115_088_984,
        },
        libraries={"timm/seresnet18": {}, "timm/legacy_seresnet18": dict(drop_rate=0.0)},
    ),
    "mobilenet_v2": Family(
        full={"mobilenet_v2": dict(depths=(1, 2, 1, 1, 1, 1, 1))},
        reduce=lambda a: dict(depths=(1, 2, 1, 1, 1, 1, 1)),
        parameters={"mobilenet_v2": 3_504_872, "mobilenetv2_140": 6_108_776},
        libraries={"timm/mobilenetv2_035": {}},
    ),
    "cbam": Family(
        full={
            "cbam_resnet18": dict(depths=(1, 1, 1, 1)),
            "cbam_resnet50": dict(depths=(1, 1, 1, 1)),
        },
        reduce=lambda a: dict(depths=(1, 1, 1, 1)),
        parameters={"cbam_resnet50": 28_089_624},
    ),
    "mobilenet_v3": Family(
        full={
            "mobilenet_v3_small": dict(rows=_ends(SMALL)),
            "mobilenetv3_rw": dict(rows=_ends(LARGE)),
            "tf_mobilenetv3_small_100": dict(rows=_ends(SMALL)),
            "tf_mobilenetv3_small_minimal_100": dict(rows=_ends(SMALL)),
        },
        reduce=lambda a: dict(rows=_ends(a["rows"])),
        parameters={"mobilenet_v3_large": 5_483_032, "mobilenet_v3_small": 2_542_856},
        libraries={"torchvision/mobilenet_v3_small": {}, "timm/tf_mobilenetv3_small_075": {}},
    ),
    "vit": Family(
        full={
            "vit_tiny_patch16_224": dict(image_size=32, depth=2),
            "vit_b_16": dict(image_size=32, depth=1, pool="mean", representation_size=24),
            "deit_tiny_distilled_patch16_224": dict(
                image_size=32, depth=1, distilled_training=True
            ),
        },
        reduce=lambda a: dict(image_size=2 * a["patch_size"], depth=1),
        parameters={"vit_b_16": 86_567_656},
        libraries={
            "torchvision/vit_b_32": dict(image_size=64),
            "timm/vit_tiny_patch16_224": dict(img_size=32),
            "timm/deit_tiny_distilled_patch16_224": dict(img_size=32),
        },
    ),
}


def in_ours(arguments: Overrides) -> Overrides:
    """What a library's arguments, of `Family.libraries`, are called here where shapes hide them."""
    names = {"block_config": "depths"}
    return {names[name]: value for name, value in arguments.items() if name in names}
