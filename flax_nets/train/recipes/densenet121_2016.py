"""DenseNet-121 as in its paper.

Source: Huang et al. 2016 (https://arxiv.org/abs/1608.06993), section 4.2 and Table 3.
Expected: 74.98% top-1 and 92.29% top-5 on ImageNet, one crop of each image.
Hardware: four GPUs in the authors' command (https://github.com/liuzhuang13/DenseNet).

Augmented as in Facebook's ResNets for Torch: crops, mirroring and colours.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="densenet121",
    augment=(
        "random_resized_crop(size)",
        "color_jitter(0.4, 0.4, 0.4)",
        "flip()",
        "pca_noise(0.1)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=90,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60),
)
