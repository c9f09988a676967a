"""The ViT as a function: golden values, positions, pooling, regularization, errors."""

import functools

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.ggem import GGeM, ggem_pool
from odjax.heads.pooling import max_pool, token_pooling
from odjax.models import PARAMETER_AXES, ViT, unstack_layers, vit
from odjax.models.positions import _resize_matrix, interpolate_positions, sinusoidal_positions
from odjax.models.vit import ViTLayer

from . import golden

SIZES = {
    "image": (6, 4),
    "patch": 2,
    "channels": 2,
    "layers": 2,
    "width": 8,
    "heads": 2,
    "mlp_width": 12,
    "registers": 3,
    "layer_scale": 0.1,
}


def perturbed(model, images):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), images))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * noise.normal(size=p.shape), p.dtype), params)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(3), (2, 6, 4, 2))


@pytest.fixture(scope="module")
def params(images):
    return perturbed(ViT(**SIZES, classes=5), images)


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_vit_follows_its_equations(images, activation):
    model = ViT(**SIZES, activation=activation)
    params = perturbed(model, images)
    tokens = jax.jit(functools.partial(model.apply, method="features"))({"params": params}, images)
    reference = jax.tree.map(lambda p: np.asarray(p, np.float64), unstack_layers(params))
    expected = golden.vit(reference, np.asarray(images, np.float64), patch=2, eps=1e-6)
    got = jnp.concatenate([tokens.cls[:, None], tokens.registers, tokens.patches], axis=1)
    np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4)


def test_pooling_takes_class_token_or_mean_or_both(images, params):
    features = {k: v for k, v in params.items() if k != "head"}
    tokens = ViT(**SIZES).apply({"params": features}, images, method="features")
    outputs = {
        pool: ViT(**SIZES, pool=pool).apply({"params": features}, images)
        for pool in ("cls", "mean", "cls+mean")
    }
    np.testing.assert_allclose(outputs["cls"], tokens.cls, atol=1e-6)
    np.testing.assert_allclose(outputs["mean"], tokens.patches.mean(1), atol=1e-6)
    np.testing.assert_allclose(
        outputs["cls+mean"], jnp.concatenate([outputs["cls"], outputs["mean"]], -1), atol=1e-6
    )


def test_a_module_pools_the_patches_and_the_head_follows(images, params):
    features = {k: v for k, v in params.items() if k != "head"}
    tokens = ViT(**SIZES).apply({"params": features}, images, method="features")
    p = jnp.array([1.5, 6.0])
    features["pool"] = {"p": p}
    bare = ViT(**SIZES, pool=token_pooling("ggem", num_groups=2))
    got = jax.jit(bare.apply)({"params": features}, images)
    np.testing.assert_allclose(got, ggem_pool(tokens.patches, p), atol=1e-5)

    class Both(nn.Module):
        """Wider features, from all that a pooling is given."""

        @nn.compact
        def __call__(self, tokens, *, cls=None, mask=None):
            assert mask is None
            return jnp.concatenate([GGeM(2, name="inner")(tokens), cls, max_pool(tokens)], axis=-1)

    model = ViT(**SIZES, classes=5, pool=Both())
    kernel = jax.random.normal(jax.random.key(1), (24, 5))
    variables = {**features, "pool": {"inner": {"p": p}}, "head": {"kernel": kernel, "bias": jnp.zeros(5)}}
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), images))["params"]
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)
    pooled = [ggem_pool(tokens.patches, p), tokens.cls, tokens.patches.max(1)]
    got = jax.jit(model.apply)({"params": variables}, images)
    np.testing.assert_allclose(got, jnp.concatenate(pooled, -1) @ kernel, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["cls", "mean"])
