"""Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929).

Attribute names are torchvision's; `deit_*` (Touvron et al. 2020, https://arxiv.org/abs/2012.12877)
adds a distillation token and a head for it.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init
from flax_nets.models.attention import MultiHeadAttention


class DistilledOutput(NamedTuple):
    """Logits of the class token, and of the distillation token."""

    logits: jax.Array
    distilled: jax.Array


class EncoderBlock(nnx.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a skip (Figure 1).

    Call: x [N, L, width] -> [N, L, width].
    """

    def __init__(
        self,
        width,
        num_heads,
        attention_width,
        mlp_dim,
        qkv_bias,
        norm_eps,
        dropout,
        attention_dropout,
        fused,
        remat,
        *,
        rngs,
    ):
        self.remat = remat
        self.ln_1 = layers.LayerNorm(width, eps=norm_eps, rngs=rngs)
        self.self_attention = MultiHeadAttention(
            width,
            num_heads,
            qkv_bias=qkv_bias,
            head_dim=attention_width // num_heads,
            dropout=attention_dropout,
            fused=fused,
            rngs=rngs,
        )
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.ln_2 = layers.LayerNorm(width, eps=norm_eps, rngs=rngs)
        self.mlp = layers.Sequential(
            layers.Linear(width, mlp_dim, rngs=rngs),
            layers.gelu,
            layers.Dropout(dropout, rngs=rngs),
            layers.Linear(mlp_dim, width, rngs=rngs),
            layers.Dropout(dropout, rngs=rngs),
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.remat and not self.dropout.deterministic:  # in train mode
            return nnx.remat(EncoderBlock.both)(self, x)
        return self.both(x)

    def both(self, x: jax.Array) -> jax.Array:
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Encoder(nnx.Module):
    """Positions, blocks and the last norm (equations 2 to 4, before the head).

    Call: x [N, length, width] -> [N, length, width].
    """

    def __init__(self, length, depth, width, dropout, norm_eps, block_arguments, *, rngs):
        self.pos_embedding = init.param((1, length, width), init.normal(0.02), rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        blocks = {
            f"encoder_layer_{i}": EncoderBlock(
                width, norm_eps=norm_eps, dropout=dropout, **block_arguments, rngs=rngs
            )
            for i in range(depth)
        }
        self.layers = layers.Sequential(**blocks)
        self.ln = layers.LayerNorm(width, eps=norm_eps, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.dropout(x + self.pos_embedding[...].astype(x.dtype))
        return self.ln(self.layers(x))


class PatchNorm(layers.LayerNorm):
    """Layer norm of each patch's pixels (Kumar et al. 2023, https://arxiv.org/abs/2302.01327).

    Its numbers stand in the order row, column, channel. Call: x [N, H, W, C] -> the same shape.
    """

    def __init__(self, patch_size: int, channels: int, eps: float, *, rngs: nnx.Rngs | None):
        super().__init__(patch_size**2 * channels, eps=eps, rngs=rngs)
        self.patch_size = patch_size

    def __call__(self, x: jax.Array) -> jax.Array:
        n, h, w, c = x.shape
        p = self.patch_size
        x = x.reshape(n, h // p, p, w // p, p, c)
        x = x.swapaxes(2, 3)  # [N, H/p, W/p, p, p, C]
        shape = x.shape
        x = super().__call__(x.reshape(*shape[:3], -1)).reshape(shape)
        return x.swapaxes(2, 3).reshape(n, h, w, c)


class VisionTransformer(nnx.Module):
    """Images [N, image_size, image_size, in_channels] -> logits [N, num_classes].

    Args:
      image_size, patch_size: in pixels; the first a multiple of the second.
      depth, width, num_heads, mlp_dim: of the encoder; mlp_dim is 4 * width by default.
      attention_width: of all heads together. Default: width.
      representation_size: width of the pre-training head's tanh layer. Default: no such layer.
      class_token: whether there is one. Default True.
      pool: "token", the class token (default); "mean", the mean of the patches; or "all", that of
        the patches and the class token.
      patch_norm: whether each patch is normalised before and after its projection. Default False.
      distilled: whether there are a second token and a second head (DeiT). Their logits are
        averaged, but in train mode with `distilled_training`, where both are returned.
      qkv_bias: whether queries, keys and values have a bias. Default True.
      norm_eps: of all layer norms. Default 1e-6.
      initialise: whose initial values: "torchvision" or "timm".
      dropout, attention_dropout: of the stream, and of the attention's weights. Default 0.
      fused: whether attention is cuDNN's, where that is there: see `MultiHeadAttention`. Default
        False.
      remat: whether training keeps the input of each block alone, and recomputes what is within in
        the backward pass: less memory, a forward pass more. Same outputs, gradients and dropout.
        Default False.

    Raises ValueError for sizes that do not divide, for a pooling or distillation without the
    tokens that it takes, and when called on an image of another size.
    """

    input_layer, output_layers = "conv_proj", ("heads.head", "head_dist")
    positions = "encoder.pos_embedding"

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        depth: int = 12,
        width: int = 768,
        num_heads: int = 12,
        mlp_dim: int | None = None,
        attention_width: int | None = None,
        representation_size: int | None = None,
        class_token: bool = True,
        pool: str = "token",
        patch_norm: bool = False,
        distilled: bool = False,
        distilled_training: bool = False,
        qkv_bias: bool = True,
        norm_eps: float = 1e-6,
        initialise: str = "torchvision",
        num_classes: int = 1000,
        in_channels: int = 3,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        fused: bool = False,
        remat: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} is no multiple of patch_size={patch_size}")
        if pool not in ("token", "mean", "all"):
            raise ValueError(f'pool must be "token", "mean" or "all", got {pool!r}')
        if not class_token and (pool == "token" or distilled):
            raise ValueError(
                f"class_token=False leaves no token for pool={pool!r}, distilled={distilled}"
            )
        attention_width = attention_width or width
        if attention_width % num_heads:
            raise ValueError(
                f"num_heads={num_heads} does not divide attention_width={attention_width}, "
                "which is the width by default"
            )
        self.image_size, self.pool, self.distilled_training = image_size, pool, distilled_training
        self.deterministic = False
        self.prefix = class_token + distilled
        self.patch_norm = (
            PatchNorm(patch_size, in_channels, norm_eps, rngs=rngs) if patch_norm else None
        )
        self.conv_proj = layers.Conv(in_channels, width, patch_size, stride=patch_size, rngs=rngs)
        self.proj_norm = layers.LayerNorm(width, eps=norm_eps, rngs=rngs) if patch_norm else None
        self.class_token = init.param((1, 1, width), init.zeros, rngs) if class_token else None
        self.dist_token = init.param((1, 1, width), init.zeros, rngs) if distilled else None
        self.encoder = Encoder(
            (image_size // patch_size) ** 2 + self.prefix,
            depth,
            width,
            dropout,
            norm_eps,
            dict(
                num_heads=num_heads,
                attention_width=attention_width,
                mlp_dim=mlp_dim or 4 * width,
                qkv_bias=qkv_bias,
                attention_dropout=attention_dropout,
                fused=fused,
                remat=remat,
            ),
            rngs=rngs,
        )
        heads = {}
        if representation_size:
            heads["pre_logits"] = layers.Linear(width, representation_size, rngs=rngs)
            heads["act"] = layers.tanh
        if num_classes:
            heads["head"] = layers.Linear(representation_size or width, num_classes, rngs=rngs)
        self.heads = layers.Sequential(**heads)
        self.head_dist = (
            layers.Linear(width, num_classes, rngs=rngs) if distilled and num_classes else None
        )
        options = {"torchvision": self._initialise_torchvision, "timm": self._initialise_timm}
        layers.choose("initialise", initialise, options)(rngs)

    def __call__(self, x: jax.Array) -> jax.Array | DistilledOutput:
        if x.shape[1:3] != (self.image_size, self.image_size):
            raise ValueError(
                f"this network takes images [N, {self.image_size}, {self.image_size}, C], got "
                f"{x.shape}; create it with image_size=... for another size"
            )
        x = self.conv_proj(x if self.patch_norm is None else self.patch_norm(x))
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # [N, H, W, C] -> [N, H*W, C]
        x = x if self.proj_norm is None else self.proj_norm(x)
        tokens = [t for t in (self.class_token, self.dist_token) if t is not None]
        none = jnp.zeros_like(x[:, :1])  # sharded as x is
        tokens = [none + t[...].astype(x.dtype) for t in tokens]
        x = jnp.concatenate([*tokens, x], 1)  # [N, tokens + H*W, C]
        x = self.encoder(x)
        if self.dist_token is not None:
            return self._distilled(x)
        if self.pool == "token":
            return self.heads(x[:, 0])
        return self.heads(x[:, self.prefix if self.pool == "mean" else 0 :].mean(1))

    def _distilled(self, x):
        logits = self.heads(x[:, 0])
        distilled = x[:, 1] if self.head_dist is None else self.head_dist(x[:, 1])
        if not self.deterministic and self.distilled_training:
            return DistilledOutput(logits, distilled)
        return (logits + distilled) / 2

    @staticmethod
    def arguments_shown(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
        """What a checkpoint's names and shapes show.

        That is the size of the image, where its patches make a square, the pre-training head,
        the class token, the norms of the patches, and the kernel and bias of the attention.
        """
        shown: dict[str, Any] = {}
        attention = "encoder.layers.encoder_layer_0.self_attention.in_proj_"
        if f"{attention}weight" in shapes:
            rows, width = shapes[f"{attention}weight"]
            if rows != 3 * width:
                shown["attention_width"] = rows // 3
            shown["qkv_bias"] = f"{attention}bias" in shapes
        if "encoder.pos_embedding" in shapes and "conv_proj.weight" in shapes:
            shown["patch_norm"] = "patch_norm.weight" in shapes
            shown["class_token"] = "class_token" in shapes
            if not shown["class_token"]:
                shown["pool"] = "mean"
            tokens = shown["class_token"] + ("dist_token" in shapes)
            patches = shapes["encoder.pos_embedding"][1] - tokens
            side = math.isqrt(max(patches, 0))
            if side**2 == patches:
                shown["image_size"] = side * shapes["conv_proj.weight"][-1]
        if "heads.pre_logits.weight" in shapes:
            shown["representation_size"] = shapes["heads.pre_logits.weight"][0]
        return shown

    def _initialise_torchvision(self, rngs):
        fan_in = init.fans(self.conv_proj.kernel.shape)[0]
        init.reinit(self.conv_proj.kernel, init.trunc_normal(math.sqrt(1 / fan_in)), rngs)
        init.reinit(self.conv_proj.bias, init.zeros, rngs)
        for block in self.encoder.layers:
            for dense in (block.mlp[0], block.mlp[3]):
                init.reinit(dense.kernel, init.xavier_uniform(dense.kernel.shape), rngs)
                init.reinit(dense.bias, init.normal(1e-6), rngs)
        if hasattr(self.heads, "pre_logits"):
            dense = self.heads.pre_logits
            init.reinit(dense.kernel, init.trunc_normal(math.sqrt(1 / dense.in_features)), rngs)
            init.reinit(dense.bias, init.zeros, rngs)
        for head in (getattr(self.heads, "head", None), self.head_dist):
            if head is not None:
                init.reinit(head.kernel, init.zeros, rngs)
                init.reinit(head.bias, init.zeros, rngs)

    def _initialise_timm(self, rngs):
        if self.class_token is not None:
            init.reinit(self.class_token, init.normal(1e-6), rngs)
        init.reinit(self.encoder.pos_embedding, init.trunc_normal(0.02), rngs)
        if self.dist_token is not None:
            init.reinit(self.dist_token, init.trunc_normal(0.02), rngs)
        for _, module in nnx.iter_modules(self):
            if isinstance(module, layers.Linear):
                init.reinit(module.kernel, init.trunc_normal(0.02), rngs)
                init.reinit(module.bias, init.zeros, rngs)
            if isinstance(module, MultiHeadAttention):
                init.reinit(module.in_proj_kernel, init.trunc_normal(0.02), rngs)


TINY = dict(depth=12, width=192, num_heads=3, initialise="timm")
SMALL = dict(depth=12, width=384, num_heads=6, initialise="timm")
BASE = dict(depth=12, width=768, num_heads=12)
LARGE = dict(depth=24, width=1024, num_heads=16)
HUGE = dict(depth=32, width=1280, num_heads=16)
TIMM = dict(initialise="timm")
DEIT = dict(distilled=True, initialise="timm")

NETWORK = "VisionTransformer"

VARIANTS = {  # Table 1; tiny and small, and the distilled forms: Touvron et al., Table 1
    "vit_b_16": dict(patch_size=16, **BASE),
    "vit_b_32": dict(patch_size=32, **BASE),
    "vit_l_16": dict(patch_size=16, **LARGE),
    "vit_l_32": dict(patch_size=32, **LARGE),
    "vit_h_14": dict(patch_size=14, **HUGE),
    "vit_tiny_patch16_224": dict(patch_size=16, **TINY),
    "vit_tiny_patch16_384": dict(image_size=384, patch_size=16, **TINY),
    "vit_small_patch8_224": dict(patch_size=8, num_classes=0, **SMALL),
    "vit_small_patch16_224": dict(patch_size=16, **SMALL),
    "vit_small_patch16_384": dict(image_size=384, patch_size=16, **SMALL),
    "vit_small_patch32_224": dict(patch_size=32, **SMALL),
    "vit_small_patch32_384": dict(image_size=384, patch_size=32, **SMALL),
    "vit_base_patch8_224": dict(patch_size=8, **BASE, **TIMM),
    "vit_base_patch16_384": dict(image_size=384, patch_size=16, **BASE, **TIMM),
    "vit_base_patch32_384": dict(image_size=384, patch_size=32, **BASE, **TIMM),
    "vit_large_patch14_224": dict(patch_size=14, **LARGE, **TIMM),
    "vit_large_patch16_384": dict(image_size=384, patch_size=16, **LARGE, **TIMM),
    "vit_large_patch32_384": dict(image_size=384, patch_size=32, **LARGE, **TIMM),
    "deit_tiny_patch16_224": dict(patch_size=16, **TINY),
    "deit_small_patch16_224": dict(patch_size=16, **SMALL),
    "deit_base_patch16_224": dict(patch_size=16, **BASE, **TIMM),
    "deit_base_patch16_384": dict(image_size=384, patch_size=16, **BASE, **TIMM),
    "deit_tiny_distilled_patch16_224": dict(patch_size=16, distilled=True, **TINY),
    "deit_small_distilled_patch16_224": dict(patch_size=16, distilled=True, **SMALL),
    "deit_base_distilled_patch16_224": dict(patch_size=16, **BASE, **DEIT),
    "deit_base_distilled_patch16_384": dict(image_size=384, patch_size=16, **BASE, **DEIT),
}
