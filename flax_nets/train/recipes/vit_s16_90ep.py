"""ViT-S/16 in 90 epochs.

Source: Beyer et al. 2022, "Better plain ViT baselines for ImageNet-1k"
    (https://arxiv.org/abs/2205.01580), and big_vision's configs/vit_s16_i1k.py.
Expected: 76.5% top-1 on ImageNet; 80.0% with --epochs 300.
Hardware: six to seven hours on a TPU-v3-8.

10,000 updates of warm-up are 8 epochs of 1,251. Weight decay is 0.0001 beside the rate there, and
0.1 times the rate of 0.001 here, on kernels alone. Positions are learned here, and sines and
cosines in the source, which trains on 99% of the images and keeps Adam's first moment in bfloat16.
RandAugment is timm's form of it.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vit_small_patch16_224",
    arguments=("class_token=False", "pool=mean", "representation_size=384"),
    augment=(
        "random_resized_crop(size, scale=(0.05, 1.0))",
        "flip()",
        'timm_rand_augment("rand-m10-n2")',
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    mixup=0.2,
    batch_size=1024,
    epochs=90,
    optimizer="adamw",
    lr=1e-3,
    weight_decay=0.1,
    decay="matrices",
    decay_exclude=("encoder.pos_embedding",),
    clip=1.0,
    schedule="cosine",
    warmup_epochs=8,
    warmup_factor=0.0,
)
