"""Convolution as patches times a matrix is convolution."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from odjax.models.patch_conv import patch_conv

KEY = jax.random.key(0)
LAYOUTS = {1: ("NWC", "WIO", "NWC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


def arrays(axes, window=3, channels=2, features=3, size=8, dtype=jnp.float32):
    x, k = jax.random.split(KEY)
    inputs = jax.random.normal(x, (2, *range(size, size - axes, -1), channels), dtype)
    return inputs, jax.random.normal(k, (*[window] * axes, channels, features), dtype)


def both(inputs, kernel, strides, padding, dilation):
    exact = lax.Precision.HIGHEST
    reference = functools.partial(
        lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        rhs_dilation=dilation,
        dimension_numbers=LAYOUTS[inputs.ndim - 2],
        precision=exact,
    )
    ours = functools.partial(
        patch_conv, window_strides=strides, padding=padding, rhs_dilation=dilation, precision=exact
    )
    return ours, reference


@pytest.mark.parametrize(
    "axes, window, stride, dilation, padding",
    [
        (1, 3, 1, 1, "SAME"),
        (1, 2, 3, 2, [(0, 2)]),
        (2, 1, 2, 1, "VALID"),
        (2, 2, 1, 2, "SAME"),
        (2, 3, 2, 1, "SAME"),
        (2, 3, 1, 2, [(1, 1), (0, 2)]),
        (2, 3, 3, 1, "VALID"),
    ],
)
def test_it_equals_the_convolution_with_its_gradients(axes, window, stride, dilation, padding):
    inputs, kernel = arrays(axes, window)
    convolutions = both(inputs, kernel, (stride,) * axes, padding, (dilation,) * axes)

    @jax.jit
    def results(x, k):
        def loss(conv, x, k):
            out = conv(x, k)
            return jnp.sum(jnp.sin(out)), out

        return [jax.grad(loss, (1, 2), has_aux=True)(conv, x, k) for conv in convolutions]

    ours, reference = results(inputs, kernel)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), ours, reference)


def test_axes_may_differ_in_everything():
    inputs, kernel = arrays(3, size=9)[0], jax.random.normal(KEY, (3, 1, 2, 2, 4))
    ours, reference = both(inputs, kernel, (1, 2, 3), [(1, 0), (0, 0), (2, 1)], (2, 1, 3))
    np.testing.assert_allclose(ours(inputs, kernel), reference(inputs, kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "options", [{}, {"strides": 2}, {"padding": "VALID"}, {"kernel_dilation": 2}, {"padding": "CIRCULAR"}]
)
def test_a_module_takes_it_in_the_place_of_its_own(options):
    inputs, _ = arrays(2)
    plain = nn.Conv(4, (3, 3), **options)
    patched = nn.Conv(4, (3, 3), conv_general_dilated=patch_conv, **options)
    params = plain.init(KEY, inputs)
    jax.tree.map(np.testing.assert_array_equal, patched.init(KEY, inputs), params)
    np.testing.assert_allclose(
        patched.apply(params, inputs), plain.apply(params, inputs), rtol=1e-5, atol=1e-5
    )


def test_no_convolution_is_in_the_program_not_even_for_a_kernel_a_model():
    inputs, kernel = arrays(2)
    kernels = jnp.stack([kernel, 2 * kernel, -kernel])

    def loss(k, x):
        return jnp.sum(patch_conv(x, k, (1, 1), "SAME") ** 2)

    lowered = jax.jit(jax.vmap(jax.grad(loss, (0, 1)), (0, None))).lower(kernels, inputs)
    assert "convolution" not in lowered.as_text()
    assert (
        "convolution"
        in jax.jit(lambda x, k: both(x, k, (1, 1), "SAME", (1, 1))[1](x, k)).lower(inputs, kernel).as_text()
    )
    several = jax.vmap(lambda k: patch_conv(inputs, k, (1, 1), "SAME"))(kernels)
    np.testing.assert_allclose(several[1], 2 * several[0], rtol=1e-5, atol=1e-5)


def test_dtypes_are_those_of_the_convolution():
    inputs, kernel = arrays(2, dtype=jnp.bfloat16)
    assert patch_conv(inputs, kernel, (1, 1), "SAME").dtype == jnp.bfloat16
    wide = patch_conv(inputs, kernel, (1, 1), "SAME", preferred_element_type=jnp.float32)
    assert wide.dtype == jnp.float32
    with jax.enable_x64(True):
        inputs, kernel = arrays(2, dtype=jnp.float64)
        ours, reference = both(inputs, kernel, (2, 1), "SAME", (1, 2))
        np.testing.assert_allclose(ours(inputs, kernel), reference(inputs, kernel), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    "change, match",
    [
        ({"feature_group_count": 2}, "has no groups, got feature_group_count=2 and batch_group_count=1"),
        ({"batch_group_count": 2}, "batch_group_count=2: take jax.lax.conv_general_dilated"),
        ({"lhs_dilation": (2, 1)}, r"does not dilate inputs, got lhs_dilation=\(2, 1\)"),
        ({"dimension_numbers": ("NCHW", "OIHW", "NCHW")}, "channels must come last, as in nn.Conv"),
        ({"padding": [(-1, 0), (0, 0)]}, r"not negative, got \[\(-1, 0\), \(0, 0\)\]"),
        ({"padding": [(1, 1)]}, "for each of 2 axes"),
        (
            {"window_strides": (1,)},
            r"window_strides must be a number of at least 1 for each of 2 axes, got \(1,\)",
        ),
        ({"rhs_dilation": (0, 1)}, r"rhs_dilation must be a number of at least 1 .* got \(0, 1\)"),
        ({"rhs_dilation": (9, 9), "padding": "VALID"}, "nothing is left"),
    ],
)
def test_what_it_does_not_do_is_an_error_that_names_the_argument(change, match):
    inputs, kernel = arrays(2)
    if "dimension_numbers" in change:
        inputs, kernel = jnp.ones((2, 8, 8, 8)), jnp.ones((3, 3, 8, 8))
    arguments = {"window_strides": (1, 1), "padding": "SAME", **change}
    with pytest.raises(ValueError, match=match):
        patch_conv(inputs, kernel, **arguments)


def test_shapes_that_do_not_fit_are_named():
    inputs, kernel = arrays(2)
    with pytest.raises(ValueError, match=r"got \(2, 8, 7, 2\) and \(3, 3, 2\)"):
        patch_conv(inputs, kernel[..., 0], (1, 1), "SAME")
