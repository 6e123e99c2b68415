"""MobileNet-v3 large as torchvision first trained it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 74.042% top-1 on ImageNet (the weights IMAGENET1K_V1); 67.668% with
    --model mobilenet_v3_small.
Hardware: eight V100 GPUs, with 128 images each.

The published weights are the mean over the last three checkpoints that improved the accuracy, which
is left out here.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="mobilenet_v3_large",
    augment=(
        "random_resized_crop(size)",
        "flip()",
        'auto_augment("imagenet", bilinear)',
        "random_erasing(0.2)",
    ),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=1024,
    epochs=600,
    optimizer="rmsprop",
    lr=0.064,
    alpha=0.9,
    eps=0.0316,
    momentum=0.9,
    weight_decay=1e-5,
    schedule="exponential",
    gamma=(0.973,),
    decay_epochs=2,
)
