"""MobileNet as in its paper.

Source: Howard et al. 2017 (https://arxiv.org/abs/1704.04861), section 3.2 and Table 8.
Expected: 70.6% top-1 on ImageNet.
Hardware: not reported.

The paper says: RMSprop, asynchronously, as for Inception-v3, without auxiliary heads and label
smoothing, with crops that distort less, and little or no weight decay on depthwise kernels. It
tells no numbers: they are those of `inception_v3_2015`, which its authors published.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="mobilenetv1_100",
    augment=("random_resized_crop(size, scale=(0.35, 1.0))", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    batch_size=32,
    epochs=100,
    optimizer="rmsprop_tf",
    lr=0.045,
    alpha=0.9,
    eps=1.0,
    momentum=0.9,
    weight_decay=4e-5,
    decay="matrices",
    decay_exclude=("*.conv_dw",),
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.94,),
    decay_epochs=2,
)
