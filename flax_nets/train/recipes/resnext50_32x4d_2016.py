"""ResNeXt-50 as in its paper.

Source: Xie et al. 2016 (https://arxiv.org/abs/1611.05431), section 4 and Table 3.
Expected: 77.8% top-1 on ImageNet, one crop of each image (an error of 22.2%).
Hardware: eight GPUs, with 32 images each.

The rate is divided by 10 three times, as in Facebook's ResNets for Torch: every 30 epochs.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnext50_32x4d",
    augment=(
        "random_resized_crop(size)",
        "color_jitter(0.4, 0.4, 0.4)",
        "flip()",
        "pca_noise(0.1)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=120,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60, 90),
)
