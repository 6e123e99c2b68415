"""ShuffleNet with three groups, as in its paper.

Source: Zhang et al. 2017 (https://arxiv.org/abs/1707.01083), section 4 and Table 2.
Expected: 67.4% top-1 on ImageNet (an error of 32.6%).
Hardware: one or two days on four GPUs.

300,000 updates, 240 epochs, over which the rate falls along a line from 0.5 to 0. "Slightly less
aggressive scale augmentation" than ResNeXt's is read as crops from 20% of the area on.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="shufflenet_v1_x1_0_g3",
    augment=("random_resized_crop(size, scale=(0.2, 1.0))", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=1024,
    epochs=240,
    lr=0.5,
    momentum=0.9,
    weight_decay=4e-5,
    schedule="linear",
)
