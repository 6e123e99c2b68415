"""ViT-B/16 as torchvision trains it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 81.072% top-1 on ImageNet.
Hardware: 64 GPUs, with 64 images each.

The averages move after every update by a 32nd of what the script moves them by after every 32nd,
and from the start on.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vit_b_16",
    dtype="bfloat16",
    augment=("random_resized_crop(size)", "flip()", "rand_augment(2, 9, method=bilinear)"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    repeats=3,
    mixup=0.2,
    cutmix=1.0,
    batch_size=4096,
    epochs=300,
    label_smoothing=0.11,
    optimizer="adamw",
    lr=3e-3,
    weight_decay=0.3,
    clip=1.0,
    ema_decay=1 - 2e-5 * 4096 / 300,
    schedule="cosine",
    warmup_epochs=30,
    warmup_factor=0.033,
    stairs=True,
)
