"""Inception-v3 as in its paper.

Source: Szegedy et al. 2015 (https://arxiv.org/abs/1512.00567), sections 7 and 8 and Table 3; the
    momentum, weight decay, averages, colours and weight of the auxiliary head as in the training
    script of TensorFlow's models, since the paper leaves them out.
Expected: 78.8% top-1 and 94.4% top-5 on ImageNet, one crop of each image.
Hardware: 50 replicas, each on a Kepler GPU.

Each replica updates the parameters by its own 32 images as soon as it can. One process with 32
images does that without delay. For larger batches raise --batch-size and --lr together.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="inception_v3",
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
    epochs=100,
    label_smoothing=0.1,
    aux_weight=0.4,
    optimizer="rmsprop_tf",
    lr=0.045,
    alpha=0.9,
    eps=1.0,
    momentum=0.9,
    weight_decay=4e-5,
    decay="matrices",
    clip=2.0,
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.94,),
    decay_epochs=2,
)
