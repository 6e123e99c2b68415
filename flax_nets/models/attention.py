"""Self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

Parameter names are `torch.nn.MultiheadAttention`'s and `torch.nn.Transformer`'s. Local attention
has a window; sparse attention has the patterns of Child et al. 2019
(https://arxiv.org/abs/1904.10509).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from flax_nets import layers, lowering
from flax_nets.layers import init


def scaled_dot_product(query, key, value, mask=None, score_weights=None, dropout=None):
    """softmax(Q K^T / sqrt(d_k)) V (equation 1), and the softmax's weights.

    query [N, heads, L, d_k], key [N, heads, S, d_k], value [N, heads, S, d_v]. A row of which the
    mask hides all has weights of zero.
    """
    scores = query / math.sqrt(query.shape[-1]) @ key.swapaxes(-2, -1)  # [N, heads, L, S]
    if score_weights is not None:
        scores = scores * _four_axes(score_weights).astype(scores.dtype)
    if mask is not None:
        mask = _four_axes(mask)
        hide = mask.dtype == bool
        scores = jnp.where(mask, -jnp.inf, scores) if hide else scores + mask.astype(scores.dtype)
    weights = jax.nn.softmax(scores, -1) if mask is None else masked_softmax(scores)
    if mask is None and (dropout is None or not dropout.active):
        return attended(scores, value), weights
    kept = weights if dropout is None else dropout(weights)
    return kept @ value, weights


@jax.custom_jvp
def attended(scores, value):
    """softmax(scores) @ value: [..., L, S], [..., S, d_v] -> [..., L, d_v].

    Divided after the product, where there are fewer numbers: a ViT-B/16 answers in 0.94 of the time
    (docs/design.md). A gradient needs the weights, so there they come first.
    """
    exponentials = jnp.exp(scores - scores.max(-1, keepdims=True))
    return exponentials @ value / exponentials.sum(-1, keepdims=True)


@attended.defjvp
def _(primals, tangents):
    return jax.jvp(lambda scores, value: jax.nn.softmax(scores, -1) @ value, primals, tangents)


def masked_softmax(scores):
    """Softmax; zeros where all of a row is minus infinity, where it would be NaN."""
    nothing = (scores == -jnp.inf).all(-1, keepdims=True)
    return jnp.where(nothing, 0.0, jax.nn.softmax(jnp.where(nothing, 0.0, scores), -1))


def _four_axes(x):
    return x.reshape((1,) * (4 - x.ndim) + x.shape)


class MultiHeadAttention(nnx.Module):
    """Several attentions side by side on projections of the input (section 3.2.2).

    Call: query [N, L, embed_dim] -> [N, L, embed_dim]; with `need_weights` also the weights
    [N, num_heads, L, S]. `key` [N, S, kdim] and `value` [N, S, vdim] default to the query.
    `mask`, broadcast to [N, num_heads, L, S]: where boolean, True hides; else it is added to
    the scores. `score_weights`, likewise, multiply the scores before the mask. A query that sees
    nothing attends to nothing: its weights are zero (PyTorch's too, but NaN where it is asked
    for weights).

    Args:
      embed_dim, num_heads: width of the stream, and how many attentions share it.
      bias: of all projections. Default True.
      qkv_bias: of those that make queries, keys and values. Default: `bias`.
      kdim, vdim: widths of keys and values coming in. Default: `embed_dim`.
      head_dim, value_head_dim: d_k and d_v of each head. Default: embed_dim / num_heads, and d_k.
      dropout: of the attention's weights. Default 0.
      fused: whether to use cuDNN's fused attention, on a GPU, in float16 or bfloat16, wherever it
        computes the same: no weights asked for or given, no active dropout, a boolean mask or
        none, d_v = d_k. cuDNN has limits of its own (an Ampere GPU or later, heads of a multiple
        of 8, up to 128) and says so. Default False.

    Raises ValueError where `num_heads` does not divide `embed_dim` and no `head_dim` is given.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        qkv_bias: bool | None = None,
        kdim: int | None = None,
        vdim: int | None = None,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        dropout: float = 0.0,
        *,
        fused: bool = False,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}")
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.num_heads, self.fused, self.dtype = num_heads, fused, dtype
        self.head_dim = head_dim or embed_dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        inner, inner_v = num_heads * self.head_dim, num_heads * self.value_head_dim
        self.sizes = (inner, inner, inner_v)
        self.packed = kdim in (None, embed_dim) and vdim in (None, embed_dim)

        def projection(features: int, out: int) -> nnx.Param:
            shape = (features, out)
            return init.param(shape, init.xavier_uniform(shape), rngs, param_dtype)

        if self.packed:
            self.in_proj_kernel = projection(embed_dim, sum(self.sizes))
        else:
            self.q_proj_kernel = projection(embed_dim, inner)
            self.k_proj_kernel = projection(kdim or embed_dim, inner)
            self.v_proj_kernel = projection(vdim or embed_dim, inner_v)
        self.in_proj_bias = (
            init.param((sum(self.sizes),), init.zeros, rngs, param_dtype) if qkv_bias else None
        )
        self.out_proj = layers.Linear(
            inner_v, embed_dim, bias=bias, rngs=rngs, dtype=dtype, param_dtype=param_dtype
        )
        if bias:
            init.reinit(self.out_proj.bias, init.zeros, rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)

    def __call__(
        self, query, key=None, value=None, mask=None, score_weights=None, need_weights=False
    ):
        q, k, v = self._project(query, key, value)
        if not need_weights and score_weights is None and self._fuses(q, mask):
            return self.out_proj(_fused_attention(q, k, v, mask))
        x, weights = scaled_dot_product(q, k, v, mask, score_weights, self.dropout)
        x = x.swapaxes(1, 2).reshape(*query.shape[:2], -1)  # [N, heads, L, d_v] -> [N, L, ...]
        x = self.out_proj(x)
        return (x, weights) if need_weights else x

    def _fuses(self, q, mask):
        return (
            self.fused
            and not self.dropout.active
            and self.head_dim == self.value_head_dim
            and (mask is None or mask.dtype == bool)
            and q.dtype in (jnp.float16, jnp.bfloat16)
            and jax.default_backend() == "gpu"
        )

    def _project(self, query, key=None, value=None):
        """-> q, k [N, heads, L or S, d_k] and v [N, heads, S, d_v]."""
        kernels = self._kernels()
        dtype = self.dtype or kernels[0].dtype
        biases = self._split_sizes(self.in_proj_bias)
        if key is None and value is None and self.packed:  # one product in place of three
            q, k, v = self._split_sizes(
                lowering.dense(query.astype(dtype), kernels[0].astype(dtype))
            )
        else:
            key = query if key is None else key
            value = key if value is None else value
            if self.packed:
                kernels = self._split_sizes(kernels[0])
            q, k, v = (
                lowering.dense(x.astype(dtype), kernel.astype(dtype))
                for x, kernel in zip((query, key, value), kernels, strict=True)
            )
        heads = []
        for x, bias in zip((q, k, v), biases, strict=True):
            if bias is not None:
                x = x + layers.along_last(bias.astype(dtype), 3)
            heads.append(x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2))
        return heads

    def _kernels(self):
        if self.packed:
            return (self.in_proj_kernel[...],)
        return self.q_proj_kernel[...], self.k_proj_kernel[...], self.v_proj_kernel[...]

    def _split_sizes(self, x):
        if x is None:
            return None, None, None
        return jnp.split(x[...], (self.sizes[0], self.sizes[0] + self.sizes[1]), -1)


