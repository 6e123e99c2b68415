"""timm's names for networks that torchvision has too."""

from convert.dialects import Dialect, Fold

VGG = Dialect(  # its head is made of convolutions, which slide over maps larger than 7x7
    "timm",
    "vgg",
    renames=(
        ("classifier.0.{rest}", "pre_logits.fc1.{rest}"),
        ("classifier.3.{rest}", "pre_logits.fc2.{rest}"),
        ("classifier.6.{rest}", "head.fc.{rest}"),
    ),
    tensors=(Fold("classifier.0.weight", (7, 7)), Fold("classifier.3.weight", (1, 1))),
    arguments=dict(head="conv"),
)

BLOCK = "encoder.layers.encoder_layer_{n}"

VIT = Dialect(
    "timm",
    "vit",
    renames=(
        ("class_token", "cls_token"),
        ("encoder.pos_embedding", "pos_embed"),
        ("conv_proj.{rest}", "patch_embed.proj.{rest}"),
        (f"{BLOCK}.ln_1.{{rest}}", "blocks.{n}.norm1.{rest}"),
        (f"{BLOCK}.self_attention.in_proj_{{rest}}", "blocks.{n}.attn.qkv.{rest}"),
        (f"{BLOCK}.self_attention.out_proj.{{rest}}", "blocks.{n}.attn.proj.{rest}"),
        (f"{BLOCK}.ln_2.{{rest}}", "blocks.{n}.norm2.{rest}"),
        (f"{BLOCK}.mlp.0.{{rest}}", "blocks.{n}.mlp.fc1.{rest}"),
        (f"{BLOCK}.mlp.3.{{rest}}", "blocks.{n}.mlp.fc2.{rest}"),
        ("encoder.ln.{rest}", "norm.{rest}"),
        ("heads.pre_logits.{rest}", "pre_logits.fc.{rest}"),
        ("heads.head.{rest}", "head.{rest}"),
    ),
)

DIALECTS: tuple[Dialect, ...] = (VGG, VIT)
