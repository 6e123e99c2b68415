"""ResNet-50 as in its paper.

Source: He et al. 2015 (https://arxiv.org/abs/1512.03385), section 3.4 and Table 3.
Expected: 77.15% top-1 and 93.29% top-5 on ImageNet, over ten crops of each image; 75.3% and
    92.2% of one crop, which the command tests.
Hardware: eight GPUs, with 32 images each (https://github.com/KaimingHe/deep-residual-networks).

Up to 600,000 updates, 120 epochs. The rate is divided by 10 when the error plateaus: every 30
epochs stands in for that. The network is torchvision's, with the stride in the 3x3 convolution.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet50",
    augment=(
        "scale_jitter(256 * size // 224, 480 * size // 224)",
        "random_crop(size)",
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
