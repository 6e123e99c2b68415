"""DenseNet-BC with 100 layers and growth 12 on CIFAR-10, augmented.

Source: Huang et al. 2016 (https://arxiv.org/abs/1608.06993), section 4.2 and Table 2.
Expected: 95.49% on CIFAR-10 (C10+, an error of 4.51%), 77.73% on CIFAR-100.
Hardware: not reported.

The same numbers train densenet40_k12_cifar to 94.76%. Without augmentation the paper adds a dropout
of 0.2.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="densenet_bc100_k12_cifar",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    batch_size=64,
    epochs=300,
    lr=0.1,
    momentum=0.9,
    nesterov=True,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(150, 225),
)