def test_a_module_of_a_name_pools_like_the_name(images, params, name):
    features = {k: v for k, v in params.items() if k != "head"}
    got, expected = (
        ViT(**SIZES, pool=pool).apply({"params": features}, images) for pool in (token_pooling(name), name)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("pool", [GGeM, max_pool, None])
def test_a_pool_that_is_no_module_is_refused_at_construction(pool):
    message = (
        r"pool must be one of cls, mean, cls\+mean, or a module called as pool\(tokens, cls=, mask=\), got"
    )
    with pytest.raises(TypeError, match=message):
        ViT(**SIZES, pool=pool)


def test_a_new_head_predicts_every_class_alike(images):
    logits, _ = ViT(**SIZES, classes=5).init_with_output(jax.random.key(0), images)
    np.testing.assert_array_equal(logits, np.zeros((2, 5)))


def test_registers_do_not_change_the_number_of_patch_tokens(images):
    for registers in (0, 3):
        model = ViT(**{**SIZES, "registers": registers})
        tokens, _ = model.init_with_output(jax.random.key(0), images, method="features")
        assert tokens.patches.shape == (2, 6, 8)
        assert tokens.registers.shape == (2, registers, 8)


@pytest.mark.parametrize(
    "preset, published",
    # The totals of the released checkpoints, without the mask token that only pretraining uses.
    [
        ("dinov2-s14", 22_056_576 - 384),
        ("dinov2-b14", 86_580_480 - 768),
        ("dinov2-l14", 304_368_640 - 1024),
        ("dinov2-g14", 1_136_480_768 - 1536),
    ],
)
def test_presets_have_the_sizes_of_the_published_models(preset, published):
    model = vit(preset)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 518, 518, 3)))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


def test_every_axis_of_every_parameter_has_a_name_or_none(images):
    variables = jax.eval_shape(ViT(**SIZES, classes=5).init, jax.random.key(0), images)
    boxes = jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= {*PARAMETER_AXES, None}


def test_bf16_computation_is_close_and_returns_float32(images, params):
    exact = ViT(**SIZES, classes=5).apply({"params": params}, images)
    half = ViT(**SIZES, classes=5, dtype=jnp.bfloat16).apply({"params": params}, images)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 8 * 2**-8 * np.abs(exact).max()


def test_dropout_and_stochastic_depth_are_off_without_training(images, params):
    plain = ViT(**SIZES, classes=5).apply({"params": params}, images)
    model = ViT(**SIZES, classes=5, dropout=0.5, drop_path=0.5)
    np.testing.assert_array_equal(model.apply({"params": params}, images), plain)
    keys = {"dropout": jax.random.key(1)}
    assert not np.allclose(model.apply({"params": params}, images, train=True, rngs=keys), plain)


def test_training_with_stochastic_depth_without_a_key_is_an_error(images, params):
    model = ViT(**SIZES, classes=5, drop_path=0.5)
    with pytest.raises(flax.errors.InvalidRngError, match='"dropout"'):
        model.apply({"params": params}, images, train=True)


def test_a_residual_is_skipped_or_divided_by_its_probability_of_being_kept():
    x = jnp.broadcast_to(jax.random.normal(jax.random.key(0), (1, 3, 8)), (400, 3, 8))
    sizes = {"heads": 2, "mlp_width": 8, "activation": "gelu", "layer_scale": 1.0, "dropout": 0.0}
    rest = {"norm_eps": 1e-6, "attention": None, "dtype": jnp.float32, "param_dtype": jnp.float32}
    layer = ViTLayer(**sizes, **rest, drop_path=True, train=True)
    drop = jnp.asarray(0.75)
    params = nn.unbox(jax.jit(layer.clone(train=False).init)(jax.random.key(1), x, drop))["params"]
    params["mlp_scale"] = jnp.zeros(8)
    plain = layer.clone(train=False).apply({"params": params}, x[:1], drop)
    y = jax.jit(layer.apply)({"params": params}, x, drop, rngs={"dropout": jax.random.key(2)})
    kept = np.abs(y - x).max(axis=(1, 2)) > 1e-6
    np.testing.assert_allclose(
        y[kept] - x[kept], np.broadcast_to(4 * (plain - x[:1]), y[kept].shape), atol=1e-4
    )
    # Four standard deviations of a frequency of 1/4.
    assert abs(kept.mean() - 0.25) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_stochastic_depth_grows_from_zero_at_the_first_layer(images):
    model = ViT(**{**SIZES, "layers": 1}, drop_path=0.5)
    params = perturbed(model, images)
    run = jax.jit(functools.partial(model.apply, train=True))
    outputs = [run({"params": params}, images, rngs={"dropout": jax.random.key(k)}) for k in range(3)]
    np.testing.assert_array_equal(outputs[0], outputs[1])
    np.testing.assert_array_equal(outputs[0], outputs[2])


