"""What every adapter keeps: the model's own parameters, its function at the start, and what merging means."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import combine, leaves_with_paths, partition, unbox
from odjax.lowrank.merge import init_factors, merge
from odjax.lowrank.methods import ADDED, FACTORS

from .contract_rows import KEY, rows

ALL = rows("adapter")


@pytest.fixture(scope="module", params=ALL, ids=[row.id for row in ALL])
def made(request):
    """The adapted model, its arguments, the bare model's parameters, and the adapted model's made from them."""
    model, arguments = request.param.build()
    base = unbox(jax.jit(model.inner.init)(KEY, *arguments)["params"])
    params = unbox(init_factors(model, base, jax.random.key(1), *arguments))
    return model, arguments, base, params


def trained_a_little(params):
    """Factors away from their start."""
    free, rest = partition(params, FACTORS)
    leaves, structure = jax.tree.flatten(free)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [x + 0.1 * jax.random.normal(k, x.shape, x.dtype) for x, k in zip(leaves, keys, strict=True)]
    return combine(structure.unflatten(moved), rest)


def test_the_parameters_are_those_of_the_model_and_what_is_added(made):
    model, arguments, base, params = made
    added, own = partition(params, ADDED)
    assert [path for path, _ in leaves_with_paths(own)] == [path for path, _ in leaves_with_paths(base)]
    assert leaves_with_paths(added)
    fresh = unbox(jax.eval_shape(model.init, KEY, *arguments)["params"])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), fresh) == jax.tree.map(
        lambda x: (x.shape, x.dtype), params
    )


def test_the_function_at_the_start_is_that_of_the_model(made):
    model, arguments, base, params = made
    before = model.inner.apply({"params": base}, *arguments)
    after = jax.jit(model.apply)({"params": params}, *arguments)
    np.testing.assert_allclose(after, before, atol=2e-6 * float(jnp.abs(before).max()) + 1e-6)


def test_merged_weights_serve_what_the_factors_do(made):
    model, arguments, _, params = made
    params = trained_a_little(params)
    factored = model.apply({"params": params}, *arguments)
    merged = merge(model, params)
    served = model.inner.apply({"params": merged}, *arguments)
    np.testing.assert_allclose(served, factored, atol=1e-5 * float(jnp.abs(factored).max()))
    start = model.inner.apply({"params": merge(model, made[3])}, *arguments)
    assert float(jnp.abs(served - start).max()) > 1e-3


def test_the_gradient_of_the_factors_is_finite_and_nothing_else_has_one(made):
    model, arguments, _, params = made
    free, frozen = partition(trained_a_little(params), FACTORS)
    grads = jax.jit(
        jax.grad(lambda free: jnp.square(model.apply({"params": combine(free, frozen)}, *arguments)).mean())
    )(free)
    assert jax.tree.structure(grads) == jax.tree.structure(free)
    for path, leaf in leaves_with_paths(grads):
        assert bool(jnp.isfinite(leaf).all()), path
        assert float(jnp.abs(leaf).max()) > 0, path
