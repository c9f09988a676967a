"""The ResNet as a function: a plain reference, padding, shortcuts, statistics, pooling, meshes, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.models import PARAMETER_AXES, ResNet, resnet
from odjax.models.resnet import BatchNorm, convolution

SIZES = {"depth": 8, "classes": 3, "channels": 2, "width": 4}
NORM_EPS = 1e-5


def moved(model, images):
    """Variables away from where they start: no scale is 1, no mean 0."""
    variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), images))
    noise = np.random.default_rng(1)
    return jax.tree.map(
        lambda leaf: (
            jnp.asarray(np.abs(leaf + 0.2 * noise.normal(size=leaf.shape)), leaf.dtype)
            if leaf.ndim == 1
            else jnp.asarray(leaf + 0.2 * noise.normal(size=leaf.shape), leaf.dtype)
        ),
        variables,
    )


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(3), (4, 9, 6, 2))


@pytest.fixture(scope="module")
def variables(images):
    return moved(ResNet(**SIZES), images)


def conv(x, kernel, stride):
    """A convolution by its sum, padded by half the window on every side."""
    size = kernel.shape[0]
    x = np.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0)))
    rows, columns = ((n - size) // stride + 1 for n in x.shape[1:3])
    out = np.zeros((len(x), rows, columns, kernel.shape[-1]))
    for i in range(rows):
        for j in range(columns):
            patch = x[:, i * stride : i * stride + size, j * stride : j * stride + size]
            out[:, i, j] = np.einsum("bhwc,hwcd->bd", patch, kernel)
    return out


def norm(x, params, stats):
    return (x - stats["mean"]) / np.sqrt(stats["var"] + NORM_EPS) * params["scale"] + params["bias"]


def reference(variables, images, depth, width):
    """Logits and last map, layer by layer as in section 3.3 and 4.2 of the paper."""
    params, stats = (
        jax.tree.map(lambda p: np.asarray(p, np.float64), variables[c]) for c in ("params", "batch_stats")
    )

    def relu_norm(x, p, s, name):
        return np.maximum(norm(x, p[name], s[name]), 0)

    x = relu_norm(
        conv(np.asarray(images, np.float64), params["stem"]["kernel"], 1), params, stats, "stem_norm"
    )
    for stage in range(3):
        for block in range((depth - 2) // 6):
            p, s = (tree[f"stage_{stage + 1}_block_{block}"] for tree in (params, stats))
            stride = 2 if stage and not block else 1
            y = relu_norm(conv(x, p["conv_1"]["kernel"], stride), p, s, "norm_1")
            y = norm(conv(y, p["conv_2"]["kernel"], 1), p["norm_2"], s["norm_2"])
            if "shortcut" in p:
                x = norm(conv(x, p["shortcut"]["kernel"], stride), p["shortcut_norm"], s["shortcut_norm"])
            elif stride == 2:
                small, x = x[:, ::2, ::2], np.zeros(y.shape)
                before = (width << stage) // 4
                x[..., before : before + small.shape[-1]] = small
            x = np.maximum(x + y, 0)
    return x.mean((1, 2)) @ params["head"]["kernel"] + params["head"]["bias"], x


@pytest.mark.parametrize("depth", [8, 14])
@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_the_network_follows_its_equations(images, depth, shortcut):
    model = ResNet(**SIZES | {"depth": depth, "shortcut": shortcut})
    variables = moved(model, images)
    logits, maps = reference(variables, images, depth, 4)
    found = jax.jit(functools.partial(model.apply, method="features"))(variables, images)
    assert found.shape == (4, 3, 2, 16)
    np.testing.assert_allclose(found, maps, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(jax.jit(model.apply)(variables, images), logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "preset, published, numbers",
    [("resnet20", 0.27, 269_722), ("resnet32", 0.46, 464_154), ("resnet56", 0.85, 853_018)],
)
def test_presets_have_the_sizes_of_the_paper(preset, published, numbers):
    assert round(numbers / 1e6, 2) == published  # table 6
    shapes = {
        shortcut: jax.eval_shape(
            resnet(preset, classes=10, shortcut=shortcut).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3))
        )["params"]
        for shortcut in ("pad", "projection")
    }
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["pad"])) == numbers
    # Two 1x1 convolutions, 16 to 32 and 32 to 64, each with a scale and a bias.
    projections = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["projection"])) == numbers + projections


@given(st.sampled_from([(8, 8), (7, 8), (5, 5)]), st.sampled_from([1, 2]), st.integers(0, 8))
def test_a_strided_convolution_sees_one_pixel_before_and_one_after_its_centre(size, stride, pixel):
    i, j = divmod(pixel, 3)
    x = jnp.zeros((1, *size, 1)).at[0, i, j, 0].set(1.0)
    layer = convolution(1, 3, stride, ("channels", "embed"), "c", dtype=jnp.float32, param_dtype=jnp.float32)
    kernel = jnp.arange(1.0, 10.0).reshape(3, 3, 1, 1)
    y = layer.apply({"params": {"kernel": kernel}}, x)[0, ..., 0]
    assert y.shape == tuple(-(-n // stride) for n in size)
    for a in range(y.shape[0]):
        for b in range(y.shape[1]):
            u, v = i - stride * a + 1, j - stride * b + 1
            assert float(y[a, b]) == (float(kernel[u, v, 0, 0]) if 0 <= u < 3 and 0 <= v < 3 else 0.0)


@given(st.integers(0, 5))
def test_training_normalises_by_the_batch_and_moves_the_running_statistics(seed):
    x = np.random.default_rng(seed).normal(2, 3, (5, 2, 3, 4)).astype(np.float32)
    layer = BatchNorm(momentum=0.75)
    variables = nn.unbox(layer.init(jax.random.key(0), x))
    y, changed = layer.apply(variables, x, train=True, mutable="batch_stats")
    flat = np.asarray(x, np.float64).reshape(-1, 4)
    expected = (x - flat.mean(0)) / np.sqrt(flat.var(0) + NORM_EPS)
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)
    # PyTorch's running variance takes the unbiased one.
    np.testing.assert_allclose(changed["batch_stats"]["mean"], 0.25 * flat.mean(0), rtol=1e-5)
    np.testing.assert_allclose(changed["batch_stats"]["var"], 0.75 + 0.25 * flat.var(0, ddof=1), rtol=1e-5)
    assert jax.tree.map(jnp.shape, changed["batch_stats"]) == {"mean": (4,), "var": (4,)}


def test_without_training_the_statistics_stay_and_images_do_not_meet(images, variables):
    model = ResNet(**SIZES)
    logits, changed = model.apply(variables, images, mutable="batch_stats")
    for new, old in zip(
        jax.tree.leaves(changed["batch_stats"]), jax.tree.leaves(variables["batch_stats"]), strict=True
    ):
        np.testing.assert_array_equal(new, old)
    alone = jnp.concatenate([model.apply(variables, images[i : i + 1]) for i in range(4)])
    np.testing.assert_allclose(alone, logits, rtol=1e-5, atol=1e-5)
    trained, _ = model.apply(variables, images, train=True, mutable="batch_stats")
    assert not np.allclose(trained, logits, atol=1e-2)


def test_initialisation_does_not_move_the_statistics(images):
    init = functools.partial(ResNet(**SIZES).init, train=True)
    for path, leaf in jax.tree.leaves_with_path(jax.jit(init)(jax.random.key(0), images)["batch_stats"]):
        np.testing.assert_array_equal(leaf, np.full(leaf.shape, float("var" in str(path))))


def test_a_sharded_batch_has_the_statistics_of_all_devices(images, variables):
    mesh = jax.make_mesh((4,), ("data",))
    step = jax.jit(functools.partial(ResNet(**SIZES).apply, train=True, mutable="batch_stats"))
    whole, parts = (
        step(variables, x) for x in (images, jax.device_put(images, NamedSharding(mesh, P("data"))))
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


class Spread(nn.Module):
    """Largest minus smallest value, times a parameter: a pool with the interface that poolings share."""

    @nn.compact
    def __call__(self, tokens, *, cls=None, mask=None):
        assert cls is None
        assert mask is None
        scale = self.param("scale", nn.initializers.constant(2.0), (tokens.shape[-1],))
        return (tokens.max(1) - tokens.min(1)) * scale[None]


def test_a_pool_of_ones_own_sees_the_pixels_of_the_last_map(images, variables):
    maps = ResNet(**SIZES).apply(variables, images, method="features")
    bare = ResNet(**SIZES | {"classes": None})
    without = {**variables, "params": {k: v for k, v in variables["params"].items() if k != "head"}}
    np.testing.assert_allclose(bare.apply(without, images), maps.mean((1, 2)), rtol=1e-5)
    model = bare.clone(pool=Spread())
    assert model.init(jax.random.key(0), images)["params"]["pool"]["scale"].shape == (16,)
    params = {**without["params"], "pool": {"scale": jnp.full(16, 2.0)}}
    found = model.apply({**without, "params": params}, images)
    flat = np.asarray(maps).reshape(4, -1, 16)
    np.testing.assert_allclose(found, 2 * (flat.max(1) - flat.min(1)), rtol=1e-5)


@pytest.mark.parametrize("shortcut", ["pad", "projection"])
def test_every_axis_of_every_parameter_has_a_name_or_none(images, shortcut):
    params = jax.eval_shape(ResNet(**SIZES, shortcut=shortcut).init, jax.random.key(0), images)["params"]
    for box in jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= {*PARAMETER_AXES, None}


def test_bf16_computation_is_close_and_keeps_float32_parameters_and_statistics(images, variables):
    exact = ResNet(**SIZES).apply(variables, images)
    model = ResNet(**SIZES, dtype=jnp.bfloat16)
    half, changed = model.apply(variables, images, train=True, mutable="batch_stats")
    assert half.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(changed)} == {jnp.dtype(jnp.float32)}
    half = model.apply(variables, images)
    assert np.abs(half - exact).max() < 12 * 2**-8 * np.abs(exact).max()
    assert model.apply(variables, images, method="features").dtype == jnp.bfloat16


def test_a_new_head_predicts_every_class_alike(images):
    logits, _ = ResNet(**SIZES).init_with_output(jax.random.key(0), images)
    np.testing.assert_array_equal(logits, np.zeros((4, 3)))


def test_a_depth_that_is_not_six_n_plus_two_is_an_error():
    for depth in (2, 18, 34):
        with pytest.raises(ValueError, match=rf"depth must be 6n \+ 2 .* got {depth}"):
            ResNet(depth)
    with pytest.raises(ValueError, match="unknown ResNet preset 'resnet18'; there are resnet8"):
        resnet("resnet18")


def test_other_shortcuts_pools_and_widths_are_errors_that_name_the_choices():
    with pytest.raises(ValueError, match="shortcut must be one of pad, projection, got 'A'"):
        ResNet(8, shortcut="A")
    with pytest.raises(ValueError, match="pool must be 'mean' or a module, got 'max'"):
        ResNet(8, pool="max")
    with pytest.raises(TypeError, match="pool must be 'mean' or a module, got function"):
        ResNet(8, pool=lambda x: x)
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        ResNet(8, width=0)


def test_images_of_another_shape_are_an_error(images, variables):
    for shape in ((9, 6, 2), (4, 9, 6, 3), (4, 0, 6, 2)):
        with pytest.raises(ValueError, match=r"images must be \[batch, height, width, 2\], got shape"):
            ResNet(**SIZES).apply(variables, jnp.zeros(shape))


def test_training_on_one_value_a_channel_is_an_error():
    layer = BatchNorm()
    variables = layer.init(jax.random.key(0), jnp.zeros((1, 4)))
    with pytest.raises(ValueError, match="training needs at least 2: give a larger batch"):
        layer.apply(variables, jnp.zeros((1, 4)), train=True, mutable="batch_stats")
