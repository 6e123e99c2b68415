"""A highway network of 19 layers on CIFAR-10.

Source: Srivastava et al. 2015, "Training very deep networks" (https://arxiv.org/abs/1507.06228),
    section 4.
Expected: about 92.3% on CIFAR-10.
Hardware: not reported.

The paper says: plain gradient descent with momentum and a rate that decays exponentially, images
moved and mirrored at random. It searched for the numbers and does not tell them: those here, and
the widths of the network, are ours.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="highway19_cifar",
    augment=("random_crop(size, padding=4)", "flip()"),
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    batch_size=128,
    epochs=120,
    lr=0.05,
    momentum=0.9,
    weight_decay=0.0,
    schedule="exponential",
    gamma=(0.96,),
    decay_epochs=1,
)
