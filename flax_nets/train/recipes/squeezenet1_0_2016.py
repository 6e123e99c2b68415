"""SqueezeNet 1.0 as its authors trained it.

Source: Iandola et al. 2016 (https://arxiv.org/abs/1602.07360), section 3.1 and Table 2, and the
    solver that its authors published beside their Caffe model.
Expected: 57.5% top-1 and 80.3% top-5 on ImageNet.
Hardware: not reported.

170,000 updates of 512 images, 68 epochs, over which the rate falls along a line to 0. Initial
values are torchvision's, for which pixels are divided by their deviation.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="squeezenet1_0",
    dropout=0.5,
    image_size=227,
    augment=(
        "resize(256 * size // 227)",
        "center_crop(256 * size // 227)",
        "random_crop(size)",
        "flip()",
    ),
    prepare=("resize(256 * size // 227)", "center_crop(size)"),
    batch_size=512,
    epochs=68,
    lr=0.04,
    momentum=0.9,
    weight_decay=2e-4,
    schedule="linear",
)
