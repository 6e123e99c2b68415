"""Self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

Parameter names are `torch.nn.MultiheadAttention`'s.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from flax_nets import layers
from flax_nets.layers import init


def scaled_dot_product(query, key, value, mask=None, score_weights=None, dropout=None):
    """softmax(Q K^T / sqrt(d_k)) V (equation 1), and the softmax's weights.

    query [N, heads, L, d_k], key [N, heads, S, d_k], value [N, heads, S, d_v].
    """
    scores = query / math.sqrt(query.shape[-1]) @ key.swapaxes(-2, -1)  # [N, heads, L, S]
    if score_weights is not None:
        scores = scores * score_weights
    if mask is not None:
        scores = jnp.where(mask, -jnp.inf, scores) if mask.dtype == bool else scores + mask
    weights = jax.nn.softmax(scores, -1)
    kept = weights if dropout is None else dropout(weights)
    return kept @ value, weights


class MultiHeadAttention(nnx.Module):
    """Several attentions side by side on projections of the input (section 3.2.2).

    Call: query [N, L, embed_dim] -> [N, L, embed_dim]; with `need_weights` also the weights
    [N, num_heads, L, S]. `key` [N, S, kdim] and `value` [N, S, vdim] default to the query.
    `mask`, broadcast to [N, num_heads, L, S]: where boolean, True hides; else it is added to
    the scores. `score_weights` multiply the scores before the mask.

    Args:
      embed_dim, num_heads: width of the stream, and how many attentions share it.
      bias: of all projections. Default True.
      qkv_bias: of those that make queries, keys and values. Default: `bias`.
      kdim, vdim: widths of keys and values coming in. Default: `embed_dim`.
      head_dim, value_head_dim: d_k and d_v of each head. Default: embed_dim / num_heads, and d_k.
      dropout: of the attention's weights. Default 0.

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
        rngs: nnx.Rngs | None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
    ):
        if head_dim is None and embed_dim % num_heads:
            raise ValueError(f"embed_dim={embed_dim} is no multiple of num_heads={num_heads}")
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.num_heads, self.dtype = num_heads, dtype
        self.head_dim = head_dim or embed_dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        inner, inner_v = num_heads * self.head_dim, num_heads * self.value_head_dim
        self.sizes = (inner, inner, inner_v)
        self.fused = kdim in (None, embed_dim) and vdim in (None, embed_dim)

        def projection(features: int, out: int) -> nnx.Param:
            shape = (features, out)
            return init.param(shape, init.xavier_uniform(shape), rngs, param_dtype)

        if self.fused:
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
        x, weights = scaled_dot_product(q, k, v, mask, score_weights, self.dropout)
        x = x.swapaxes(1, 2).reshape(*query.shape[:2], -1)  # [N, heads, L, d_v] -> [N, L, ...]
        x = self.out_proj(x)
        return (x, weights) if need_weights else x

    def _project(self, query, key, value):
        """-> q, k [N, heads, L or S, d_k] and v [N, heads, S, d_v]."""
        kernels = self._kernels()
        dtype = self.dtype or kernels[0].dtype
        biases = self._split_sizes(self.in_proj_bias)
        if key is None and value is None and self.fused:  # one product in place of three
            q, k, v = self._split_sizes(query.astype(dtype) @ kernels[0].astype(dtype))
        else:
            key = query if key is None else key
            value = key if value is None else value
            if self.fused:
                kernels = self._split_sizes(kernels[0])
            q, k, v = (
                x.astype(dtype) @ kernel.astype(dtype)
                for x, kernel in zip((query, key, value), kernels, strict=True)
            )
        heads = []
        for x, bias in zip((q, k, v), biases, strict=True):
            if bias is not None:
                x = x + layers.along_last(bias.astype(dtype), 3)
            heads.append(x.reshape(*x.shape[:2], self.num_heads, -1).swapaxes(1, 2))
        return heads

    def _kernels(self):
        if self.fused:
            return (self.in_proj_kernel[...],)
        return self.q_proj_kernel[...], self.k_proj_kernel[...], self.v_proj_kernel[...]

    def _split_sizes(self, x):
        if x is None:
            return None, None, None
        return jnp.split(x[...], (self.sizes[0], self.sizes[0] + self.sizes[1]), -1)
