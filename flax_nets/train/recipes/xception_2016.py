"""Xception as in its paper.

Source: Chollet 2016 (https://arxiv.org/abs/1610.02357), section 4 and Table 1.
Expected: 79.0% top-1 and 94.5% top-5 on ImageNet, one crop of each image.
Hardware: three days on 60 K80 GPUs, synchronously.

The paper averages parameters (Polyak), and does not say by which decay, how large the batch is, and
how many epochs there are: those are ours.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="xception",
    dropout=0.5,
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    batch_size=256,
    epochs=100,
    lr=0.045,
    momentum=0.9,
    weight_decay=1e-5,
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.94,),
    decay_epochs=2,
)