def _fused_attention(query, key, value, mask):
    """What `scaled_dot_product` computes, by cuDNN -> [N, L, heads * d_v]."""
    query, key, value = (x.swapaxes(1, 2) for x in (query, key, value))  # [N, L, heads, d]
    odd = query.shape[1] % 2 or key.shape[1] % 2
    attend = _cudnn_without_gradient if odd else _cudnn
    if mask is None:
        x = attend(query, key, value, None)
    else:  # a row that sees nothing is NaN in cuDNN's gradient: it sees all, and then counts not
        seen = ~_four_axes(mask)
        some = seen.any(-1, keepdims=True)
        x = attend(query, key, value, seen | ~some)
        x = jnp.where(some.swapaxes(1, 2), x, 0.0)
    return x.reshape(*x.shape[:2], -1)


def _cudnn(query, key, value, seen):
    with jax.numpy_dtype_promotion("standard"):  # jax's own code is not written for the strict one
        return jax.nn.dot_product_attention(query, key, value, mask=seen, implementation="cudnn")


# cuDNN has no gradient for odd lengths, such as ViT's 197: there it is ours.
_cudnn_without_gradient = jax.custom_jvp(_cudnn)


@_cudnn_without_gradient.defjvp
def _(primals, tangents):
    mask = None if primals[3] is None else ~primals[3]

    def plain(*inputs):
        x, _ = scaled_dot_product(*(x.swapaxes(1, 2) for x in inputs), mask)
        return x.swapaxes(1, 2)

    return jax.jvp(plain, primals[:3], tangents[:3])


