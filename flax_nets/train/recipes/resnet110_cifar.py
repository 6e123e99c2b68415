"""ResNet-110 on CIFAR-10, as in its paper.

Source: He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2 and Table 6.
Expected: 93.57% on CIFAR-10 for the best of five runs, 93.39% on average.
Hardware: two GPUs.

As `resnet20_cifar`, but the rate is 0.01 until the training error falls below 80%, after about 400
updates says the paper: one epoch here, and then 0.1.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet110_cifar",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    batch_size=128,
    epochs=164,
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(1, 82, 123),
    gamma=(10, 0.1, 0.1),
)
