"""ResNeXt-29 on CIFAR-10, as in its paper.

Source: Xie et al. 2016 (https://arxiv.org/abs/1611.05431), section 5.3 and Table 7.
Expected: 96.35% on CIFAR-10 and 82.23% on CIFAR-100, averages of ten runs.
Hardware: eight GPUs.

The first version of the paper had pre-activated blocks and batches of 256; its authors found these
numbers better (https://github.com/facebookresearch/ResNeXt).
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnext29_8x64d_cifar",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    batch_size=128,
    epochs=300,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="steps",
    milestones=(150, 225),
)
