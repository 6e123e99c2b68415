"""MobileNet-v2 as torchvision first trained it.

Source: torchvision's reference scripts
    (https://github.com/pytorch/vision/tree/main/references/classification).
Expected: 71.878% top-1 on ImageNet (the weights IMAGENET1K_V1).
Hardware: eight V100 GPUs, with 32 images each.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="mobilenet_v2",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=300,
    lr=0.045,
    momentum=0.9,
    weight_decay=4e-5,
    schedule="exponential",
    gamma=(0.98,),
    decay_epochs=1,
)
