"""MobileNet-v3 large as in its paper.

Source: Howard et al. 2019 (https://arxiv.org/abs/1905.02244), section 6.1 and Table 3.
Expected: 75.2% top-1 on ImageNet; 67.4% with --model mobilenet_v3_small.
Hardware: a 4 x 4 TPU pod, with 128 images on each chip.

The paper's "learning rate decay rate of 0.01 every 3 epochs" is read as 1% less every 3 epochs. It
does not say the decay and the epsilon of RMSprop, nor the number of epochs, here 600. Images are
prepared as for Inception, from -1 to 1.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="mobilenet_v3_large",
    dropout=0.2,
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    batch_size=4096,
    epochs=600,
    optimizer="rmsprop_tf",
    lr=0.1,
    alpha=0.9,
    eps=1e-3,
    momentum=0.9,
    weight_decay=1e-5,
    decay="matrices",
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.99,),
    decay_epochs=3,
)
