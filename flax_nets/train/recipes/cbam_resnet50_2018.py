"""ResNet-50 with CBAM, as in its paper.

Source: Woo et al. 2018 (https://arxiv.org/abs/1807.06521), section 4 and Table 4, and its authors'
    training script for batch, momentum and weight decay.
Expected: 77.34% top-1 and 93.69% top-5 on ImageNet, one crop of each image.
Hardware: not reported; the authors checked their code on four GTX 1080 Ti, which has 100 epochs and
    publishes weights of 77.62% (https://github.com/Jongchan/attention-module).
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="cbam_resnet50",
    augment=("random_resized_crop(size)", "flip()"),
    prepare=("resize(size * 8 // 7)", "center_crop(size)"),
    batch_size=256,
    epochs=90,
    lr=0.1,
    momentum=0.9,
    weight_decay=1e-4,
    schedule="steps",
    milestones=(30, 60),
)
