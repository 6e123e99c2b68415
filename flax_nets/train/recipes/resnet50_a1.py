"""ResNet-50 by procedure A1.

Source: Wightman et al. 2021, "ResNet strikes back" (https://arxiv.org/abs/2110.00476), Table 2.
Expected: 80.4% top-1 on ImageNet at 224 pixels.
Hardware: 4.6 days on four V100 with 32 GB.

timm computes in float16, this recipe in bfloat16.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet50",
    arguments=("stochastic_depth=0.05",),
    dtype="bfloat16",
    augment=(
        'random_resized_crop(size, interpolation="random")',
        "flip()",
        'timm_rand_augment("rand-m7-mstd0.5-inc1", fill=(124, 116, 104))',
    ),
    prepare=('resize(size * 20 // 19, "bicubic")', "center_crop(size)"),
    repeats=3,
    mixup=0.2,
    cutmix=1.0,
    batch_size=2048,
    epochs=600,
    loss="binary_cross_entropy",
    label_smoothing=0.1,
    optimizer="lamb",
    lr=5e-3,
    weight_decay=0.01,
    decay="matrices",
    schedule="timm_cosine",
    lr_min=1e-6,
    warmup_epochs=5,
    warmup_factor=1e-4 / 5e-3,
    stairs=True,
)
