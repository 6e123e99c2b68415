"""MobileNet-v2 as in its paper.

Source: Sandler et al. 2018 (https://arxiv.org/abs/1801.04381), section 6.1 and Table 4.
Expected: 72.0% top-1 on ImageNet.
Hardware: 16 GPUs, asynchronously, with 96 images each.

A worker's 96 images are the batch of an update. The paper does not say epsilon, taken to be 1 as in
Inception-v3, nor the number of epochs: 412 are the 5.5 million updates of its authors' script
(https://github.com/tensorflow/models, research/slim/nets/mobilenet), which besides smooths labels
and averages parameters: --label-smoothing 0.1 --ema-decay 0.9999.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="mobilenet_v2",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=96,
    epochs=412,
    optimizer="rmsprop_tf",
    lr=0.045,
    alpha=0.9,
    eps=1.0,
    momentum=0.9,
    weight_decay=4e-5,
    decay="matrices",
    schedule="exponential",
    gamma=(0.98,),
    decay_epochs=1,
)
