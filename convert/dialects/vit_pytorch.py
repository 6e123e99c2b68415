"""The names of the vit-pytorch package's ViT, of 0.10.0 and later.

"vit-pytorch" is what 1.16.1 and later have (read here against 1.26); the other dialects are named
after the last version that they hold for.

- from 1.16.1: positions and class token without a leading axis; pooled by the mean, there is no
  class token.
- "vit-pytorch-1.16", from 1.4.0: with a leading axis. Until 1.15 the mean is that of the class
  token too, which no name shows: give `pool="all"`.
- "vit-pytorch-1.2", from 1.0.0: the last norm follows the pooling: `pool="token"` alone is ours.
- "vit-pytorch-0.40", from 0.10.0: besides, nothing is normalised before the blocks.

Older versions are refused, and so is a single head as wide as the stream, which has no output
projection. The package has no names for sizes: those of the network and of its patches (of images
with 3 channels, or `in_channels`) are what the shapes show, whichever ViT is asked for. They do not
show the number of heads: it is a 64th of the attention's width, as by the package's default, unless
`num_heads` is given. A network without classes returns all
tokens there, and here what the head would see. SimpleViT, whose positions are constants that the
package computes in float32, is another function than any of ours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.dialects import Dialect, Shapes, Tensors


@dataclasses.dataclass(frozen=True)
class Patches:
    """A convolution's [o, c, size, size] there is dense, [o, size * size * c], channels last.

    Where the square of `size` times `channels` is not their number, it is the size of patches that
    have these channels, if there is one, else patches of `size` have others. Numbers that do not
    fit are left as they are, to be reported as mis-shaped.
    """

    native: str
    size: int
    channels: int

    def to_native(self, tensors: Tensors) -> Tensors:
        value = tensors.get(self.native)
        if value is None or value.ndim != 2:
            return tensors
        side = math.isqrt(value.shape[1] // self.channels)
        size = side if side**2 * self.channels == value.shape[1] else self.size
        if size == 0 or value.shape[1] % size**2:
            return tensors
        value = value.reshape(len(value), size, size, -1).transpose(0, 3, 1, 2)
        return tensors | {self.native: value}

    def from_native(self, tensors: Tensors) -> Tensors:
        value = tensors.get(self.native)
        if value is None:
            return tensors
        dense = np.ascontiguousarray(value.transpose(0, 2, 3, 1)).reshape(len(value), -1)
        return tensors | {self.native: dense}


@dataclasses.dataclass(frozen=True)
class Tokens:
    """Positions and class token, there `leading` axis or not, and a class token of no rows."""

    leading: bool
    names = ("class_token", "encoder.pos_embedding")

    def to_native(self, tensors: Tensors) -> Tensors:
        held = {n: v[None] if v.ndim == 2 else v for n, v in tensors.items() if n in self.names}
        native = tensors | held
        if "class_token" in held and not held["class_token"].size:
            del native["class_token"]
        return native

    def from_native(self, tensors: Tensors) -> Tensors:
        if "encoder.pos_embedding" not in tensors:
            return tensors
        none = tensors["encoder.pos_embedding"][:, :0]
        held = {n: tensors.get(n, none) for n in self.names}
        return tensors | {n: v if self.leading else v[0] for n, v in held.items()}


BLOCK = "encoder.layers.encoder_layer_{n}"
FIRST = "encoder.layers.encoder_layer_0.self_attention"
THEIRS = "transformer.layers.{n}"


def vit(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """The dialects, newest first: at a tie of names the first counts. None is distilled so."""
    if arguments["distilled"]:
        return ()

    def dialect(name: str, inner: str, embedding: list[str], last: str, head: str) -> Dialect:
        def configure(config: Mapping[str, Any] | None, shapes: Shapes) -> dict[str, Any]:
            refuse(shapes)
            if inner and arguments["pool"] != "token":
                raise ValueError(
                    f"pool={arguments['pool']!r}: in vit-pytorch before 1.4 the last norm follows "
                    "the pooling, here it comes before; only pool='token' is the same function"
                )
            return sizes(shapes)

        attention, mlp = f"{THEIRS}.0.{inner}", f"{THEIRS}.1.{inner}net"
        second, fc1, fc2 = f"{mlp}.0", f"{mlp}.1", f"{mlp}.4"
        if inner:
            second, fc1, fc2 = f"{THEIRS}.1.norm", f"{mlp}.0", f"{mlp}.3"
        projection = [
            (f"{ours}.{{rest}}", f"to_patch_embedding.{i}.{{rest}}")
            for i, ours in enumerate(embedding, start=1)
        ]
        return Dialect(
            name,
            "vit",
            renames=(
                ("class_token", "cls_token"),
                ("encoder.pos_embedding", "pos_embedding"),
                *projection,
                (f"{BLOCK}.ln_1.{{rest}}", f"{THEIRS}.0.norm.{{rest}}"),
                (f"{BLOCK}.self_attention.in_proj_{{rest}}", f"{attention}to_qkv.{{rest}}"),
                (f"{BLOCK}.self_attention.out_proj.{{rest}}", f"{attention}to_out.0.{{rest}}"),
                (f"{BLOCK}.ln_2.{{rest}}", f"{second}.{{rest}}"),
                (f"{BLOCK}.mlp.0.{{rest}}", f"{fc1}.{{rest}}"),
                (f"{BLOCK}.mlp.3.{{rest}}", f"{fc2}.{{rest}}"),
                ("encoder.ln.{rest}", f"{last}.{{rest}}"),
                ("heads.head.{rest}", f"{head}.{{rest}}"),
            ),
            tensors=(
                Patches("conv_proj.weight", arguments["patch_size"], arguments["in_channels"]),
                Tokens(leading=name != "vit-pytorch"),
            ),
            arguments=dict(norm_eps=1e-5, qkv_bias=False, patch_norm=len(embedding) > 1),
            configure=configure,
        )

    normed = ["patch_norm", "conv_proj", "proj_norm"]
    return (
        dialect("vit-pytorch", "", normed, "transformer.norm", "mlp_head"),
        dialect("vit-pytorch-1.16", "", normed, "transformer.norm", "mlp_head"),
        dialect("vit-pytorch-1.2", "fn.", normed, "mlp_head.0", "mlp_head.1"),
        dialect("vit-pytorch-0.40", "fn.", ["conv_proj"], "mlp_head.0", "mlp_head.1"),
    )


def sizes(shapes: Shapes) -> dict[str, Any]:
    """The constructor's arguments that shapes of native names show."""
    shown: dict[str, Any] = {}
    if len(attention := shapes.get(f"{FIRST}.in_proj_weight", ())) == 2:
        rows, width = attention
        shown |= dict(width=width, depth=sum(key.endswith(".ln_1.weight") for key in shapes))
        if rows % (3 * 64) == 0:
            shown["num_heads"] = rows // (3 * 64)
        hidden = shapes.get(f"{BLOCK.format(n=0)}.mlp.0.bias", (4 * width,))[0]
        shown["mlp_dim"] = None if hidden == 4 * width else hidden
    if len(patches := shapes.get("conv_proj.weight", ())) == 4:
        shown["patch_size"] = patches[-1]
    return shown


def refuse(shapes: Shapes) -> None:
    """ValueError for the networks of the package that are no function of ours."""
    if "linear_head.weight" in shapes:
        raise ValueError(
            "this is vit-pytorch's SimpleViT, whose positions are constants computed in float32; "
            "its ViT alone is a network of ours"
        )
    if "transformer.layers.0.0.fn.norm.weight" in shapes:
        raise ValueError("this is the ViT of vit-pytorch before 0.10.0; those from there on load")
    if f"{FIRST}.in_proj_weight" in shapes and f"{FIRST}.out_proj.weight" not in shapes:
        raise ValueError(
            "this ViT of vit-pytorch has heads=1 and dim_head=dim, and so no output projection "
            "in its attention, which ours has"
        )


DIALECTS: tuple[Dialect, ...] = ()

MADE = {"vit": vit}
