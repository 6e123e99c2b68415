"""GoogLeNet (Szegedy et al. 2014, https://arxiv.org/abs/1409.4842), Table 1.

Attribute names are torchvision's. `googlenet` is torchvision's network: batch norm (epsilon 1e-3)
in place of biases and of local response normalisation, 3x3 where the paper has 5x5, a 2x2 fourth
pooling, and auxiliary heads that pool adaptively. `googlenet_2014` is the paper's; what the paper
leaves open (the constants of the normalisation, the initial values) is as in BVLC's Caffe model.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


class GoogLeNetOutputs(NamedTuple):
    """What the network returns in train mode, each [N, num_classes], in torchvision's order."""

    logits: jax.Array
    aux_logits2: jax.Array
    aux_logits1: jax.Array


class Inception(nnx.Module):
    """Figure 2(b): four branches, 1x1 reductions before the costly ones.

    Call: x [N, H, W, in_channels] -> [N, H, W, ch1x1 + ch3x3 + ch5x5 + pool_proj].

    Args:
      ch1x1: channels of the first branch, a 1x1.
      red3x3, ch3x3: of the second, a 1x1 and a 3x3.
      red5x5, ch5x5: of the third, a 1x1 and the paper's 5x5, which torchvision has as a 3x3.
      pool_proj: of the fourth, max pooling and a 1x1.
      original: whether it is the paper's, with biases and no batch norm. Default False:
        torchvision's.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        red3x3: int,
        ch3x3: int,
        red5x5: int,
        ch5x5: int,
        pool_proj: int,
        original: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        conv = partial(layers.BasicConv2d, batch_norm=not original, rngs=rngs)
        large = 5 if original else 3
        self.branch1 = conv(in_channels, ch1x1, 1)
        self.branch2 = layers.Sequential(
            conv(in_channels, red3x3, 1),
            conv(red3x3, ch3x3, 3, padding=1),
        )
        self.branch3 = layers.Sequential(
            conv(in_channels, red5x5, 1),
            conv(red5x5, ch5x5, large, padding=large // 2),
        )
        self.branch4 = layers.Sequential(
            layers.MaxPool(3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, 1),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        branches = (self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x))
        return jnp.concatenate(branches, -1)


class InceptionAux(nnx.Module):
    """The auxiliary classifier on top of 4a and 4d (section 5).

    Call: x [N, H, W, in_channels] -> [N, num_classes]. The paper's takes maps of 14 to 16 pixels.
    """

    def __init__(self, in_channels, num_classes, dropout, original, *, rngs):
        self.pool = layers.AvgPool(5, stride=3) if original else layers.AdaptiveAvgPool(4)
        self.conv = layers.BasicConv2d(in_channels, 128, 1, batch_norm=not original, rngs=rngs)
        self.fc1 = layers.Linear(128 * 4 * 4, 1024, rngs=rngs)
        self.fc2 = layers.Linear(1024, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self.dropout = layers.Dropout(dropout, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.conv(self.pool(x))
        x = layers.flatten(x)  # [N, 128 * 4 * 4]
        x = relu(self.fc1(x))
        return self.fc2(self.dropout(x))


class GoogLeNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] (pooled features where that is 0).

    In train mode, with auxiliary heads, a `GoogLeNetOutputs`; the paper adds their losses to the
    network's own with a weight of 0.3.

    Args:
      original: whether it is the paper's network or torchvision's. Default False: torchvision's.
      aux_logits: whether it has the auxiliary heads. Default True.
      transform_input: whether images normalised as torchvision does are brought to [-1, 1] first,
        as torchvision's published weights expect. Default False.
      dropout: before the last layer. Default 0.2.
      dropout_aux: in the auxiliary heads. Default 0.7, and 0 where `dropout` is 0.
      local_norm: whether local response normalisation follows the first pooling and the third
        convolution. Default: where the network is the paper's.
      pool4: window of the fourth pooling. Default 3 in the paper's network, 2 in torchvision's.

    Raises ValueError for `transform_input` on other than 3 channels.
    """

    input_layer, output_layers = "conv1.conv", ("fc", "aux1.fc2", "aux2.fc2")
    aux_layers = ("aux1", "aux2")

    def __init__(
        self,
        original: bool = False,
        aux_logits: bool = True,
        transform_input: bool = False,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.2,
        dropout_aux: float | None = None,
        local_norm: bool | None = None,
        pool4: int | None = None,
        *,
        rngs: nnx.Rngs | None,
    ):
        if transform_input and in_channels != 3:
            raise ValueError(f"transform_input needs in_channels=3, got in_channels={in_channels}")
        self.transform_input = transform_input
        self.deterministic = False
        if dropout_aux is None:
            dropout_aux = 0.7 if dropout else 0.0
        local_norm = original if local_norm is None else local_norm
        pool4 = pool4 or (3 if original else 2)
        conv = partial(layers.BasicConv2d, batch_norm=not original, rngs=rngs)
        inception = partial(Inception, original=original, rngs=rngs)
        aux = partial(InceptionAux, dropout=dropout_aux, original=original, rngs=rngs)
        lrn = partial(layers.LocalResponseNorm, 5, alpha=1e-4, beta=0.75)
        norm = lrn if local_norm else layers.Identity
        self.conv1 = conv(in_channels, 64, 7, stride=2, padding=3)
        self.maxpool1 = layers.MaxPool(3, 2, ceil_mode=True)
        self.norm1 = norm()
        self.conv2 = conv(64, 64, 1)
        self.conv3 = conv(64, 192, 3, padding=1)
        self.norm2 = norm()
        self.maxpool2 = layers.MaxPool(3, 2, ceil_mode=True)
        self.inception3a = inception(192, 64, 96, 128, 16, 32, 32)
        self.inception3b = inception(256, 128, 128, 192, 32, 96, 64)
        self.maxpool3 = layers.MaxPool(3, 2, ceil_mode=True)
        self.inception4a = inception(480, 192, 96, 208, 16, 48, 64)
        self.inception4b = inception(512, 160, 112, 224, 24, 64, 64)
        self.inception4c = inception(512, 128, 128, 256, 24, 64, 64)
        self.inception4d = inception(512, 112, 144, 288, 32, 64, 64)
        self.inception4e = inception(528, 256, 160, 320, 32, 128, 128)
        self.maxpool4 = layers.MaxPool(pool4, 2, ceil_mode=True)
        self.inception5a = inception(832, 256, 160, 320, 32, 128, 128)
        self.inception5b = inception(832, 384, 192, 384, 48, 128, 128)
        self.aux1 = aux(512, num_classes) if aux_logits else None
        self.aux2 = aux(528, num_classes) if aux_logits else None
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.fc = layers.Linear(1024, num_classes, rngs=rngs) if num_classes else layers.Identity()
        self._initialise(original, rngs)

    def _initialise(self, original, rngs):
        for path, module in nnx.iter_modules(self):
            if not isinstance(module, layers.Conv | layers.Linear):
                continue
            if original:  # Caffe's "xavier": uniform within sqrt(3 / fan_in)
                bound = math.sqrt(3 / init.fans(module.kernel.shape)[0])
                init.reinit(module.kernel, init.uniform(bound), rngs)
                classifier = ".".join(map(str, path)) in self.output_layers
                init.reinit(module.bias, init.constant(0.0 if classifier else 0.2), rngs)
            else:
                init.reinit(module.kernel, init.trunc_normal(std=0.01), rngs)

    def __call__(self, x: jax.Array) -> jax.Array | GoogLeNetOutputs:
        if self.transform_input:
            x = layers.transform_input(x)
        heads = not self.deterministic and self.aux1 is not None
        x = self.norm1(self.maxpool1(self.conv1(x)))  # [N, H/4, W/4, 64]
        x = self.maxpool2(self.norm2(self.conv3(self.conv2(x))))  # [N, H/8, W/8, 192]
        x = self.inception3b(self.inception3a(x))
        x = self.inception4a(self.maxpool3(x))  # [N, H/16, W/16, 512]
        aux1 = self.aux1(x) if heads else None
        x = self.inception4d(self.inception4c(self.inception4b(x)))
        aux2 = self.aux2(x) if heads else None
        x = self.maxpool4(self.inception4e(x))
        x = self.inception5b(self.inception5a(x))  # [N, H/32, W/32, 1024]
        x = layers.global_avg_pool(x)
        x = self.fc(self.dropout(x))
        return GoogLeNetOutputs(x, aux2, aux1) if heads else x


NETWORK = "GoogLeNet"

VARIANTS = {
    "googlenet": dict(),
    "googlenet_2014": dict(original=True, dropout=0.4),  # dropout: Table 1
}
