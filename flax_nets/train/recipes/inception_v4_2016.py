"""Inception-v4 as in its paper.

Source: Szegedy et al. 2016 (https://arxiv.org/abs/1602.07261), section 4 and Table 2; label
    smoothing, momentum, weight decay, averages and colours as for `inception_v3_2015`.
Expected: 80.0% top-1 and 95.0% top-5 on ImageNet, one crop of each image.
Hardware: 20 replicas, each on a Kepler GPU.

The paper does not say the number of epochs: its figures reach 160. Of the replicas' batches see
`inception_v3_2015`.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="inception_v4",
    dropout=0.2,
    augment=(
        "random_resized_crop(size)",
        "flip()",
        "color_jitter(0.125, 0.5, 0.5, 0.2)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    batch_size=32,
    epochs=160,
    label_smoothing=0.1,
    optimizer="rmsprop_tf",
    lr=0.045,
    alpha=0.9,
    eps=1.0,
    momentum=0.9,
    weight_decay=4e-5,
    decay="matrices",
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.94,),
    decay_epochs=2,
)
