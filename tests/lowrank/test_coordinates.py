"""Coordinate sketches in the factor view: gathers and scatters that are the products with unit vectors."""

import collections

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.lowrank import adapt, merge, unmerge
from odjax.lowrank.coordinates import added, gathered, scattered
from odjax.lowrank.factors import Sizes, both, sizes_of, update_of
from odjax.lowrank.layers import Product
from odjax.lowrank.sketches import Coordinates

from .lowrank_models import ANY, KEY, MODELS, bare, trained


@pytest.mark.parametrize(
    "name,law,side",
    [
        ("scanned decoder", "cyclic", "auto"),
        ("unrolled tied decoder", "coordinate", "right"),
        ("unrolled tied decoder", "cyclic", "left"),
        ("products", "cyclic", "left"),
        ("conv net", "cyclic", "left"),
        ("conv net", "cyclic", "right"),
    ],
)
def test_a_model_with_selected_coordinates_is_the_model_of_the_merged_weights(name, law, side):
    params, apply = bare(name)
    model, inputs, _ = MODELS[name]
    model = adapt(model, rank=2, method="rac", where=ANY, law=law, side=side, alpha=3.0)
    own = nn.unbox(jax.jit(model.init)(KEY, *inputs)["params"])
    run = jax.jit(lambda p: model.apply({"params": p}, *inputs))
    np.testing.assert_array_equal(run(own), apply(params))
    own = trained(own)
    merged = merge(model, own)
    out = run(own)
    assert np.abs(out - apply(params)).max() > 1e-3
    np.testing.assert_allclose(out, apply(merged), rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_merging_adds_to_the_selected_rows_or_columns_what_the_product_adds(side, batch):
    sizes = Sizes(batch, (3, 4), (2, 5))
    model = adapt(nn.Dense(4), rank=3, method="rac", law="coordinate", side=side, alpha=6.0)
    kernel = jax.random.normal(KEY, (*batch, 3, 4, 2, 5))
    words = jax.random.bits(KEY, (*batch, 3), jnp.uint32)
    shape = (*batch, 3, 4, 3) if side == "left" else (*batch, 3, 2, 5)
    leaves = {
        "kernel": kernel,
        "lora_sketch": words,
        "lora_a" if side == "left" else "lora_b": jax.random.normal(jax.random.key(1), shape),
    }
    got = merge(model, leaves)["kernel"]
    own = {k: v for k, v in leaves.items() if k != "kernel"}
    assert sizes_of(kernel.shape, own) == sizes
    expected = kernel + update_of(*both(model.spec, own, sizes), 2.0, sizes)
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-5)
    changed = np.count_nonzero(
        np.asarray(got != kernel).reshape(*batch, 12, 10).any(-2 if side == "left" else -1)
    )
    assert changed == 3 * int(np.prod(batch))
    back = unmerge(model, {"kernel": got}, leaves)["kernel"]
    np.testing.assert_allclose(back, kernel, rtol=1e-5, atol=1e-5)


def primitives(function, *args):
    """How often each primitive occurs, in all nested programs too."""
    found = collections.Counter()

    def walk(jaxpr):
        for eqn in jaxpr.eqns:
            found[eqn.primitive.name] += 1
            for value in jax.tree.leaves(eqn.params, is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


@pytest.mark.parametrize("law", ["coordinate", "cyclic"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_frozen_half_of_coordinates_costs_no_product_in_a_step_and_none_in_a_merge(law, side):
    x = jnp.ones((3, 9))
    model = adapt(nn.Dense(7), rank=2, method="rac", law=law, side=side)
    params = model.init(KEY, x)["params"]
    # The layer's own product, and that of the trained half.
    assert primitives(lambda p: model.apply({"params": p}, x), params)["dot_general"] == 2
    assert primitives(lambda p: merge(model, p), params)["dot_general"] == 0
    drawn = adapt(nn.Dense(7), rank=2, method="rac", side=side)
    assert primitives(lambda p: merge(drawn, p), params)["dot_general"] > 0


def test_axes_in_any_order_are_gathered_and_scattered():
    product = Product("ab...c", "", "ca", "xy", "b...xy")
    x = jax.random.normal(KEY, (3, 2, 4, 5, 6))
    sizes = Sizes((), (6, 3), (2, 2))
    made = Coordinates(jnp.array([17, 0, 4]), 2.0, 18)
    table = np.zeros((6, 3, 3), np.float32)
    for r, i in enumerate(made.index):
        table[i // 3, i % 3, r] = 2.0
    got = gathered(x, made, product, sizes)
    np.testing.assert_allclose(got, np.einsum("abdec,car->bder", x, table), rtol=1e-6)
    out = scattered(got, Coordinates(jnp.array([3, 1, 2]), 0.5, 4), sizes.outputs)
    expected = np.zeros((2, 4, 5, 4), np.float32)
    expected[..., [3, 1, 2]] = 0.5 * got
    np.testing.assert_allclose(out.reshape(2, 4, 5, 4), expected, rtol=1e-6)
    with_one = added(jnp.zeros((6, 3, 2, 2)), jnp.ones((3, 2, 2)), made, 1.0, sizes, right=True)
    np.testing.assert_array_equal(with_one, np.einsum("car,rxy->caxy", table, np.ones((3, 2, 2))))