def local_mask(length: int, window: int, causal: bool = False) -> jax.Array:
    """[length, length], True where j is further than `window` from i (or after it)."""
    i, j = _pairs(length)
    return _far(i, j, window) | _after(i, j, causal)


def strided_mask(length: int, stride: int | None = None, causal: bool = False) -> jax.Array:
    """i sees its `stride` neighbours, and every position a multiple of `stride` away."""
    i, j = _pairs(length)
    stride = _stride(length, stride)
    return (_far(i, j, stride) & ((i - j) % stride != 0)) | _after(i, j, causal)


def fixed_mask(
    length: int, stride: int | None = None, summaries: int = 1, causal: bool = False
) -> jax.Array:
    """i sees its block of `stride`, and the last `summaries` positions of every block."""
    i, j = _pairs(length)
    stride = _stride(length, stride)
    other = i // stride != j // stride
    return (other & (j % stride < stride - summaries)) | _after(i, j, causal)


def causal_mask(length: int) -> jax.Array:
    """[length, length], True above the diagonal: nobody sees what comes later."""
    return _after(*_pairs(length), True)


def _pairs(length):
    positions = jnp.arange(length)
    return positions[:, None], positions[None, :]


def _far(i, j, window):
    return jnp.abs(i - j) > window


def _after(i, j, causal):
    return (j > i) & causal


def _stride(length, stride):
    return stride or max(round(math.sqrt(length)), 1)


class Group(NamedTuple):
    """Keys, values and a mask [blocks, B, M], for queries in blocks [N, heads, blocks, B, d_k].

    `axes` of the keys: b and h batch and head, n block, l query in it, m key, d its numbers.
    """

    axes: str
    key: jax.Array
    value: jax.Array
    mask: jax.Array


def grouped_attention(query, groups, dropout=None):
    """One softmax over all groups of keys: what a row does not see is never computed."""
    query = query / math.sqrt(query.shape[-1])
    scores = [
        jnp.where(g.mask[None, None], -jnp.inf, jnp.einsum(f"bhnld,{g.axes}->bhnlm", query, g.key))
        for g in groups
    ]
    weights = masked_softmax(jnp.concatenate(scores, -1))
    kept = weights if dropout is None else dropout(weights)
    kept = jnp.split(kept, np.cumsum([g.mask.shape[-1] for g in groups])[:-1], -1)
    return sum(
        jnp.einsum(f"bhnlm,{g.axes}->bhnld", w, g.value) for w, g in zip(kept, groups, strict=True)
    )


