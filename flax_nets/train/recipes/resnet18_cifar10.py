"""ResNet-18 on CIFAR-10, well above 94%.

Source: https://github.com/kuangliu/pytorch-cifar, its main.py and the table in its README.
Expected: 95.47% on CIFAR-10.
Hardware: not reported.

The network of ImageNet, with a 3x3 convolution and no pooling in front.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet18",
    arguments=("stem=cifar",),
    image_size=32,
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2023, 0.1994, 0.2010),
    batch_size=128,
    epochs=200,
    lr=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    schedule="cosine",
    stairs=True,
)
