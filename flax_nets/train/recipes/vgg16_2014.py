"""VGG-16 as in its paper, with scale jittering.

Source: Simonyan and Zisserman 2014 (https://arxiv.org/abs/1409.1556), section 3.1 and Table 3,
    configuration D.
Expected: 74.4% top-1 and 91.9% top-5 on ImageNet, tested densely at one scale (384).
Hardware: two to three weeks on four Titan Black.

The paper divides the rate by 10 three times, when the validation accuracy stopped improving: every
20 of its 74 epochs stands in for that. It starts from the layers of configuration A and trains at
one scale first; here initial values are torchvision's, for which pixels are divided by their
deviation too. The command tests one crop.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vgg16",
    augment=(
        "scale_jitter(size * 8 // 7, size * 16 // 7)",
        "random_crop(size)",
        "flip()",
        "pca_noise(0.1)",
    ),
    prepare=("resize(size * 12 // 7)", "center_crop(size)"),
    dropout=0.5,
    batch_size=256,
    epochs=74,
    lr=0.01,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(20, 40, 60),
)