class BlockedAttention(MultiHeadAttention):
    """Self-attention whose queries are taken by blocks: what local and sparse have in common."""

    def __call__(self, x):
        length = x.shape[1]
        size = self.block_size(length)
        q, k, v = (self._blocks(y, size) for y in self._project(x))
        y = grouped_attention(q, self.groups(k, v, length), self.dropout)
        y = y.reshape(*y.shape[:2], -1, y.shape[-1])[:, :, :length]  # without the padding
        y = y.swapaxes(1, 2).reshape(*x.shape[:2], -1)  # [N, heads, L, d_v] -> [N, L, ...]
        return self.out_proj(y)

    def _blocks(self, x, size):
        """[N, heads, L, d] -> [N, heads, blocks, size, d], zeros at the end."""
        x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % size), (0, 0)))
        return x.reshape(*x.shape[:2], -1, size, x.shape[-1])

    def _near(self, key, value, length, window):
        """What lies within `window` of each query, from its block and those beside it."""
        i = self._positions(key)[:, :, None]
        size, reach = key.shape[3], 2 if self.causal else 3
        j = i[:, :1] - size + jnp.arange(reach * size)[None, None, :]
        mask = _far(i, j, window) | self._unseen(i, j, length)
        return Group("bhnmd", self._beside(key), self._beside(value), mask)

    def _beside(self, x):
        """[N, heads, blocks, B, d] -> [N, heads, blocks, 2B or 3B, d]: previous, own (and next)."""
        none = jnp.zeros_like(x[:, :, :1])
        parts = [jnp.concatenate([none, x[:, :, :-1]], 2), x]
        if not self.causal:
            parts.append(jnp.concatenate([x[:, :, 1:], none], 2))
        return jnp.concatenate(parts, 3)

    def _positions(self, x):
        return jnp.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2], x.shape[3])

    def _unseen(self, i, j, length):
        return (j < 0) | (j >= length) | _after(i, j, self.causal)


