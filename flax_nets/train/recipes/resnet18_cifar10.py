"""ResNet-18 on CIFAR-10, well above 94%.

Source: DeVries and Taylor 2017 (https://arxiv.org/abs/1708.04552), section 4 and Table 1, and their
    training script (https://github.com/uoguelph-mlrg/Cutout).
Expected: 95.28% on CIFAR-10, the mean of five runs (an error of 4.72%).
Hardware: not reported.

The paper's baseline, without cutout. The network is that of ImageNet, with a 3x3 convolution and no
pooling in front.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet18",
    arguments=("stem=cifar",),
    image_size=32,
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(125.3 / 255, 123.0 / 255, 113.9 / 255),
    std=(63.0 / 255, 62.1 / 255, 66.7 / 255),
    batch_size=128,
    epochs=200,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(60, 120, 160),
    gamma=(0.2,),
)
