"""AlexNet (Krizhevsky et al. 2012, "ImageNet classification with deep convolutional networks").

`AlexNet` is torchvision's, with its attribute names: the single column of Krizhevsky 2014
(https://arxiv.org/abs/1404.5997), narrower, and without response normalisation. `AlexNet2012`
is the paper's (section 3, Figure 2), and its two GPUs are two groups.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init, relu


class AlexNet(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] ([N, hidden] where that is 0).

    Args:
      widths: channels of the five convolutions.
      hidden: width of the two dense layers before the last.
      dropout: before each of those two. Default 0.5.
    """

    input_layer, output_layers = "features.0", ("classifier.6",)

    def __init__(
        self,
        widths: tuple[int, ...] = (64, 192, 384, 256, 256),
        hidden: int = 4096,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs | None,
    ):
        a, b, c, d, e = widths
        self.features = layers.Sequential(
            layers.Conv(in_channels, a, 11, stride=4, padding=2, rngs=rngs),
            relu,
            layers.MaxPool(3, 2),
            layers.Conv(a, b, 5, padding=2, rngs=rngs),
            relu,
            layers.MaxPool(3, 2),
            layers.Conv(b, c, 3, padding=1, rngs=rngs),
            relu,
            layers.Conv(c, d, 3, padding=1, rngs=rngs),
            relu,
            layers.Conv(d, e, 3, padding=1, rngs=rngs),
            relu,
            layers.MaxPool(3, 2),
        )
        self.avgpool = layers.AdaptiveAvgPool(6)
        self.classifier = layers.Sequential(
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(e * 6 * 6, hidden, rngs=rngs),
            relu,
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(hidden, hidden, rngs=rngs),
            relu,
            layers.Linear(hidden, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.flatten(self.avgpool(x))
        return self.classifier(x)


class AlexNet2012(nnx.Module):
    """Images [N, H, W, in_channels] -> logits [N, num_classes] ([N, hidden] where that is 0).

    The paper's alpha, 1e-4, multiplies a sum over 5 channels and ours a mean: hence 5e-4.

    Args:
      widths, hidden: as in `AlexNet`; Figure 2 has half of each on each GPU.
      groups: of the second, fourth and fifth convolution. Default 2.
      dropout: after each of the two hidden dense layers. Default 0.5.
    """

    input_layer, output_layers = "features.0", ("classifier.6",)

    def __init__(
        self,
        widths: tuple[int, ...] = (96, 256, 384, 384, 256),
        hidden: int = 4096,
        groups: int = 2,
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.5,
        *,
        rngs: nnx.Rngs | None,
    ):
        a, b, c, d, e = widths
        self.features = layers.Sequential(
            layers.Conv(in_channels, a, 11, stride=4, padding=2, rngs=rngs),
            relu,
            layers.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            layers.MaxPool(3, 2),
            layers.Conv(a, b, 5, padding=2, groups=groups, rngs=rngs),
            relu,
            layers.LocalResponseNorm(5, alpha=5e-4, beta=0.75, k=2),
            layers.MaxPool(3, 2),
            layers.Conv(b, c, 3, padding=1, rngs=rngs),  # the one that sees both GPUs
            relu,
            layers.Conv(c, d, 3, padding=1, groups=groups, rngs=rngs),
            relu,
            layers.Conv(d, e, 3, padding=1, groups=groups, rngs=rngs),
            relu,
            layers.MaxPool(3, 2),
        )
        self.avgpool = layers.AdaptiveAvgPool(6)  # the identity at the paper's 224 pixels
        self.classifier = layers.Sequential(
            layers.Linear(e * 6 * 6, hidden, rngs=rngs),
            relu,
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(hidden, hidden, rngs=rngs),
            relu,
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(hidden, num_classes, rngs=rngs) if num_classes else layers.Identity(),
        )
        self._initialise(rngs)

    def _initialise(self, rngs):  # section 5: offsets of 1 give the ReLUs positive inputs early on
        for module in (*self.features, *self.classifier):
            if isinstance(module, layers.Conv | layers.Linear):
                init.reinit(module.kernel, init.normal(0.01), rngs)
                init.reinit(module.bias, init.zeros, rngs)
        second, fourth, fifth = self.features[4], self.features[10], self.features[12]
        for module in (second, fourth, fifth, self.classifier[0], self.classifier[3]):
            init.reinit(module.bias, init.ones, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.features(x)
        x = layers.flatten(self.avgpool(x))
        return self.classifier(x)


# Principal components of ImageNet's RGB values within [0, 1]: their sizes, and one per column.
SIZES = (0.2175, 0.0188, 0.0045)
COMPONENTS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))


def colour_noise(images: jax.Array, key: jax.Array, std: float = 0.1) -> jax.Array:
    """Shift the colours of each image along the principal components, at random (section 4.1).

    Images [N, H, W, 3] within [0, 1], not yet normalised. `std` is that of the normal number by
    which each component is multiplied.
    """
    amounts = std * jax.random.normal(key, (images.shape[0], 3), images.dtype)
    scaled = jnp.array(COMPONENTS, images.dtype) * jnp.array([SIZES], images.dtype)
    return images + (amounts @ scaled.T)[:, None, None, :]


def augment(images: jax.Array, key: jax.Array, size: int = 224) -> jax.Array:
    """The paper's training views (section 4.1): a random crop, mirrored or not, with colour noise.

    Images [N, H, W, 3] within [0, 1] -> [N, size, size, 3]; the paper's are 256 x 256.
    Raises ValueError for images smaller than `size`.

    >>> import jax
    >>> from flax_nets.models.alexnet import augment
    >>> augment(jax.numpy.ones((2, 256, 256, 3)), jax.random.key(0)).shape
    (2, 224, 224, 3)
    """
    count, height, width, channels = images.shape
    if min(height, width) < size:
        raise ValueError(f"crops of {size} pixels do not fit into images of {height} x {width}")
    for_crop, for_flip, for_colour = jax.random.split(key, 3)
    room = jnp.array([[height - size + 1, width - size + 1]])
    corners = jax.random.randint(for_crop, (count, 2), 0, room)
    flips = jax.random.bernoulli(for_flip, 0.5, (count,))

    def view(image: jax.Array, corner: jax.Array, flip: jax.Array) -> jax.Array:
        start = (corner[0], corner[1], jnp.zeros((), corner.dtype))
        image = jax.lax.dynamic_slice(image, start, (size, size, channels))
        return jnp.where(flip, image[:, ::-1], image)

    return colour_noise(jax.vmap(view)(images, corners, flips), for_colour)


def ten_crops(images: jax.Array, size: int = 224) -> jax.Array:
    """The paper's test views: four corners, the centre, and their mirror images (section 4.1).

    Images [N, H, W, C] -> [10, N, size, size, C]. The paper averages the ten softmax outputs.
    """
    bottom, right = images.shape[1] - size, images.shape[2] - size
    corners = ((0, 0), (0, right), (bottom, 0), (bottom, right), (bottom // 2, right // 2))
    views = [images[:, top : top + size, left : left + size] for top, left in corners]
    return jnp.stack([*views, *(view[:, :, ::-1] for view in views)])


NETWORK = "AlexNet"

VARIANTS = {
    "alexnet": dict(),
    "alexnet_2012": dict(network="AlexNet2012"),
}
