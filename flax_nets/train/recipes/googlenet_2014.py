"""GoogLeNet as in its paper.

Source: Szegedy et al. 2014 (https://arxiv.org/abs/1409.4842), sections 5 to 7 and Table 3.
Expected: 89.93% top-5 on ImageNet, of one network and one crop (an error of 10.07%).
Hardware: CPUs (DistBelief); the authors guess a week on a few high-end GPUs.

The paper says: asynchronous gradient descent with momentum 0.9, the rate 4% less every 8 epochs,
averaged parameters, auxiliary heads weighted 0.3, crops of 8% to 100% of the area, and random
interpolation. It does not say the first rate, the batch, the decay of the averages or the number of
epochs: those are ours, and weight decay is that of BVLC's Caffe model.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="googlenet_2014",
    dropout=0.4,
    augment=(
        'random_resized_crop(size, interpolation="random")',
        "flip()",
        "color_jitter(0.4, 0.4, 0.4)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=200,
    aux_weight=0.3,
    lr=0.01,
    momentum=0.9,
    weight_decay=2e-4,
    ema_decay=0.9999,
    schedule="exponential",
    gamma=(0.96,),
    decay_epochs=8,
)