class LocalAttention(BlockedAttention):
    """Each position attends to `window` neighbours on each side, and to itself.

    Call: x [N, L, embed_dim] -> the same shape, any L; time and memory grow as L * window. Equal
    to `MultiHeadAttention` under `self.mask(L)`, which also shows the weights.

    Args:
      window: neighbours on each side, 0 or more.
      causal: whether those after it are hidden. Default False.
      embed_dim, num_heads, bias, dropout, rngs, dtype, param_dtype: as in `MultiHeadAttention`.

    Raises ValueError for a negative window.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        window: int,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if window < 0:
            raise ValueError(f"window counts neighbours on each side, 0 or more; got {window}")
        kept = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        super().__init__(embed_dim, num_heads, bias=bias, dropout=dropout, **kept)
        self.window, self.causal = window, causal

    def block_size(self, length):
        return max(min(self.window, length), 1)

    def groups(self, key, value, length):
        return [self._near(key, value, length, self.window)]

    def mask(self, length: int) -> jax.Array:
        """The same pattern for dense attention: [length, length], True hides."""
        return local_mask(length, self.window, self.causal)


class SparseAttention(BlockedAttention):
    """The strided and fixed patterns (Child et al. 2019, section 4.2), both parts in one head.

    Call: x [N, L, embed_dim] -> the same shape, any L; time and memory grow as
    L * (stride + L / stride), which is L^1.5 by default. Equal to `MultiHeadAttention` under
    `self.mask(L)`, which also shows the weights.

    Args:
      pattern: "strided": a position sees its `stride` neighbours, and those a multiple of
        `stride` away; "fixed": its block of `stride`, and the last places of every block.
        Default "strided".
      stride: l in the paper. Default: the square root of the length.
      summaries: c in the paper: how many last places of a block all others see ("fixed" only).
        Default 1.
      causal: whether later positions are hidden, as in the paper. Default False.
      embed_dim, num_heads, bias, dropout, rngs, dtype, param_dtype: as in `MultiHeadAttention`.

    Raises ValueError for another pattern, for a stride below 1 and for summaries outside of it.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: str = "strided",
        stride: int | None = None,
        summaries: int = 1,
        causal: bool = False,
        bias: bool = True,
        dropout: float = 0.0,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if pattern not in ("strided", "fixed"):
            raise ValueError(f'pattern must be "strided" or "fixed", got {pattern!r}')
        if stride is not None and stride < 1:
            raise ValueError(f"stride must be 1 or more, or None; got {stride}")
        if not 1 <= summaries <= (stride or summaries):
            raise ValueError(f"summaries={summaries} must lie within 1 and stride={stride}")
        kept = dict(rngs=rngs, dtype=dtype, param_dtype=param_dtype)
        super().__init__(embed_dim, num_heads, bias=bias, dropout=dropout, **kept)
        self.pattern, self.stride, self.summaries, self.causal = pattern, stride, summaries, causal

    def block_size(self, length):
        return _stride(length, self.stride)

    def groups(self, key, value, length):
        i = self._positions(key)[:, :, None]  # [blocks, B, 1]
        if self.pattern == "strided":
            near = self._near(key, value, length, key.shape[3])
            j = self._positions(key).T[None]  # [1, B, blocks]: a query's place, in each block
            mask = ~_far(i, j, key.shape[3]) | self._unseen(i, j, length)
            return [near, Group("bhmld", key, value, mask)]
        size, last = key.shape[3], slice(-self.summaries, None)
        j = self._positions(key)[:, None, :]  # [blocks, 1, B]
        own = Group("bhnmd", key, value, self._unseen(i, j, length))
        j = self._positions(key)[:, last].reshape(1, 1, -1)  # [1, 1, blocks * summaries]
        mask = (i // size == j // size) | self._unseen(i, j, length)
        keys, values = (y[:, :, :, last] for y in (key, value))
        keys, values = (y.reshape(*y.shape[:2], -1, y.shape[-1]) for y in (keys, values))
        return [own, Group("bhmd", keys, values, mask)]

    def mask(self, length: int) -> jax.Array:
        """The same pattern for dense attention: [length, length], True hides."""
        if self.pattern == "strided":
            return strided_mask(length, self.stride, self.causal)
        return fixed_mask(length, self.stride, self.summaries, self.causal)


def sinusoidal_positions(length: int, width: int) -> np.ndarray:
    """[length, width], sines in even places and cosines in odd ones (section 3.5)."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2)[None] / width)
    table = np.empty((length, width))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)[:, : width // 2]
    return table


class Embedding(nnx.Module):
    """`torch.nn.Embedding`: tokens [N, L], integers below `vocab_size` -> [N, L, features].

    Drawn from a normal distribution of deviation 1/sqrt(features), as the paper's authors do.
    """

    def __init__(
        self,
        vocab_size: int,
        features: int,
        *,
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        self.dtype = dtype
        shape = (vocab_size, features)
        self.embedding = init.param(shape, init.normal(features**-0.5), rngs, param_dtype)

    def __call__(self, tokens):
        if not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(f"tokens must be integers, got {tokens.dtype}")
        return self._table()[tokens]

    def attend(self, x):
        """[N, L, features] -> [N, L, vocab_size]: products with every row."""
        return x @ self._table().T

    def _table(self):
        return self.embedding[...].astype(self.dtype or self.embedding.dtype)


class TransformerLayer(nnx.Module):
    """What encoder and decoder layers share: the step between, and a two-layer perceptron."""

    def _residual(self, x, norm, branch):
        return x + branch(norm(x)) if self.norm_first else norm(x + branch(x))

    def _feed_forward(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention and a perceptron, each beside a skip, then a norm (Figure 1 left).

    Call: x [N, L, d_model], mask as in `MultiHeadAttention` -> [N, L, d_model].
    Arguments and defaults as in `Transformer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.norm_first, self.activation = norm_first, layers.choose("activation", activation, ACTS)
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout=dropout, rngs=rngs)
        self.linear1 = layers.Linear(d_model, dim_feedforward, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.linear2 = layers.Linear(dim_feedforward, d_model, rngs=rngs)
        self.norm1 = layers.LayerNorm(d_model, eps=layer_norm_eps, rngs=rngs)
        self.norm2 = layers.LayerNorm(d_model, eps=layer_norm_eps, rngs=rngs)
        self.dropout1 = layers.Dropout(dropout, rngs=rngs)
        self.dropout2 = layers.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask=None):
        x = self._residual(x, self.norm1, lambda y: self.dropout1(self.self_attn(y, mask=mask)))
        return self._residual(x, self.norm2, lambda y: self.dropout2(self._feed_forward(y)))


class TransformerDecoderLayer(TransformerLayer):
    """An encoder layer with attention to the memory in between (Figure 1 right).

    Call: x [N, L, d_model], memory [N, S, d_model] and their masks -> [N, L, d_model].
    Arguments and defaults as in `Transformer`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        self.norm_first, self.activation = norm_first, layers.choose("activation", activation, ACTS)
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout=dropout, rngs=rngs)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout=dropout, rngs=rngs)
        self.linear1 = layers.Linear(d_model, dim_feedforward, rngs=rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)
        self.linear2 = layers.Linear(dim_feedforward, d_model, rngs=rngs)
        self.norm1 = layers.LayerNorm(d_model, eps=layer_norm_eps, rngs=rngs)
        self.norm2 = layers.LayerNorm(d_model, eps=layer_norm_eps, rngs=rngs)
        self.norm3 = layers.LayerNorm(d_model, eps=layer_norm_eps, rngs=rngs)
        self.dropout1 = layers.Dropout(dropout, rngs=rngs)
        self.dropout2 = layers.Dropout(dropout, rngs=rngs)
        self.dropout3 = layers.Dropout(dropout, rngs=rngs)

    def __call__(self, x, memory, mask=None, memory_mask=None):
        def cross(y):
            return self.dropout2(self.multihead_attn(y, memory, mask=memory_mask))

        x = self._residual(x, self.norm1, lambda y: self.dropout1(self.self_attn(y, mask=mask)))
        x = self._residual(x, self.norm2, cross)
        return self._residual(x, self.norm3, lambda y: self.dropout3(self._feed_forward(y)))


