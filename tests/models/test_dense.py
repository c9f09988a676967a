"""The matrix form of a dense layer's product."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models.dense import matrix_dot, matrix_dot_general


@given(
    st.lists(st.integers(1, 3), max_size=3),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
    st.lists(st.integers(1, 3), min_size=1, max_size=2),
)
def test_the_product_of_matrices_is_the_product_of_tensors(tokens, contracted, features):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(*tokens, *contracted)), jnp.float32)
    w = jnp.asarray(rng.normal(size=(*contracted, *features)), jnp.float32)
    axes = tuple(range(len(tokens), x.ndim)), tuple(range(len(contracted)))
    expected = np.tensordot(np.asarray(x, np.float64), np.asarray(w, np.float64), axes)
    np.testing.assert_allclose(matrix_dot_general(x, w, (axes, ((), ()))), expected, rtol=1e-5, atol=1e-5)


def test_other_axes_are_refused():
    x = jnp.ones((2, 3))
    for dimensions in ((((0,), (0,)), ((), ())), (((1,), (1,)), ((), ())), (((1,), (1,)), ((0,), (0,)))):
        with pytest.raises(ValueError, match="last axes of the activations with the first of the kernel"):
            matrix_dot_general(x, x, dimensions)


def test_the_dtype_of_the_result_can_be_chosen():
    dense = nn.Dense(3, dtype=jnp.bfloat16, use_bias=False, dot_general_cls=matrix_dot(jnp.float32))
    y, _ = dense.init_with_output(jax.random.key(0), jnp.ones((2, 4)))
    assert y.dtype == jnp.float32


def test_the_gradient_of_a_kernel_contracts_one_axis():
    dense = nn.Dense(3, dot_general_cls=matrix_dot())
    x = jnp.ones((2, 5, 4))
    variables = dense.init(jax.random.key(0), x)
    jaxpr = str(jax.make_jaxpr(jax.grad(lambda v: dense.apply(v, x).sum()))(variables))
    assert "dot_general" in jaxpr
    assert "([0, 1], [0, 1])" not in jaxpr
