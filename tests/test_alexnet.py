"""What AlexNet's paper brought: Krizhevsky et al. 2012."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_nets
from flax_nets.models.alexnet import COMPONENTS, SIZES, augment, colour_noise, ten_crops


def shapes(name, side, names, **overrides):
    """Shapes of features at full width, without computing them."""
    model = flax_nets.create_model(name, hidden=8, **overrides)
    x = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    found = jax.eval_shape(lambda x: flax_nets.features(model, x, names), x)
    return [found[name].shape[1:] for name in names]


def test_feature_maps_of_figure_2():
    convolutions = ["features.0", "features.4", "features.8", "features.10", "features.12"]
    found = shapes("alexnet_2012", 224, [*convolutions, "features.14"])
    assert found[0] == (55, 55, 96)
    # the numbers of neurons that the caption gives for layers 2 to 5
    assert [np.prod(shape) for shape in found[1:5]] == [186_624, 64_896, 64_896, 43_264]
    assert found[5] == (6, 6, 256)  # so the adaptive pooling before the dense layers does nothing


def test_kernels_of_section_3_5():
    model = flax_nets.create_model("alexnet_2012", hidden=8)
    kernels = [model.features[i].kernel.shape for i in (0, 4, 8, 10, 12)]
    assert kernels == [
        (11, 11, 3, 96),
        (5, 5, 48, 256),
        (3, 3, 256, 384),
        (3, 3, 192, 384),
        (3, 3, 192, 256),
    ]


def test_each_gpu_sees_its_own_half_until_the_third_convolution():
    model = flax_nets.create_model("alexnet_2012", widths=(4, 4, 4, 4, 4), hidden=8)
    x = jax.random.normal(jax.random.key(0), (1, 9, 9, 4))
    for layer, mixes in ((4, False), (8, True), (10, False), (12, False)):
        grad = jax.grad(lambda x, i=layer: jnp.sum(model.features[i](x)[..., :2]))(x)
        assert jnp.any(grad[..., :2] != 0)
        assert jnp.any(grad[..., 2:] != 0) == mixes


def test_response_normalisation_is_the_paper_s_formula():
    a = np.random.default_rng(0).normal(size=(2, 3, 3, 12)) * 30
    k, n, alpha, beta, channels = 2, 5, 1e-4, 0.75, 12
    wanted = np.empty_like(a)
    for i in range(channels):
        near = a[..., max(0, i - n // 2) : min(channels - 1, i + n // 2) + 1]
        wanted[..., i] = a[..., i] / (k + alpha * (near**2).sum(-1)) ** beta
    model = flax_nets.create_model("alexnet_2012", hidden=8)
    for layer in (2, 6):
        found = model.features[layer](jnp.asarray(a))
        np.testing.assert_allclose(found, wanted, rtol=1e-12)


def test_offsets_of_section_5_start_at_one_where_the_paper_says():
    model = flax_nets.create_model("alexnet_2012", hidden=8, num_classes=3)
    ones = [i for i in (0, 4, 8, 10, 12) if jnp.all(model.features[i].bias[...] == 1)]
    dense = [i for i in (0, 3, 6) if jnp.all(model.classifier[i].bias[...] == 1)]
    assert (ones, dense) == ([4, 10, 12], [0, 3])
    assert jnp.all(model.features[0].bias[...] == 0)
    assert jnp.all(model.classifier[6].bias[...] == 0)


def test_pooling_overlaps():
    model = flax_nets.create_model("alexnet", hidden=8)
    for layer in (2, 5, 12):
        pooling = model.features[layer]
        assert (pooling.kernel_size, pooling.stride) == ((3, 3), (2, 2))


@pytest.mark.parametrize("name", ["alexnet", "alexnet_2012"])
def test_without_head_the_last_hidden_layer_comes_out(name):
    model = flax_nets.create_model(name, hidden=8, num_classes=0)
    assert model(jnp.zeros((2, 64, 64, 3))).shape == (2, 8)


def test_colour_noise_has_the_principal_components_covariance():
    images = jnp.zeros((20_000, 1, 1, 3))
    shifts = np.asarray(colour_noise(images, jax.random.key(0), std=0.1))[:, 0, 0]
    components = np.array(COMPONENTS)
    wanted = components @ np.diag((0.1 * np.array(SIZES)) ** 2) @ components.T
    np.testing.assert_allclose(np.cov(shifts.T), wanted, rtol=0.05)
    np.testing.assert_allclose(components.T @ components, np.eye(3), atol=1e-3)


def test_colour_noise_shifts_all_pixels_of_an_image_alike():
    images = jax.random.uniform(jax.random.key(1), (3, 4, 5, 3))
    shifts = colour_noise(images, jax.random.key(0)) - images
    np.testing.assert_allclose(
        shifts, jnp.broadcast_to(shifts[:, :1, :1], shifts.shape), atol=1e-12
    )
    assert len({float(s) for s in shifts[:, 0, 0, 0]}) == 3


def test_training_views_are_windows_mirrored_half_of_the_time():
    side, size, count = 12, 8, 64
    rows, columns = np.meshgrid(np.arange(side), np.arange(side), indexing="ij")
    image = np.stack([rows, columns, np.zeros_like(rows)], -1).astype(float)
    views = augment(jnp.asarray(np.stack([image] * count)), jax.random.key(0), size)
    assert views.shape == (count, size, size, 3)
    steps = np.asarray(views[:, 1, 1] - views[:, 0, 0])  # colour noise cancels
    np.testing.assert_allclose(steps[:, 0], 1)
    np.testing.assert_allclose(np.abs(steps[:, 1]), 1)
    assert 0.25 < (steps[:, 1] < 0).mean() < 0.75
    tops = {round(float(top)) for top in views[:, 0, 0, 0]}
    assert tops == set(range(side - size + 1))


def test_training_views_do_not_fit_into_smaller_images():
    with pytest.raises(ValueError, match="200 x 300"):
        augment(jnp.zeros((1, 200, 300, 3)), jax.random.key(0))


def test_ten_test_views():
    images = jax.random.normal(jax.random.key(0), (2, 9, 11, 3))
    views = ten_crops(images, 5)
    assert views.shape == (10, 2, 5, 5, 3)
    for view, window in zip(
        views,
        (
            images[:, :5, :5],
            images[:, :5, 6:],
            images[:, 4:, :5],
            images[:, 4:, 6:],
            images[:, 2:7, 3:8],
        ),
        strict=False,
    ):
        np.testing.assert_array_equal(view, window)
    np.testing.assert_array_equal(views[5:], views[:5, :, :, ::-1])
