"""LeNet-5 on MNIST, as in its paper.

Source: LeCun et al. 1998, "Gradient-based learning applied to document recognition", sections II
    and III (http://yann.lecun.com/exdb/publis/pdf/lecun-98.pdf).
Expected: 99.05% of MNIST's test images (an error of 0.95%).
Hardware: two to three days on one R10000 processor of 200 MHz.

Twenty passes, one image at a time; the rate falls after 2, 5, 8 and 12 passes, in the paper from
0.0005 to 0.0002, 0.0001, 0.00005 and 0.00001. There each is divided by 0.02 and an estimate of the
parameter's own second derivative (a diagonal Levenberg-Marquardt method), which gave rates from
0.00007 to 0.016 in the first pass. Plain gradient descent stands in for it here, with one rate for
all within that range. Paper is -0.1 and ink 1.175.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="lenet5_1998",
    augment=("center_crop(size)",),  # which puts 28 pixels in the middle of 32
    prepare=("center_crop(size)",),
    mean=(0.1 / 1.275,),
    std=(1 / 1.275,),
    batch_size=1,
    test_batch=500,
    epochs=20,
    loss="rbf",
    lr=1e-3,
    momentum=0.0,
    schedule="steps",
    milestones=(2, 5, 8, 12),
    gamma=(0.4, 0.5, 0.5, 0.2),
)
