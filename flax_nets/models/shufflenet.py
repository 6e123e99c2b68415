"""ShuffleNet (Zhang et al. 2017, https://arxiv.org/abs/1707.01083) and ShuffleNet-v2 (Ma et al.
2018, https://arxiv.org/abs/1807.11164).

Attribute names are the authors' (megvii-model/ShuffleNet-Series) for v1, torchvision's for v2.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """Channels as a table of `groups` rows, read column by column (Figure 1c).

    x [N, H, W, C] -> the same shape. Shuffling again with C / groups rows undoes it. Raises
    ValueError where `groups` does not divide C.
    """
    n, h, w, c = x.shape
    if c % groups:
        raise ValueError(f"{c} channels can't be a table of groups={groups} rows")
    x = x.reshape(n, h, w, groups, c // groups)
    return jnp.swapaxes(x, 3, 4).reshape(n, h, w, c)


class ShuffleV1Block(nnx.Module):
    """Grouped 1x1 down, 3x3 per channel, shuffle, grouped 1x1 up, and a skip (Figure 2b); with
    stride 2 the skip is an average pooling, and the two are stacked (Figure 2c).

    The shuffle is that of the authors' code: after the 3x3, where the paper has it before (the same
    network with its 3x3 kernels in another order), and with the table of channels transposed.

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].

    Args:
      channels: of the output; `in_channels` for a stride of 1, above it for 2.
      stride: 1 (default) or 2.
      groups: of the 1x1 convolutions. Default 3.
      first_groups: of the first of them. Default `groups`.

    Raises ValueError where `channels` does not suit `in_channels` and the stride.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int = 1,
        groups: int = 3,
        first_groups: int | None = None,
        *,
        rngs: nnx.Rngs | None,
    ):
        if (channels <= in_channels) if stride == 2 else (channels != in_channels):
            wanted = "above" if stride == 2 else "equal to"
            raise ValueError(
                f"with stride={stride} channels must be {wanted} in_channels={in_channels}, got "
                f"{channels}"
            )
        self.stride, self.groups = stride, groups
        first_groups = groups if first_groups is None else first_groups
        middle = channels // 4
        new = channels - in_channels if stride == 2 else channels
        self.branch_main_1 = layers.Sequential(
            layers.Conv(in_channels, middle, 1, groups=first_groups, bias=False, rngs=rngs),
            layers.BatchNorm(middle, rngs=rngs),
            relu,
            layers.Conv(middle, middle, 3, stride, padding=1, groups=middle, bias=False, rngs=rngs),
            layers.BatchNorm(middle, rngs=rngs),
        )
        self.branch_main_2 = layers.Sequential(
            layers.Conv(middle, new, 1, groups=groups, bias=False, rngs=rngs),
            layers.BatchNorm(new, rngs=rngs),
        )
        self.branch_proj = (
            layers.AvgPool(3, stride=2, padding=1) if stride == 2 else layers.Identity()
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        identity = self.branch_proj(x)
        x = self.branch_main_1(x)
        x = channel_shuffle(x, x.shape[-1] // self.groups)
        x = self.branch_main_2(x)
        if self.stride == 2:
            return jnp.concatenate((identity, relu(x)), -1)  # in_channels, then the new ones
        return relu(x + identity)


class ShuffleNetV1(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where it is 0).

    Args:
      groups: of the 1x1 convolutions, all but the very first. Default 3.
      depths: blocks per stage.
      widths: channels of the stem and of each stage.
      dropout: before the last layer. Default 0.
    """

    input_layer, output_layers = "first_conv.0", ("classifier.0",)

    def __init__(
        self,
        groups: int = 3,
        depths: tuple[int, ...] = (4, 8, 4),
        widths: tuple[int, ...] = (24, 240, 480, 960),
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        if len(widths) != len(depths) + 1:
            raise ValueError(f"widths={widths} must be one longer than depths={depths}: the stem's")
        if any(channels % (4 * groups) for channels in widths[1:]):
            raise ValueError(
                f"a quarter of each stage's channels must split into groups={groups}, "
                f"got widths={widths}"
            )
        channels_in, *stage_widths = widths
        self.first_conv = layers.Sequential(
            layers.Conv(in_channels, channels_in, 3, stride=2, padding=1, bias=False, rngs=rngs),
            layers.BatchNorm(channels_in, rngs=rngs),
            relu,
        )
        self.maxpool = layers.MaxPool(3, 2, 1)
        features = []
        for depth, channels in zip(depths, stage_widths, strict=True):
            for j in range(depth):
                stride = 2 if j == 0 else 1
                first_groups = groups if features else 1  # too few channels come in to be split
                block = ShuffleV1Block(
                    channels_in, channels, stride, groups, first_groups, rngs=rngs
                )
                features.append(block)
                channels_in = channels
        self.features = layers.Sequential(*features)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.classifier = layers.Sequential(
            layers.Linear(channels_in, num_classes, bias=False, rngs=rngs)
            if num_classes
            else layers.Identity()
        )
        self._initialise(rngs)

    def _initialise(self, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                init.reinit(module.kernel, init.normal(1 / module.kernel.shape[2]), rngs)
            elif isinstance(module, layers.BatchNorm):
                init.reinit(module.bias, init.constant(1e-4), rngs)
            elif isinstance(module, layers.Linear):
                init.reinit(module.kernel, init.normal(0.01), rngs)
        init.reinit(self.first_conv[0].kernel, init.normal(0.01), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.first_conv(x)
        x = self.maxpool(x)
        x = self.features(x)
        x = layers.global_avg_pool(x)
        return self.classifier(self.dropout(x))


class InvertedResidual(nnx.Module):
    """One half of the channels passes, the other takes 1x1, 3x3 per channel, 1x1 (v2, Figure 3c);
    with stride 2 both branches see all channels (Figure 3d). Then a shuffle of the two.

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels]. `authors` as in
    `ShuffleNetV2`.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        stride: int,
        authors: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        if channels % 2:
            raise ValueError(f"each branch takes half of the channels, got {channels}")
        self.stride, self.authors = stride, authors
        n, half = in_channels, channels // 2
        left = n if authors and stride == 2 else half  # channels that the first branch gives
        if stride == 1:
            self.branch1 = layers.Sequential()
        else:
            self.branch1 = layers.Sequential(
                layers.Conv(n, n, 3, stride, 1, groups=n, bias=False, rngs=rngs),
                layers.BatchNorm(n, rngs=rngs),
                layers.Conv(n, left, 1, bias=False, rngs=rngs),
                layers.BatchNorm(left, rngs=rngs),
                relu,
            )
        self.branch2 = layers.Sequential(
            layers.Conv(half if stride == 1 else n, half, 1, bias=False, rngs=rngs),
            layers.BatchNorm(half, rngs=rngs),
            relu,
            layers.Conv(half, half, 3, stride, 1, groups=half, bias=False, rngs=rngs),
            layers.BatchNorm(half, rngs=rngs),
            layers.Conv(half, channels - left, 1, bias=False, rngs=rngs),
            layers.BatchNorm(channels - left, rngs=rngs),
            relu,
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.authors and self.stride == 1:
            x = channel_shuffle(x, x.shape[-1] // 2)  # even channels, then odd ones
        left, right = jnp.split(x, 2, -1) if self.stride == 1 else (x, x)
        x = jnp.concatenate((self.branch1(left), self.branch2(right)), -1)
        return x if self.authors else channel_shuffle(x, 2)


class ShuffleNetV2(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where it is 0).

    Args:
      depths: blocks per stage.
      widths: channels of the stem, of each stage and of the last 1x1 convolution.
      dropout: before the last layer. Default 0.
      authors: whether it is the network of the authors' PyTorch code: the first branch of a strided
        block keeps its number of channels, and the second gives the rest; blocks shuffle before
        their split and not at their end; the last layer has no bias. Default False: torchvision's.
    """

    input_layer, output_layers = "conv1.0", ("fc",)

    def __init__(
        self,
        depths: tuple[int, ...] = (4, 8, 4),
        widths: tuple[int, ...] = (24, 116, 232, 464, 1024),
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        authors: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        if len(widths) != len(depths) + 2:
            raise ValueError(
                f"widths={widths} must be two longer than depths={depths}: the stem's and conv5's"
            )
        channels_in, *stage_widths, features = widths
        self.conv1 = layers.Sequential(
            layers.Conv(in_channels, channels_in, 3, stride=2, padding=1, bias=False, rngs=rngs),
            layers.BatchNorm(channels_in, rngs=rngs),
            relu,
        )
        self.maxpool = layers.MaxPool(3, 2, 1)
        self.stages = tuple(f"stage{i + 2}" for i in range(len(depths)))
        for name, depth, channels in zip(self.stages, depths, stage_widths, strict=True):
            stage = []
            for j in range(depth):
                stride = 2 if j == 0 else 1
                stage.append(InvertedResidual(channels_in, channels, stride, authors, rngs=rngs))
                channels_in = channels
            setattr(self, name, layers.Sequential(*stage))
        self.conv5 = layers.Sequential(
            layers.Conv(channels_in, features, 1, bias=False, rngs=rngs),
            layers.BatchNorm(features, rngs=rngs),
            relu,
        )
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = (
            layers.Linear(features, num_classes, bias=not authors, rngs=rngs)
            if num_classes
            else layers.Identity()
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv1(x)
        x = self.maxpool(x)
        for stage in self.stages:
            x = getattr(self, stage)(x)
        x = self.conv5(x)
        x = layers.global_avg_pool(x)
        return self.fc(self.dropout(x))


NETWORK = "ShuffleNetV1"

V2 = "ShuffleNetV2"

VARIANTS = {  # v1: Tables 1 and 2, g1, g2 and g4 by the paper alone; v2: Table 5
    "shufflenet_v1_x0_5_g3": dict(groups=3, widths=(12, 120, 240, 480)),
    "shufflenet_v1_x1_0_g3": dict(groups=3, widths=(24, 240, 480, 960)),
    "shufflenet_v1_x1_5_g3": dict(groups=3, widths=(24, 360, 720, 1440)),
    "shufflenet_v1_x2_0_g3": dict(groups=3, widths=(48, 480, 960, 1920)),
    "shufflenet_v1_x0_5_g8": dict(groups=8, widths=(16, 192, 384, 768)),
    "shufflenet_v1_x1_0_g8": dict(groups=8, widths=(24, 384, 768, 1536)),
    "shufflenet_v1_x1_5_g8": dict(groups=8, widths=(24, 576, 1152, 2304)),
    "shufflenet_v1_x2_0_g8": dict(groups=8, widths=(48, 768, 1536, 3072)),
    "shufflenet_v1_x1_0_g1": dict(groups=1, widths=(24, 144, 288, 576)),
    "shufflenet_v1_x1_0_g2": dict(groups=2, widths=(24, 200, 400, 800)),
    "shufflenet_v1_x1_0_g4": dict(groups=4, widths=(24, 272, 544, 1088)),
    "shufflenet_v2_x0_5": dict(network=V2, widths=(24, 48, 96, 192, 1024)),
    "shufflenet_v2_x1_0": dict(network=V2, widths=(24, 116, 232, 464, 1024)),
    "shufflenet_v2_x1_5": dict(network=V2, widths=(24, 176, 352, 704, 1024)),
    "shufflenet_v2_x2_0": dict(network=V2, widths=(24, 244, 488, 976, 2048)),
}
