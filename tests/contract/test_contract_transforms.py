"""What every transform keeps: it drops into any loop, tree, dtype and layout."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from .contract_rows import lenient, rows

ROWS = pytest.mark.parametrize("row", rows("transform"), ids=lambda row: row.id)


def dict_params(dtype=jnp.float32):
    return {"body": {"kernel": jnp.arange(32.0).reshape(8, 4).astype(dtype), "bias": jnp.ones(4, dtype)}}


def gradients(params):
    return jax.tree.map(lambda p: jnp.full_like(p, 0.1), params)


def shapes(tree):
    return jax.tree.map(lambda x: (jnp.shape(x), jnp.result_type(x)), tree)


def steps(transform, params, n=3):
    state, update = transform.init(params), jax.jit(transform.update)
    for _ in range(n):
        updates, state = update(gradients(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def assert_same(a, b, **tolerance):
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, **{"rtol": 2e-6, "atol": 2e-6, **tolerance}), a, b
    )


@ROWS
def test_init_works_on_shapes_alone(row):
    transform = row.build()
    state = jax.eval_shape(transform.init, jax.eval_shape(dict_params))
    assert shapes(state) == shapes(transform.init(dict_params()))


@ROWS
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_structure_shapes_and_dtypes_are_stable_under_update(row, dtype):
    params = dict_params(dtype)
    transform = row.build()
    state = transform.init(params)
    updates, after = jax.eval_shape(transform.update, gradients(params), state, params)
    assert shapes(after) == shapes(state)
    assert shapes(updates) == shapes(params)


@ROWS
def test_jit_equals_eager(row):
    transform, params = row.build(), dict_params()
    state = transform.init(params)
    for _ in range(2):
        eager, eager_state = transform.update(gradients(params), state, params)
        compiled, state = jax.jit(transform.update)(gradients(params), state, params)
        assert_same(compiled, eager)
        assert_same(state, eager_state)


@ROWS
def test_vmap_over_parameters_equals_one_by_one(row):
    transform = row.build()
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), dict_params())
    state = jax.vmap(transform.init)(several)
    for _ in range(2):
        updates, state = jax.vmap(transform.update)(gradients(several), state, several)
    for i in range(2):
        params = jax.tree.map(lambda p, i=i: p[i], several)
        single = transform.init(params)
        for _ in range(2):
            expected, single = transform.update(gradients(params), single, params)
        assert_same(jax.tree.map(lambda u, i=i: u[i], updates), expected)


@ROWS
def test_shardings_survive_and_the_numbers_are_those_of_one_device(row):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    specs = {"body": {"kernel": ("fsdp", "tensor"), "bias": ("tensor",)}}
    place = jax.tree.map(
        lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec)),
        specs,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    transform, params = row.build(), jax.device_put(dict_params(), place)
    after, state = steps(transform, params)
    plain, plain_state = steps(transform, dict_params())
    assert_same(after, plain)
    assert_same(state, plain_state)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(f"{x.sharding}"), after, place
    )
    for leaf in jax.tree.leaves(state):
        if leaf.shape == (8, 4):
            assert leaf.addressable_shards[0].data.shape == (2, 2)


@ROWS
def test_the_state_survives_serialisation(row):
    transform, params = row.build(), dict_params()
    _, state = steps(transform, params)
    data = flax.serialization.to_bytes(state)
    back = flax.serialization.from_bytes(transform.init(params), data)
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)


@ROWS
@pytest.mark.parametrize("form", ["nnx", "partitioned", "list", "holes"])
def test_any_tree_of_parameters_gives_the_numbers_of_a_dict(row, form):
    params = dict_params()
    made = {
        "nnx": lambda: nnx.state(nnx.Linear(8, 4, rngs=nnx.Rngs(0))),
        "partitioned": lambda: {
            "body": {k: nn.Partitioned(v, ("x",) * v.ndim) for k, v in params["body"].items()}
        },
        "list": lambda: [params["body"]["kernel"], (params["body"]["bias"],)],
        "holes": lambda: {"body": {"kernel": params["body"]["kernel"], "bias": None}},
    }[form]()
    after, state = steps(row.build(), made)
    assert jax.tree.structure(after) == jax.tree.structure(made)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves((after, state)))


def wrapped(name, build):
    wraps = {
        "multi_steps": lambda: optax.MultiSteps(build(), every_k_schedule=2),
        "apply_if_finite": lambda: optax.apply_if_finite(build(), 3),
        "inject_hyperparams": lambda: optax.inject_hyperparams(
            lambda clip: optax.chain(optax.clip(clip), build())
        )(0.5),
        "multi_transform": lambda: optax.multi_transform(
            {"a": build(), "b": optax.sgd(0.1)}, {"body": {"kernel": "a", "bias": "b"}}
        ),
        "masked": lambda: optax.masked(build(), {"body": {"kernel": True, "bias": False}}),
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), build()),
    }
    return lenient(wraps[name]().gradient_transformation() if name == "multi_steps" else wraps[name]())


@ROWS
@pytest.mark.parametrize(
    "name", ["multi_steps", "apply_if_finite", "inject_hyperparams", "multi_transform", "masked", "chain"]
)
def test_it_composes_with_the_wrappers_of_optax(row, name):
    params = dict_params()
    transform = wrapped(name, row.build)
    after, state = steps(transform, params, n=4)
    assert shapes(state) == shapes(transform.init(params))
    assert shapes(after) == shapes(params)
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after))
    assert float(jnp.abs(after["body"]["kernel"] - params["body"]["kernel"]).max()) > 0


@ROWS
def test_apply_if_finite_leaves_parameters_and_inner_state_alone_after_a_nan(row):
    params = dict_params()
    transform = wrapped("apply_if_finite", row.build)
    state = transform.init(params)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), gradients(params))
    updates, after = jax.jit(transform.update)(bad, state, params)
    assert max(float(jnp.abs(u).max()) for u in jax.tree.leaves(updates)) == 0
    jax.tree.map(np.testing.assert_array_equal, after.inner_state, state.inner_state)
