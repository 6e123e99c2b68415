"""Self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), the PyTorch twin.

Parameter names are `torch.nn.MultiheadAttention`'s.
"""

import math

import torch
from torch import nn


def scaled_dot_product(query, key, value, mask=None, score_weights=None, dropout=None):
    """softmax(Q K^T / sqrt(d_k)) V (equation 1), and the softmax's weights.

    query [N, heads, L, d_k], key [N, heads, S, d_k], value [N, heads, S, d_v].
    """
    scores = query / math.sqrt(query.shape[-1]) @ key.transpose(-2, -1)  # [N, heads, L, S]
    if score_weights is not None:
        scores = scores * score_weights
    if mask is not None:
        scores = scores.masked_fill(mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    weights = torch.softmax(scores, -1)
    kept = weights if dropout is None else dropout(weights)
    return kept @ value, weights


class MultiHeadAttention(nn.Module):
    """Several attentions side by side on projections of the input (section 3.2.2)."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        bias=True,
        qkv_bias=None,
        kdim=None,
        vdim=None,
        head_dim=None,
        value_head_dim=None,
        dropout=0.0,
    ):
        super().__init__()
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.num_heads = num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        inner, inner_v = num_heads * self.head_dim, num_heads * self.value_head_dim
        self.sizes = (inner, inner, inner_v)
        self.fused = kdim in (None, embed_dim) and vdim in (None, embed_dim)
        if self.fused:
            self.in_proj_weight = nn.Parameter(torch.empty(sum(self.sizes), embed_dim))
            nn.init.xavier_uniform_(self.in_proj_weight)
        else:
            self.q_proj_weight = nn.Parameter(torch.empty(inner, embed_dim))
            self.k_proj_weight = nn.Parameter(torch.empty(inner, kdim or embed_dim))
            self.v_proj_weight = nn.Parameter(torch.empty(inner_v, vdim or embed_dim))
            for weight in (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight):
                nn.init.xavier_uniform_(weight)
        self.in_proj_bias = nn.Parameter(torch.zeros(sum(self.sizes))) if qkv_bias else None
        self.out_proj = nn.Linear(inner_v, embed_dim, bias=bias)
        if bias:
            nn.init.zeros_(self.out_proj.bias)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, query, key=None, value=None, mask=None, score_weights=None, need_weights=False
    ):
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = (
            self._split(x @ weight.T + bias, dim)
            for x, weight, bias, dim in zip(
                (query, key, value),
                self._weights(),
                self._biases(),
                (self.head_dim, self.head_dim, self.value_head_dim),
                strict=True,
            )
        )
        x, weights = scaled_dot_product(q, k, v, mask, score_weights, self.dropout)
        x = x.transpose(1, 2).flatten(2)  # [N, heads, L, d_v] -> [N, L, heads * d_v]
        x = self.out_proj(x)
        return (x, weights) if need_weights else x

    def _weights(self):
        if self.fused:
            return torch.split(self.in_proj_weight, self.sizes)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _biases(self):
        if self.in_proj_bias is None:
            return 0.0, 0.0, 0.0
        return torch.split(self.in_proj_bias, self.sizes)

    def _split(self, x, dim):
        return x.unflatten(-1, (self.num_heads, dim)).transpose(1, 2)  # [N, heads, L, dim]
