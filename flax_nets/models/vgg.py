"""VGG (Simonyan & Zisserman 2014, https://arxiv.org/abs/1409.1556).

Attribute names are torchvision's. The paper has no batch norm (the `_bn` forms are torchvision's)
and starts the deeper networks from configuration A, where the references draw once and for all.
"""

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers, lowering
from flax_nets.layers import init, relu

HEADS = ("dense", "conv")


class Dense(layers.Linear):
    """A dense layer over `size` x `size` windows, which also slides over larger maps (section 3.2).

    [N, in_features] -> [N, out_features], or a map [N, H, W, C], where C * size^2 = in_features,
    -> [N, H - size + 1, W - size + 1, out_features].
    """

    def __init__(self, in_features, out_features, size=1, *, rngs):
        super().__init__(in_features, out_features, rngs=rngs)
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        if x.ndim == 2:
            return super().__call__(x)
        if x.shape[1:3] == (self.size, self.size):  # one window: no kernel to lay out anew
            return super().__call__(layers.flatten(x))[:, None, None, :]
        kernel = self.kernel[...].reshape(-1, self.size, self.size, self.out_features)
        kernel = jnp.transpose(kernel, (1, 2, 0, 3))  # [C, H, W, O] -> [H, W, C, O]
        dtype = self.dtype or kernel.dtype
        y = lowering.conv(x.astype(dtype), kernel.astype(dtype))
        return y + layers.along_last(self.bias[...].astype(dtype), 4)


class AtLeast(nnx.Module):
    """Stretches maps smaller than `size` x `size` (adaptive average pooling), and keeps others."""

    def __init__(self, size: int):
        self.size = size

    def __call__(self, x: jax.Array) -> jax.Array:
        size = max(x.shape[1], self.size), max(x.shape[2], self.size)
        return x if size == x.shape[1:3] else lowering.adaptive_avg_pool(x, size)


