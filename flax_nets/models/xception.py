"""Xception (Chollet 2016, https://arxiv.org/abs/1610.02357).

Attribute names are timm's. `Xception` is Figure 5 as timm's `legacy_xception` has it: a stem
without padding, batch norms of epsilon 1e-5 and no dropout (the paper: 0.5). `XceptionAligned` is
the form that DeepLab v3+ made of it (Chen et al. 2018, https://arxiv.org/abs/1802.02611, section
3.2): deeper, strided separable convolutions for max pooling, and a batch norm after each depthwise.
"""

import jax
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


class SeparableConv2d(nnx.Module):
    """3x3 depthwise, then 1x1, nothing between them (section 3).

    Call: x [N, H, W, in_channels] -> [N, H, W, channels].
    """

    def __init__(self, in_channels: int, channels: int, *, rngs: nnx.Rngs | None):
        self.conv1 = layers.Conv(
            in_channels, in_channels, 3, padding=1, groups=in_channels, bias=False, rngs=rngs
        )
        self.pointwise = layers.Conv(in_channels, channels, 1, bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.pointwise(self.conv1(x))


class Block(nnx.Module):
    """ReLU, separable convolution and batch norm, once per entry of `widths`, and a skip.

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, widths[-1]].
    """

    def __init__(self, in_channels, widths, stride=1, start_with_relu=True, *, rngs):
        if stride != 1 or in_channels != widths[-1]:
            self.skip = layers.Conv(
                in_channels, widths[-1], 1, stride=stride, bias=False, rngs=rngs
            )
            self.skipbn = layers.BatchNorm(widths[-1], rngs=rngs)
        else:
            self.skip = None
        parts = []
        for i, width in enumerate(widths):
            if i > 0 or start_with_relu:
                parts.append(relu)
            parts += [
                SeparableConv2d(in_channels, width, rngs=rngs),
                layers.BatchNorm(width, rngs=rngs),
            ]
            in_channels = width
        if stride != 1:
            parts.append(layers.MaxPool(3, stride, 1))
        self.rep = layers.Sequential(*parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        identity = x if self.skip is None else self.skipbn(self.skip(x))
        return self.rep(x) + identity


class Xception(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    Args:
      middle: blocks of the middle flow. Default 8.
      dropout: before the last layer. Default 0; the paper trains with 0.5.
    """

    input_layer, output_layers, image_size = "conv1", ("fc",), 299

    def __init__(
        self,
        middle: int = 8,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.conv1 = layers.Conv(in_channels, 32, 3, stride=2, bias=False, rngs=rngs)
        self.bn1 = layers.BatchNorm(32, rngs=rngs)
        self.conv2 = layers.Conv(32, 64, 3, bias=False, rngs=rngs)
        self.bn2 = layers.BatchNorm(64, rngs=rngs)
        blocks = [
            Block(64, (128, 128), 2, start_with_relu=False, rngs=rngs),
            Block(128, (256, 256), 2, rngs=rngs),
            Block(256, (728, 728), 2, rngs=rngs),
            *(Block(728, (728, 728, 728), rngs=rngs) for _ in range(middle)),
            Block(728, (728, 1024), 2, rngs=rngs),
        ]
        self.blocks = tuple(f"block{i + 1}" for i in range(len(blocks)))
        for name, block in zip(self.blocks, blocks, strict=True):
            setattr(self, name, block)
        self.conv3 = SeparableConv2d(1024, 1536, rngs=rngs)
        self.bn3 = layers.BatchNorm(1536, rngs=rngs)
        self.conv4 = SeparableConv2d(1536, 2048, rngs=rngs)
        self.bn4 = layers.BatchNorm(2048, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.Linear(2048, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self._initialise(rngs)

    def _initialise(self, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape), rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = relu(self.bn1(self.conv1(x)))
        x = relu(self.bn2(self.conv2(x)))
        x = layers.chain((getattr(self, name) for name in self.blocks), x)
        x = relu(self.bn3(self.conv3(x)))
        x = relu(self.bn4(self.conv4(x)))
        x = layers.global_avg_pool(x)
        return self.fc(self.dropout(x))


EPS = 1e-3  # of every batch norm in the aligned networks


def conv_norm(in_channels, channels, kernel_size, stride=1, *, rngs, **more) -> layers.Sequential:
    """Convolution and batch norm, and what `more` names."""
    return layers.Sequential(
        conv=layers.Conv(
            in_channels, channels, kernel_size, stride, kernel_size // 2, bias=False, rngs=rngs
        ),
        bn=layers.BatchNorm(channels, eps=EPS, rngs=rngs),
        **more,
    )


class AlignedSeparableConv2d(nnx.Module):
    """3x3 depthwise and 1x1, each with a batch norm, and with a ReLU where `relu` says so.

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, channels].
    """

    def __init__(self, in_channels, channels, stride=1, relu=False, *, rngs):
        self.relu = relu
        self.conv_dw = layers.Conv(
            in_channels,
            in_channels,
            3,
            stride,
            padding=1,
            groups=in_channels,
            bias=False,
            rngs=rngs,
        )
        self.bn_dw = layers.BatchNorm(in_channels, eps=EPS, rngs=rngs)
        self.conv_pw = layers.Conv(in_channels, channels, 1, bias=False, rngs=rngs)
        self.bn_pw = layers.BatchNorm(channels, eps=EPS, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.bn_dw(self.conv_dw(x))
        x = self.bn_pw(self.conv_pw(relu(x) if self.relu else x))
        return relu(x) if self.relu else x


class XceptionModule(nnx.Module):
    """Three separable convolutions, the last one strided, and a skip (none in the last module).

    Call: x [N, H, W, in_channels] -> [N, H/stride, W/stride, widths[-1]].
    """

    def __init__(self, in_channels, widths, stride=1, skip=True, *, rngs):
        self.skip = skip
        if skip and (stride != 1 or in_channels != widths[-1]):
            self.shortcut = conv_norm(in_channels, widths[-1], 1, stride, rngs=rngs)
        else:
            self.shortcut = None
        parts = {}
        for i, width in enumerate(widths):
            if skip:
                parts[f"act{i + 1}"] = relu
            parts[f"conv{i + 1}"] = AlignedSeparableConv2d(
                in_channels, width, stride if i == 2 else 1, relu=not skip, rngs=rngs
            )
            in_channels = width
        self.stack = layers.Sequential(**parts)

    def __call__(self, x: jax.Array) -> jax.Array:
        identity = x if self.shortcut is None else self.shortcut(x)
        x = self.stack(x)
        return x + identity if self.skip else x


class XceptionAligned(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    Args:
      entry: (channels, stride) of each module of the entry flow.
      middle: modules of the middle flow. Default 8.
      dropout: before the last layer. Default 0.
    """

    input_layer, output_layers, image_size = "stem.0.conv", ("head.fc",), 299

    def __init__(
        self,
        entry: tuple[tuple[int, int], ...] = ((128, 2), (256, 2), (728, 2)),
        middle: int = 8,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.stem = layers.Sequential(
            conv_norm(in_channels, 32, 3, 2, act=relu, rngs=rngs),
            conv_norm(32, 64, 3, act=relu, rngs=rngs),
        )
        blocks, channels_in = [], 64
        for channels, stride in entry:
            blocks.append(XceptionModule(channels_in, (channels,) * 3, stride, rngs=rngs))
            channels_in = channels
        blocks += [
            XceptionModule(channels_in, (channels_in,) * 3, rngs=rngs) for _ in range(middle)
        ]
        blocks.append(XceptionModule(channels_in, (728, 1024, 1024), 2, rngs=rngs))
        blocks.append(XceptionModule(1024, (1536, 1536, 2048), skip=False, rngs=rngs))
        self.blocks = layers.Sequential(*blocks)
        self.head = layers.Sequential(
            drop=layers.Dropout(dropout, rngs=rngs),
            fc=layers.Linear(2048, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.blocks(self.stem(x))
        x = layers.global_avg_pool(x)
        return self.head(x)


NETWORK = "Xception"

VARIANTS = {  # Xception: Figure 5; xception65: Chen et al. 2018, Figure 4; 41 and 71: timm's
    "xception": dict(),
    "xception41": dict(network="XceptionAligned"),
    "xception65": dict(network="XceptionAligned", middle=16),
    "xception71": dict(
        network="XceptionAligned",
        entry=((128, 2), (256, 1), (256, 2), (728, 1), (728, 2)),
        middle=16,
    ),
}
