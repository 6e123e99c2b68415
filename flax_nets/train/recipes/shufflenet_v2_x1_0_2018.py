"""ShuffleNet-v2 as in its paper.

Source: Ma et al. 2018 (https://arxiv.org/abs/1807.11164), section 4 and Table 8: it trains as
    ShuffleNet does, with a batch of 1024.
Expected: 69.4% top-1 on ImageNet (an error of 30.6%).
Hardware: not reported.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="shufflenet_v2_x1_0",
    augment=("random_resized_crop(size, scale=(0.2, 1.0))", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=1024,
    epochs=240,
    lr=0.5,
    momentum=0.9,
    weight_decay=4e-5,
    schedule="linear",
)