class VGG(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] ([N, hidden] where that is 0).

    Args:
      depths, widths: convolutions and channels of each of the five stages.
      batch_norm: whether one follows each convolution. Default False.
      pointwise: whether the last convolution of the last three stages is 1x1 (configuration C).
      hidden: width of the two dense layers before the last.
      head: what other image sizes than 224 meet: "dense" (default, torchvision's) pools the last
        map to 7x7; "conv" (timm's, and the paper's dense evaluation) slides the dense layers over
        it as convolutions and takes the mean of the class scores. The parameters are the same.
      dropout: after each of the two hidden dense layers. Default 0.5.

    Raises ValueError for another head.
    """

    input_layer, output_layers = "features.0", ("classifier.6",)

    def __init__(
        self,
        depths: tuple[int, ...],
        widths: tuple[int, ...] = (64, 128, 256, 512, 512),
        batch_norm: bool = False,
        pointwise: bool = False,
        hidden: int = 4096,
        head: str = "dense",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs | None,
    ):
        layers.choose("head", head, dict.fromkeys(HEADS))
        features = []
        for stage, (depth, channels) in enumerate(zip(depths, widths, strict=True)):
            for i in range(depth):
                kernel = 1 if pointwise and stage >= 2 and i == depth - 1 else 3
                features.append(
                    layers.Conv(in_channels, channels, kernel, padding=kernel // 2, rngs=rngs)
                )
                if batch_norm:
                    features.append(layers.BatchNorm(channels, rngs=rngs))
                features.append(relu)
                in_channels = channels
            features.append(layers.MaxPool(2))
        self.features = layers.Sequential(*features)
        self.avgpool = layers.AdaptiveAvgPool(7) if head == "dense" else AtLeast(7)
        self.classifier = layers.Sequential(
            Dense(in_channels * 7 * 7, hidden, size=7, rngs=rngs),
            relu,
            layers.Dropout(dropout, rngs=rngs),
            Dense(hidden, hidden, rngs=rngs),
            relu,
            layers.Dropout(dropout, rngs=rngs),
            Dense(hidden, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )
        self.head = head
        self._initialise(rngs)

    def _initialise(self, rngs):
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Conv):
                init.reinit(module.kernel, init.kaiming_normal(module.kernel.shape), rngs)
                init.reinit(module.bias, init.zeros, rngs)
            elif isinstance(module, Dense):
                hidden = module is not self.classifier[6]
                kernels = hidden and self.head == "conv"  # timm draws these as convolutions
                std = (2 / (module.out_features * module.size**2)) ** 0.5 if kernels else 0.01
                init.reinit(module.kernel, init.normal(std), rngs)
                init.reinit(module.bias, init.zeros, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.avgpool(self.features(x))
        if self.head == "dense":
            return self.classifier(layers.flatten(x))
        return self.slide(x)

    def slide(self, x: jax.Array) -> jax.Array:
        """The head as convolutions: class scores for each window of 7x7, and their mean."""
        return layers.global_avg_pool(self.classifier(x))


def rescale(images: jax.Array, size: int) -> jax.Array:
    """Images [N, H, W, C] with their shorter side resized to `size`, antialiased."""
    height, width = images.shape[1:3]
    scale = size / min(height, width)
    shape = (images.shape[0], round(height * scale), round(width * scale), images.shape[3])
    return jax.image.resize(images, shape, "bilinear")


def mirrored(images: jax.Array) -> jax.Array:
    """Images [N, H, W, C] and their mirror images -> [2 * N, H, W, C]."""
    return jnp.concatenate([images, images[:, :, ::-1]])


def scale_jitter(
    images: jax.Array, key: jax.Array, size: int = 224, scales: tuple[int, int] = (256, 512)
) -> jax.Array:
    """Multi-scale training (section 3.1): each image at a random scale, then a random crop of it.

    Images [N, H, W, C] -> [N, size, size, C]; the shorter side becomes a random number of pixels
    within `scales`, both included. The paper also flips, and shifts colours as AlexNet does.

    >>> import jax
    >>> from flax_nets.models.vgg import scale_jitter
    >>> scale_jitter(jax.numpy.ones((2, 300, 400, 3)), jax.random.key(0)).shape
    (2, 224, 224, 3)
    """

    def view(image: jax.Array, key: jax.Array) -> jax.Array:
        for_scale, for_crop = jax.random.split(key)
        side = jax.random.randint(for_scale, (), scales[0], scales[1] + 1).astype(image.dtype)
        factor = side / min(image.shape[:2])
        whole = factor * jnp.array(image.shape[:2], image.dtype)
        corner = jax.random.uniform(for_crop, (2,), image.dtype) * (whole - size)
        shape, factors = (size, size, image.shape[2]), jnp.stack([factor, factor])
        return jax.image.scale_and_translate(image, shape, (0, 1), factors, -corner, "bilinear")

    if size > scales[0]:
        raise ValueError(f"crops of {size} pixels do not fit into a side of {scales[0]}")
    return jax.vmap(view)(images, jax.random.split(key, images.shape[0]))


def dense_evaluation(
    model: VGG, images: jax.Array, sizes: Sequence[int] = (256, 384, 512)
) -> jax.Array:
    """Class probabilities [N, num_classes] over whole images, the mean of scales and flips.

    Section 3.2: at each scale the dense layers slide over the whole image as convolutions, whatever
    `model.head` is. The default `sizes`, of the shorter side, are those of Table 4 for a network
    trained on scales from 256 to 512; one trained on S alone is tested on S - 32, S and S + 32.

    >>> import jax, flax_nets
    >>> from flax_nets.models.vgg import dense_evaluation
    >>> small = dict(widths=(4, 4, 4, 4, 4), hidden=8, num_classes=3)
    >>> model = flax_nets.create_model("vgg11", **small)
    >>> dense_evaluation(model, jax.numpy.ones((1, 48, 64, 3)), sizes=(224,)).shape
    (1, 3)
    """
    means = []
    for size in sizes:
        x = mirrored(rescale(images, size))
        probabilities = jax.nn.softmax(model.slide(model.features(x)), -1)  # [2 * N, num_classes]
        means.append(jnp.mean(probabilities.reshape(2, len(images), -1), 0))
    return sum(means) / len(means)


def multi_crop_evaluation(
    model: VGG,
    images: jax.Array,
    sizes: Sequence[int] = (256, 384, 512),
    crop: int = 224,
    grid: int = 5,
) -> jax.Array:
    """Class probabilities [N, num_classes], the mean of scales, flips and a grid of crops.

    Table 5: 50 crops at each of three scales. The mean of this and `dense_evaluation` is the
    paper's best, since the two meet the image's border differently (section 3.2).

    Raises ValueError where a crop is larger than a scale.
    """
    if crop > min(sizes):
        raise ValueError(f"crops of {crop} pixels do not fit into a side of {min(sizes)}")
    means = []
    for size in sizes:
        x = rescale(images, size)
        tops = [round(i * (x.shape[1] - crop) / (grid - 1)) for i in range(grid)]
        lefts = [round(i * (x.shape[2] - crop) / (grid - 1)) for i in range(grid)]
        corners = itertools.product(tops, lefts)
        windows = jnp.stack([x[:, i : i + crop, j : j + crop] for i, j in corners])
        probabilities = jax.lax.map(lambda x: jax.nn.softmax(model(mirrored(x)), -1), windows)
        means.append(jnp.mean(probabilities.reshape(2 * grid**2, len(images), -1), 0))
    return sum(means) / len(means)


NETWORK = "VGG"

VARIANTS = {  # Table 1: configurations A, B, C, D and E
    "vgg11": dict(depths=(1, 1, 2, 2, 2)),
    "vgg11_bn": dict(depths=(1, 1, 2, 2, 2), batch_norm=True),
    "vgg13": dict(depths=(2, 2, 2, 2, 2)),
    "vgg13_bn": dict(depths=(2, 2, 2, 2, 2), batch_norm=True),
    "vgg16": dict(depths=(2, 2, 3, 3, 3)),
    "vgg16_bn": dict(depths=(2, 2, 3, 3, 3), batch_norm=True),
    "vgg16_c": dict(depths=(2, 2, 3, 3, 3), pointwise=True),
    "vgg19": dict(depths=(2, 2, 4, 4, 4)),
    "vgg19_bn": dict(depths=(2, 2, 4, 4, 4), batch_norm=True),
}
