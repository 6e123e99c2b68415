"""SE-ResNet-50 as in its paper.

Source: Hu et al. 2017 (https://arxiv.org/abs/1709.01507), its part on image classification and
    Table 2; the paper does not say the weight decay, which is that of ResNet.
Expected: 76.71% top-1 and 93.38% top-5 on ImageNet, one crop of each image.
Hardware: four servers (https://github.com/hujie-frank/SENet); how many GPUs is not reported.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="seresnet50",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=1024,
    epochs=100,
    lr=0.6,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60, 90),
)
