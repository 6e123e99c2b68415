"""Network in Network on CIFAR-10, as in its paper.

Source: Lin et al. 2013 (https://arxiv.org/abs/1312.4400), section 4.2, and its authors' solver in
    Caffe's model zoo for the numbers that the paper leaves out.
Expected: 91.19% on CIFAR-10 with augmentation (an error of 8.81%).
Hardware: not reported.

The rate falls to a tenth when the training accuracy stops improving, and once more: after 100,000
and 110,000 of 120,000 updates stands in for that. The paper whitens images (global contrast
normalisation and ZCA); here they are normalised by channel.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="nin_cifar10",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    dropout=0.5,
    batch_size=128,
    epochs=307,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(256, 282),
)
