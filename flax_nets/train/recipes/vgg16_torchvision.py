"""VGG-16 as torchvision trains it, and AlexNet.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 71.592% top-1 on ImageNet; 56.522% with --model alexnet.
Hardware: eight V100 GPUs, with 32 images each.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="vgg16",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=90,
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60),
)