@pytest.mark.parametrize("method", ["bicubic", "bicubic_antialias"])
def test_interpolation_to_the_same_grid_changes_nothing(method):
    table = jax.random.normal(jax.random.key(0), (1 + 3 * 4, 5))
    np.testing.assert_allclose(interpolate_positions(table, (3, 4), (3, 4), method), table, atol=1e-6)


@given(st.integers(2, 9), st.integers(1, 12), st.booleans(), st.sampled_from([0.0, 0.1]))
def test_interpolation_reproduces_constants(old, new, antialias, offset):
    matrix = _resize_matrix(old, new, -0.5 if antialias else -0.75, (new + offset) / old, antialias)
    np.testing.assert_allclose(matrix.sum(1), np.ones(new), atol=1e-12)


@pytest.mark.parametrize("old, new", [(4, 7), (7, 4), (5, 10)])
def test_antialiased_interpolation_is_jax_image_resize(old, new):
    table = jax.random.normal(jax.random.key(0), (1 + old * 3, 2))
    got = interpolate_positions(table, (old, 3), (new, 3), "bicubic_antialias")
    expected = jax.image.resize(table[1:].reshape(old, 3, 2), (new, 3, 2), "cubic", antialias=True)
    np.testing.assert_allclose(got[1:], expected.reshape(-1, 2), atol=1e-5)
    np.testing.assert_array_equal(got[0], table[0])


def test_doubling_without_antialias_uses_the_taps_of_keys_kernel():
    # Output 4 of 8 looks at input coordinate 1.75, at distances 1.75, 0.75, 0.25 and 1.25 from the inputs.
    a = -0.75

    def near(t):
        return (a + 2) * t**3 - (a + 3) * t**2 + 1

    def far(t):
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a

    matrix = _resize_matrix(4, 8, a, 2.0, antialias=False)
    np.testing.assert_allclose(matrix[4], [far(1.75), near(0.75), near(0.25), far(1.25)], atol=1e-12)
    # At the edge the outermost value is repeated: coordinate -0.25 has two taps on it from outside.
    expected = [far(1.75) + near(0.75) + near(0.25), far(1.25), 0, 0]
    np.testing.assert_allclose(matrix[0], expected, atol=1e-12)


def test_positions_reach_other_sizes_when_asked(params):
    features = {k: v for k, v in params.items() if k != "head"}
    model = ViT(**SIZES, interpolation="bicubic")
    tokens = model.apply({"params": features}, jnp.ones((1, 8, 10, 2)), method="features")
    assert tokens.patches.shape == (1, 20, 8)


@pytest.mark.parametrize(
    "shape, interpolation, message",
    [
        ((1, 6, 6, 2), None, "images must be 6x4, got 6x6; for other sizes set interpolation"),
        ((1, 6, 4, 3), None, r"images must be \[batch, height, width, 2\], got shape \(1, 6, 4, 3\)"),
        ((6, 4, 2), None, r"images must be \[batch, height, width, 2\]"),
        ((1, 7, 4, 2), "bicubic", "multiple of patch 2, got 7x4"),
    ],
    ids=str,
)
def test_images_that_do_not_fit_are_refused(params, shape, interpolation, message):
    with pytest.raises(ValueError, match=message):
        ViT(**SIZES, classes=5, interpolation=interpolation).apply({"params": params}, jnp.zeros(shape))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"image": (5, 4)}, "image 5x4 is not a multiple of patch 2"),
        ({"heads": 3}, "width must be a multiple of heads, got 8 and 3"),
        ({"pool": "max"}, r"pool must be one of cls, mean, cls\+mean, or a module, got 'max'"),
        ({"interpolation": "linear"}, "bicubic_offset, bicubic, bicubic_antialias, got 'linear'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "swish"}, "activation must be one of"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        ViT(**{**SIZES, **change})


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown ViT preset 'h14'; there are tiny-digits, s16"):
        vit("h14")


def test_sinusoidal_positions_follow_their_equation():
    table = sinusoidal_positions(7, 6)
    for t in range(7):
        for i in range(3):
            assert table[t, i] == pytest.approx(np.sin(t / 10000 ** (2 * i / 6)), abs=1e-6)
            assert table[t, 3 + i] == pytest.approx(np.cos(t / 10000 ** (2 * i / 6)), abs=1e-6)
    with pytest.raises(ValueError, match="width must be even"):
        sinusoidal_positions(7, 5)
