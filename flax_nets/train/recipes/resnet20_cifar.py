"""ResNet-20 on CIFAR-10, as in its paper.

Source: He et al. 2015 (https://arxiv.org/abs/1512.03385), section 4.2 and Table 6.
Expected: 91.25% on CIFAR-10 (an error of 8.75%). With --model resnet32_cifar, resnet44_cifar and
    resnet56_cifar 92.49%, 92.83% and 93.03%.
Hardware: two GPUs.

The rate is divided by 10 after 32,000 and 48,000 of 64,000 updates, which are 82, 123 and 164
epochs of 390. The paper subtracts the mean of each pixel; here each channel is normalised.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="resnet20_cifar",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    batch_size=128,
    epochs=164,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(82, 123),
)
