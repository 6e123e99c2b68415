"""AlexNet as in its paper.

Source: Krizhevsky et al. 2012, "ImageNet classification with deep convolutional neural networks",
    sections 4 and 5, and Table 2.
Expected: 59.3% top-1 and 81.8% top-5 on ImageNet's validation images, over ten crops of each.
Hardware: five to six days on two GTX 580 with 3 GB.

The paper divides the rate by 10 three times, whenever the validation error stopped improving: every
25 epochs stands in for that. Pixels have their mean subtracted and keep the scale of 0 to 255. The
command tests one crop of each image.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="alexnet_2012",
    augment=(
        "resize(size * 8 // 7)",
        "center_crop(size * 8 // 7)",
        "random_crop(size)",
        "flip()",
        "pca_noise(0.1)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.485, 0.456, 0.406),
    std=(1 / 255, 1 / 255, 1 / 255),
    dropout=0.5,
    batch_size=128,
    epochs=90,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(25, 50, 75),
)
