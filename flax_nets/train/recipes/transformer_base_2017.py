"""The Transformer's optimizer, schedule and regularisation, for loops over sentences.

Source: Vaswani et al. 2017 (https://arxiv.org/abs/1706.03762), section 5 and Table 2.
Expected: 27.3 BLEU on WMT 2014 English to German.
Hardware: twelve hours on eight P100 GPUs.

Not for `flax-nets train`, which has images only: `recipes.optimizer(recipe, 4000)` is what a loop
of one's own takes. An epoch here is 4,000 updates, so that there are 100,000, of which the first
4,000 raise the rate to 512 ** -0.5 * 4000 ** -0.5; then it falls with the inverse square root of
the step. A batch of the paper has 25,000 tokens on each side, about 1,000 sentences.
"""

from flax_nets.train.recipes import Recipe

RECIPE = Recipe(
    model="transformer_base",
    dropout=0.1,
    batch_size=1000,
    epochs=25,
    label_smoothing=0.1,
    optimizer="adam",
    lr=512**-0.5 * 4000**-0.5,
    betas=(0.9, 0.98),
    eps=1e-9,
    schedule="inverse_sqrt",
    warmup_epochs=1,
)
