"""Vision Transformer (Dosovitskiy et al. 2020, https://arxiv.org/abs/2010.11929), the PyTorch twin.

Attribute names are torchvision's; `deit_*` (Touvron et al. 2020, https://arxiv.org/abs/2012.12877)
adds a distillation token and a head for it.
"""

import math
from collections import OrderedDict
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_ref.attention import MultiHeadAttention


class DistilledOutput(NamedTuple):
    """Logits of the class token, and of the distillation token."""

    logits: torch.Tensor
    distilled: torch.Tensor


class EncoderBlock(nn.Module):
    """Attention and a two-layer perceptron, each after a norm and beside a skip (Figure 1)."""

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
    ):
        super().__init__()
        self.remat = remat
        self.ln_1 = nn.LayerNorm(width, eps=norm_eps)
        self.self_attention = MultiHeadAttention(
            width,
            num_heads,
            qkv_bias=qkv_bias,
            head_dim=attention_width // num_heads,
            dropout=attention_dropout,
            fused=fused,
        )
        self.dropout = nn.Dropout(dropout)
        self.ln_2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = nn.Sequential(
            nn.Linear(width, mlp_dim),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(mlp_dim, width),
            nn.Dropout(dropout),
        )

    def forward(self, x):
        if self.remat and self.training:
            return checkpoint(self.both, x, use_reentrant=False)
        return self.both(x)

    def both(self, x):
        x = x + self.dropout(self.self_attention(self.ln_1(x)))
        return x + self.mlp(self.ln_2(x))


class Encoder(nn.Module):
    """Positions, blocks and the last norm (equations 2 to 4, before the head)."""

    def __init__(self, length, depth, width, dropout, norm_eps, block_arguments):
        super().__init__()
        self.pos_embedding = nn.Parameter(torch.empty(1, length, width))
        self.dropout = nn.Dropout(dropout)
        blocks = {
            f"encoder_layer_{i}": EncoderBlock(
                width, norm_eps=norm_eps, dropout=dropout, **block_arguments
            )
            for i in range(depth)
        }
        self.layers = nn.Sequential(OrderedDict(blocks))
        self.ln = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x):
        x = self.dropout(x + self.pos_embedding)
        return self.ln(self.layers(x))


class PatchNorm(nn.LayerNorm):
    """Layer norm of each patch's pixels (Kumar et al. 2023, https://arxiv.org/abs/2302.01327).

    Its numbers stand in the order row, column, channel."""

    def __init__(self, patch_size, channels, eps):
        super().__init__(patch_size**2 * channels, eps=eps)
        self.patch_size = patch_size

    def forward(self, x):
        n, c, h, w = x.shape
        p = self.patch_size
        x = x.reshape(n, c, h // p, p, w // p, p)
        x = x.permute(0, 2, 4, 3, 5, 1)  # [N, H/p, W/p, p, p, C]
        shape = x.shape
        x = super().forward(x.flatten(3)).reshape(shape)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


class VisionTransformer(nn.Module):
    """Images [N, in_channels, image_size, image_size] -> logits [N, num_classes]."""

    def __init__(
        self,
        image_size=224,
        patch_size=16,
        depth=12,
        width=768,
        num_heads=12,
        mlp_dim=None,
        attention_width=None,
        representation_size=None,
        class_token=True,
        pool="token",
        patch_norm=False,
        distilled=False,
        distilled_training=False,
        qkv_bias=True,
        norm_eps=1e-6,
        initialise="torchvision",
        num_classes=1000,
        in_channels=3,
        dropout=0.0,
        attention_dropout=0.0,
        fused=False,
        remat=False,
    ):
        super().__init__()
        self.pool, self.distilled_training = pool, distilled_training
        self.prefix = class_token + distilled
        self.patch_norm = PatchNorm(patch_size, in_channels, norm_eps) if patch_norm else None
        self.conv_proj = nn.Conv2d(in_channels, width, patch_size, stride=patch_size)
        self.proj_norm = nn.LayerNorm(width, eps=norm_eps) if patch_norm else None
        self.class_token = nn.Parameter(torch.empty(1, 1, width)) if class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, width)) if distilled else None
        self.encoder = Encoder(
            (image_size // patch_size) ** 2 + self.prefix,
            depth,
            width,
            dropout,
            norm_eps,
            dict(
                num_heads=num_heads,
                attention_width=attention_width or width,
                mlp_dim=mlp_dim or 4 * width,
                qkv_bias=qkv_bias,
                attention_dropout=attention_dropout,
                fused=fused,
                remat=remat,
            ),
        )
        heads = OrderedDict()
        if representation_size:
            heads["pre_logits"] = nn.Linear(width, representation_size)
            heads["act"] = nn.Tanh()
        if num_classes:
            heads["head"] = nn.Linear(representation_size or width, num_classes)
        self.heads = nn.Sequential(heads)
        self.head_dist = nn.Linear(width, num_classes) if distilled and num_classes else None
        if initialise == "torchvision":
            self._initialise_torchvision()
        else:
            self._initialise_timm()

    def forward(self, x):
        x = self.conv_proj(x if self.patch_norm is None else self.patch_norm(x))
        x = x.flatten(2).transpose(1, 2)  # [N, C, H, W] -> [N, H*W, C]
        x = x if self.proj_norm is None else self.proj_norm(x)
        tokens = [t for t in (self.class_token, self.dist_token) if t is not None]
        x = torch.cat([*(t.expand(len(x), -1, -1) for t in tokens), x], 1)
        x = self.encoder(x)
        if self.dist_token is not None:
            return self._distilled(x)
        if self.pool == "token":
            return self.heads(x[:, 0])
        return self.heads(x[:, self.prefix if self.pool == "mean" else 0 :].mean(1))

    def _distilled(self, x):
        logits = self.heads(x[:, 0])
        distilled = x[:, 1] if self.head_dist is None else self.head_dist(x[:, 1])
        if self.training and self.distilled_training:
            return DistilledOutput(logits, distilled)
        return (logits + distilled) / 2

    def _initialise_torchvision(self):
        if self.class_token is not None:
            nn.init.zeros_(self.class_token)
        nn.init.normal_(self.encoder.pos_embedding, std=0.02)
        fan_in = self.conv_proj.weight[0].numel()
        nn.init.trunc_normal_(self.conv_proj.weight, std=math.sqrt(1 / fan_in))
        nn.init.zeros_(self.conv_proj.bias)
        for block in self.encoder.layers:
            for dense in (block.mlp[0], block.mlp[3]):
                nn.init.xavier_uniform_(dense.weight)
                nn.init.normal_(dense.bias, std=1e-6)
        if hasattr(self.heads, "pre_logits"):
            dense = self.heads.pre_logits
            nn.init.trunc_normal_(dense.weight, std=math.sqrt(1 / dense.in_features))
            nn.init.zeros_(dense.bias)
        for head in (getattr(self.heads, "head", None), self.head_dist):
            if head is not None:
                nn.init.zeros_(head.weight)
                nn.init.zeros_(head.bias)
        if self.dist_token is not None:
            nn.init.zeros_(self.dist_token)

    def _initialise_timm(self):
        if self.class_token is not None:
            nn.init.normal_(self.class_token, std=1e-6)
        nn.init.trunc_normal_(self.encoder.pos_embedding, std=0.02)
        if self.dist_token is not None:
            nn.init.trunc_normal_(self.dist_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            if isinstance(module, MultiHeadAttention):
                nn.init.trunc_normal_(module.in_proj_weight, std=0.02)


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
