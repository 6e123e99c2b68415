"""Self-attention (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762), the PyTorch twin.

Parameter names are `torch.nn.MultiheadAttention`'s and `torch.nn.Transformer`'s. Local attention
has a window; sparse attention has the patterns of Child et al. 2019
(https://arxiv.org/abs/1904.10509).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
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
    weights = torch.softmax(scores, -1) if mask is None else masked_softmax(scores)
    kept = weights if dropout is None else dropout(weights)
    return kept @ value, weights


def masked_softmax(scores):
    """Softmax; zeros where all of a row is minus infinity, where it would be NaN."""
    nothing = (scores == -math.inf).all(-1, keepdim=True)
    return torch.softmax(scores.masked_fill(nothing, 0.0), -1).masked_fill(nothing, 0.0)


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
        fused=False,
    ):
        super().__init__()
        self.fused = fused
        qkv_bias = bias if qkv_bias is None else qkv_bias
        self.num_heads = num_heads
        self.head_dim = head_dim or embed_dim // num_heads
        self.value_head_dim = value_head_dim or self.head_dim
        inner, inner_v = num_heads * self.head_dim, num_heads * self.value_head_dim
        self.sizes = (inner, inner, inner_v)
        self.packed = kdim in (None, embed_dim) and vdim in (None, embed_dim)
        if self.packed:
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
        q, k, v = self._project(query, key, value)
        if self.fused and mask is None and score_weights is None and not need_weights:
            dropout = self.dropout.p if self.training else 0.0
            x, weights = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout), None
        else:
            x, weights = scaled_dot_product(q, k, v, mask, score_weights, self.dropout)
        x = x.transpose(1, 2).flatten(2)  # [N, heads, L, d_v] -> [N, L, heads * d_v]
        x = self.out_proj(x)
        return (x, weights) if need_weights else x

    def _project(self, query, key=None, value=None):
        key = query if key is None else key
        value = key if value is None else value
        return [
            self._split(x @ weight.T + bias, dim)
            for x, weight, bias, dim in zip(
                (query, key, value),
                self._weights(),
                self._biases(),
                (self.head_dim, self.head_dim, self.value_head_dim),
                strict=True,
            )
        ]

    def _weights(self):
        if self.packed:
            return torch.split(self.in_proj_weight, self.sizes)
        return self.q_proj_weight, self.k_proj_weight, self.v_proj_weight

    def _biases(self):
        if self.in_proj_bias is None:
            return 0.0, 0.0, 0.0
        return torch.split(self.in_proj_bias, self.sizes)

    def _split(self, x, dim):
        return x.unflatten(-1, (self.num_heads, dim)).transpose(1, 2)  # [N, heads, L, dim]


def local_mask(length, window, causal=False):
    """[length, length], True where j is further than `window` from i (or after it)."""
    i, j = _pairs(length)
    return _far(i, j, window) | _after(i, j, causal)


def strided_mask(length, stride=None, causal=False):
    """i sees its `stride` neighbours, and every position a multiple of `stride` away."""
    i, j = _pairs(length)
    stride = _stride(length, stride)
    return (_far(i, j, stride) & ((i - j) % stride != 0)) | _after(i, j, causal)


def fixed_mask(length, stride=None, summaries=1, causal=False):
    """i sees its block of `stride`, and the last `summaries` positions of every block."""
    i, j = _pairs(length)
    stride = _stride(length, stride)
    other = i // stride != j // stride
    return (other & (j % stride < stride - summaries)) | _after(i, j, causal)


def causal_mask(length):
    """[length, length], True above the diagonal: nobody sees what comes later."""
    return _after(*_pairs(length), True)


def _pairs(length):
    positions = torch.arange(length)
    return positions[:, None], positions[None, :]


def _far(i, j, window):
    return (i - j).abs() > window


def _after(i, j, causal):
    return (j > i) & causal


def _stride(length, stride):
    return stride or max(round(math.sqrt(length)), 1)


class Group:
    """Keys, values and a mask [blocks, B, M], for queries in blocks [N, heads, blocks, B, d_k].

    `axes` of the keys: b and h batch and head, n block, l query in it, m key, d its numbers.
    """

    def __init__(self, axes, key, value, mask):
        self.axes, self.key, self.value, self.mask = axes, key, value, mask


def grouped_attention(query, groups, dropout=None):
    """One softmax over all groups of keys: what a row does not see is never computed."""
    query = query / math.sqrt(query.shape[-1])
    scores = [
        torch.einsum(f"bhnld,{g.axes}->bhnlm", query, g.key).masked_fill(g.mask, -math.inf)
        for g in groups
    ]
    weights = masked_softmax(torch.cat(scores, -1))
    kept = weights if dropout is None else dropout(weights)
    kept = torch.split(kept, [g.mask.shape[-1] for g in groups], -1)
    return sum(
        torch.einsum(f"bhnlm,{g.axes}->bhnld", w, g.value)
        for w, g in zip(kept, groups, strict=True)
    )


class BlockedAttention(MultiHeadAttention):
    """Self-attention whose queries are taken by blocks: what local and sparse have in common."""

    def forward(self, x):
        length = x.shape[1]
        size = self.block_size(length)
        q, k, v = (self._blocks(y, size) for y in self._project(x))
        x = grouped_attention(q, self.groups(k, v, length), self.dropout)
        x = x.flatten(2, 3)[:, :, :length]  # without the padding
        x = x.transpose(1, 2).flatten(2)  # [N, heads, L, d_v] -> [N, L, heads * d_v]
        return self.out_proj(x)

    def _blocks(self, x, size):
        """[N, heads, L, d] -> [N, heads, blocks, size, d], zeros at the end."""
        x = F.pad(x, (0, 0, 0, -x.shape[2] % size))
        return x.unflatten(2, (-1, size))

    def _near(self, key, value, length, window):
        """What lies within `window` of each query, from its block and those beside it."""
        i = self._positions(key)[:, :, None]
        size, reach = key.shape[3], 2 if self.causal else 3
        j = i[:, :1] - size + torch.arange(reach * size)[None, None, :]
        mask = _far(i, j, window) | self._unseen(i, j, length)
        return Group("bhnmd", self._beside(key), self._beside(value), mask)

    def _beside(self, x):
        """[N, heads, blocks, B, d] -> [N, heads, blocks, 2B or 3B, d]: previous, own (and next)."""
        parts = [F.pad(x[:, :, :-1], (0, 0, 0, 0, 1, 0)), x]
        if not self.causal:
            parts.append(F.pad(x[:, :, 1:], (0, 0, 0, 0, 0, 1)))
        return torch.cat(parts, 3)

    def _positions(self, x):
        return torch.arange(x.shape[2] * x.shape[3]).reshape(x.shape[2], x.shape[3])

    def _unseen(self, i, j, length):
        return (j < 0) | (j >= length) | _after(i, j, self.causal)


class LocalAttention(BlockedAttention):
    """Each position attends to `window` neighbours on each side, and to itself."""

    def __init__(self, embed_dim, num_heads, window, causal=False, bias=True, dropout=0.0):
        super().__init__(embed_dim, num_heads, bias=bias, dropout=dropout)
        self.window, self.causal = window, causal

    def block_size(self, length):
        return max(min(self.window, length), 1)

    def groups(self, key, value, length):
        return [self._near(key, value, length, self.window)]

    def mask(self, length):
        return local_mask(length, self.window, self.causal)


class SparseAttention(BlockedAttention):
    """The strided and fixed patterns (Child et al. 2019, section 4.2), both parts in one head."""

    def __init__(
        self,
        embed_dim,
        num_heads,
        pattern="strided",
        stride=None,
        summaries=1,
        causal=False,
        bias=True,
        dropout=0.0,
    ):
        super().__init__(embed_dim, num_heads, bias=bias, dropout=dropout)
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
        keys, values = (y[:, :, :, last].flatten(2, 3) for y in (key, value))
        return [own, Group("bhmd", keys, values, mask)]

    def mask(self, length):
        if self.pattern == "strided":
            return strided_mask(length, self.stride, self.causal)
        return fixed_mask(length, self.stride, self.summaries, self.causal)


def sinusoidal_positions(length, width):
    """[length, width], sines in even places and cosines in odd ones (section 3.5)."""
    angles = np.arange(length)[:, None] / 10000 ** (np.arange(0, width, 2)[None] / width)
    table = np.empty((length, width))
    table[:, 0::2], table[:, 1::2] = np.sin(angles), np.cos(angles)[:, : width // 2]
    return table


class TransformerLayer(nn.Module):
    """What encoder and decoder layers share: the step between, and a two-layer perceptron."""

    def _residual(self, x, norm, branch):
        return x + branch(norm(x)) if self.norm_first else norm(x + branch(x))

    def _feed_forward(self, x):
        return self.linear2(self.dropout(self.activation(self.linear1(x))))


class TransformerEncoderLayer(TransformerLayer):
    """Self-attention and a perceptron, each beside a skip, then a norm (Figure 1 left)."""

    def __init__(
        self,
        d_model,
        nhead,
        dim_feedforward=2048,
        dropout=0.1,
        activation="relu",
        layer_norm_eps=1e-5,
        norm_first=False,
    ):
        super().__init__()
        self.norm_first, self.activation = norm_first, {"relu": F.relu, "gelu": F.gelu}[activation]
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, x, mask=None):
        x = self._residual(x, self.norm1, lambda y: self.dropout1(self.self_attn(y, mask=mask)))
        return self._residual(x, self.norm2, lambda y: self.dropout2(self._feed_forward(y)))


class TransformerDecoderLayer(TransformerLayer):
    """An encoder layer with attention to the memory in between (Figure 1 right)."""

    def __init__(
        self,
        d_model,
        nhead,
        dim_feedforward=2048,
        dropout=0.1,
        activation="relu",
        layer_norm_eps=1e-5,
        norm_first=False,
    ):
        super().__init__()
        self.norm_first, self.activation = norm_first, {"relu": F.relu, "gelu": F.gelu}[activation]
        self.self_attn = MultiHeadAttention(d_model, nhead, dropout=dropout)
        self.multihead_attn = MultiHeadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.norm2 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.norm3 = nn.LayerNorm(d_model, eps=layer_norm_eps)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.dropout3 = nn.Dropout(dropout)

    def forward(self, x, memory, mask=None, memory_mask=None):
        def cross(y):
            return self.dropout2(self.multihead_attn(y, memory, mask=memory_mask))

        x = self._residual(x, self.norm1, lambda y: self.dropout1(self.self_attn(y, mask=mask)))
        x = self._residual(x, self.norm2, cross)
        return self._residual(x, self.norm3, lambda y: self.dropout3(self._feed_forward(y)))


class TransformerStack(nn.Module):
    """Layers, and a last norm or none."""

    def __init__(self, layer, depth, d_model, final_norm, arguments):
        super().__init__()
        self.layers = nn.Sequential(*(layer(d_model, **arguments) for _ in range(depth)))
        self.norm = nn.LayerNorm(d_model, eps=arguments["layer_norm_eps"]) if final_norm else None

    def forward(self, x, *inputs):
        for layer in self.layers:
            x = layer(x, *inputs)
        return x if self.norm is None else self.norm(x)


class Transformer(nn.Module):
    """Encoder and decoder (section 3.1): src and tgt [N, L, d_model], or tokens [N, L]."""

    def __init__(
        self,
        d_model=512,
        nhead=8,
        num_encoder_layers=6,
        num_decoder_layers=6,
        dim_feedforward=2048,
        dropout=0.1,
        activation="relu",
        layer_norm_eps=1e-5,
        norm_first=False,
        final_norm=True,
        vocab_size=None,
        tgt_vocab_size=None,
        share_embeddings=False,
    ):
        super().__init__()
        self.d_model, self.vocab_size = d_model, vocab_size
        arguments = dict(
            nhead=nhead,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            activation=activation,
            layer_norm_eps=layer_norm_eps,
            norm_first=norm_first,
        )
        self.encoder = TransformerStack(
            TransformerEncoderLayer, num_encoder_layers, d_model, final_norm, arguments
        )
        self.decoder = TransformerStack(
            TransformerDecoderLayer, num_decoder_layers, d_model, final_norm, arguments
        )
        own = vocab_size and not share_embeddings
        tgt_vocab_size = tgt_vocab_size or vocab_size
        self.embedding = nn.Embedding(vocab_size, d_model) if vocab_size else None
        self.tgt_embedding = nn.Embedding(tgt_vocab_size, d_model) if own else None
        self.generator = nn.Linear(d_model, tgt_vocab_size, bias=False) if own else None
        for parameter in self.parameters():  # as nn.Transformer draws them
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        for table in (self.embedding, self.tgt_embedding):  # as the authors' code does
            if table is not None:
                nn.init.normal_(table.weight, std=d_model**-0.5)
        self.dropout = nn.Dropout(dropout)

    def forward(self, src, tgt, src_mask=None, tgt_mask=None, memory_mask=None):
        memory = self.encode(src, src_mask)
        return self.decode(tgt, memory, tgt_mask, memory_mask)

    def encode(self, src, mask=None):
        return self.encoder(self._embed(src, self.embedding), mask)

    def decode(self, tgt, memory, mask=None, memory_mask=None):
        x = self._embed(tgt, self.tgt_embedding or self.embedding)
        x = self.decoder(x, memory, mask, memory_mask)
        if self.embedding is None:
            return x
        return x @ self.embedding.weight.T if self.generator is None else self.generator(x)

    def _embed(self, x, embedding):
        if embedding is None:
            return x
        x = embedding(x) * math.sqrt(self.d_model)
        positions = torch.as_tensor(sinusoidal_positions(x.shape[1], self.d_model)).to(x)
        return self.dropout(x + positions)


TRANSFORMERS = {  # Table 3
    "transformer_base": dict(d_model=512, nhead=8, dim_feedforward=2048, dropout=0.1),
    "transformer_big": dict(d_model=1024, nhead=16, dim_feedforward=4096, dropout=0.3),
}


def transformer_base(**overrides):
    """The base model of Table 3, 6 and 6 layers."""
    return Transformer(**TRANSFORMERS["transformer_base"] | overrides)


def transformer_big(**overrides):
    """The big model of Table 3."""
    return Transformer(**TRANSFORMERS["transformer_big"] | overrides)