class TransformerStack(nnx.Module):
    """Layers, and a last norm or none."""

    def __init__(self, layer, depth, d_model, final_norm, arguments, *, rngs):
        self.layers = layers.Sequential(
            *(layer(d_model, **arguments, rngs=rngs) for _ in range(depth))
        )
        eps = arguments["layer_norm_eps"]
        self.norm = layers.LayerNorm(d_model, eps=eps, rngs=rngs) if final_norm else None

    def __call__(self, x, *inputs):
        x = layers.chain(self.layers, x, *inputs)
        return x if self.norm is None else self.norm(x)


class Transformer(nnx.Module):
    """Encoder and decoder (section 3.1), `torch.nn.Transformer` with its names and arguments.

    Call: src [N, S, d_model], tgt [N, L, d_model] -> [N, L, d_model]; where there is a vocabulary,
    tokens [N, S] and [N, L] -> logits [N, L, tgt_vocab_size]. Masks are `MultiHeadAttention`'s:
    a decoder that must not look ahead takes `tgt_mask=causal_mask(L)`, and padding [N, S], True
    where there is none to see, is `padding[:, None, None]` for `src_mask` and `memory_mask`.
    `encode` and `decode` are the two halves.

    Args:
      d_model, nhead, num_encoder_layers, num_decoder_layers, dim_feedforward, dropout: the base
        model of Table 3 by default. Dropout as in `nn.Transformer`: also of the attention's
        weights and within the perceptron.
      activation: "relu" (default) or "gelu".
      layer_norm_eps: default 1e-5.
      norm_first: norms before each branch in place of after each skip. Default False.
      final_norm: a norm after each stack: `nn.Transformer` has it, the paper has none. Default
        True.
      vocab_size, tgt_vocab_size: tokens in place of vectors, with sinusoidal positions; the
        target's is the source's by default. Default: vectors, without positions.
      share_embeddings: one matrix for both embeddings and the last product (section 3.4).
        Default False.

    Raises ValueError for an unknown activation, fewer than one layer in a stack, a width that
    `nhead` does not divide, and embeddings shared by different vocabularies or by none.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: str = "relu",
        layer_norm_eps: float = 1e-5,
        norm_first: bool = False,
        final_norm: bool = True,
        vocab_size: int | None = None,
        tgt_vocab_size: int | None = None,
        share_embeddings: bool = False,
        *,
        rngs: nnx.Rngs | None,
    ):
        if min(num_encoder_layers, num_decoder_layers) < 1:
            raise ValueError(
                "a stack has one layer at least, got "
                f"num_encoder_layers={num_encoder_layers}, num_decoder_layers={num_decoder_layers}"
            )
        tgt_vocab_size = tgt_vocab_size or vocab_size
        if tgt_vocab_size and not vocab_size:
            raise ValueError(f"tgt_vocab_size={tgt_vocab_size} needs a vocab_size")
        if share_embeddings and (not vocab_size or tgt_vocab_size != vocab_size):
            raise ValueError(
                "shared embeddings need one vocabulary, got "
                f"vocab_size={vocab_size}, tgt_vocab_size={tgt_vocab_size}"
            )
        self.d_model, self.vocab_size, self.dtype = d_model, vocab_size, None
        arguments = dict(
            nhead=nhead,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            norm_first=norm_first,
        )
        self.encoder = TransformerStack(
            TransformerEncoderLayer, num_encoder_layers, d_model, final_norm, arguments, rngs=rngs
        )
        self.decoder = TransformerStack(
            TransformerDecoderLayer, num_decoder_layers, d_model, final_norm, arguments, rngs=rngs
        )
        own = vocab_size and not share_embeddings
        self.embedding = Embedding(vocab_size, d_model, rngs=rngs) if vocab_size else None
        self.tgt_embedding = Embedding(tgt_vocab_size, d_model, rngs=rngs) if own else None
        self.generator = (
            layers.Linear(d_model, tgt_vocab_size, bias=False, rngs=rngs) if own else None
        )
        for _, module in nnx.iter_modules(self):  # as nn.Transformer draws them
            if isinstance(module, layers.Linear):
                xavier = init.xavier_uniform((module.in_features, module.out_features))
                init.reinit(module.kernel, xavier, rngs)
        self.dropout = layers.Dropout(dropout, rngs=rngs)

    def __call__(self, src, tgt, src_mask=None, tgt_mask=None, memory_mask=None):
        memory = self.encode(src, src_mask)
        return self.decode(tgt, memory, tgt_mask, memory_mask)

    def encode(self, src, mask=None):
        """src -> memory [N, S, d_model]."""
        return self.encoder(self._embed(src, self.embedding), mask)

    def decode(self, tgt, memory, mask=None, memory_mask=None):
        """tgt and memory -> [N, L, d_model], or logits."""
        x = self._embed(tgt, self.tgt_embedding or self.embedding)
        x = self.decoder(x, memory, mask, memory_mask)
        if self.embedding is None:
            return x
        return self.embedding.attend(x) if self.generator is None else self.generator(x)

    def _embed(self, x, embedding):
        if embedding is None:
            if x.ndim != 3 or x.shape[-1] != self.d_model:
                raise ValueError(
                    f"expected vectors [N, L, {self.d_model}], got {x.shape}: for tokens, make "
                    "the network with a vocab_size"
                )
            return x.astype(self.dtype or self.encoder.layers[0].linear1.kernel.dtype)
        x = embedding(x) * math.sqrt(self.d_model)
        positions = jnp.asarray(sinusoidal_positions(x.shape[1], self.d_model), x.dtype)
        return self.dropout(x + positions[None])


ACTS = {"relu": layers.relu, "gelu": layers.gelu}

TRANSFORMERS = {  # Table 3
    "transformer_base": dict(d_model=512, nhead=8, dim_feedforward=2048, dropout=0.1),
    "transformer_big": dict(d_model=1024, nhead=16, dim_feedforward=4096, dropout=0.3),
}


def transformer_base(*, rngs: nnx.Rngs | None, **overrides: Any) -> Transformer:
    """The base model of Table 3, 6 and 6 layers; `overrides`: arguments of `Transformer`."""
    return Transformer(**TRANSFORMERS["transformer_base"] | overrides, rngs=rngs)


def transformer_big(*, rngs: nnx.Rngs | None, **overrides: Any) -> Transformer:
    """The big model of Table 3."""
    return Transformer(**TRANSFORMERS["transformer_big"] | overrides, rngs=rngs)
