"""The gradient view on a mesh: nothing of the size of a weight is gathered or reduced."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.lowrank import average_over, rac_lora

from .gradient_cases import KEY, lenient


def collectives(text):
    """(kind, number of elements) of the collectives of a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute)(-start)?\(", line
        )
        if match:
            shapes = re.findall(r"\w+\[([\d,]*)\]", match[1])
            found.append((match[2], max(int(np.prod([int(x) for x in s.split(",") if x])) for s in shapes)))
    return found


@pytest.mark.parametrize("law", ["orthonormal", "coordinate"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_on_a_mesh_no_weight_is_gathered_and_the_numbers_are_those_of_one_device(law, side):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = lambda *names: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))  # noqa: E731
    tx = rac_lora(lenient(optax.scale_by_adam()), 2, 2, key=KEY, law=law, side=side)
    params = {
        "layers": {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 64, 32)), jnp.float32)}
    }
    place = {"layers": {"kernel": spec(None, "fsdp", "tensor")}}
    kept = spec(None, "fsdp", None) if side == "left" else spec(None, None, "tensor")
    states = jax.tree.map(lambda z: kept if jnp.ndim(z) == 3 else spec(), tx.init(params))
    update = jax.jit(tx.update, in_shardings=(place, states), out_shardings=(place, states))
    update = update.lower(params, tx.init(params)).compile()
    params, state, plain = (
        jax.device_put(params, place),
        jax.device_put(tx.init(params), states),
        tx.init(params),
    )
    single = jax.jit(tx.update)
    for _ in range(3):
        got, state = update(params, state)
        expected, plain = single(jax.device_get(params), plain)
        np.testing.assert_allclose(
            got["layers"]["kernel"], expected["layers"]["kernel"], rtol=1e-3, atol=1e-4
        )
    weight = 64 * 32 // 8  # a device's part of one layer
    for kind, size in collectives(update.as_text()):
        assert kind == "all-reduce" or size <= 2 * 2 * 64, (kind, size)
        assert size < weight * 2, (kind, size)


def test_under_data_parallelism_the_all_reduce_carries_factors():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rng = np.random.default_rng(0)
    w, x, y = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, 32), (16, 64), (16, 32)))
    options = {"key": KEY, "side": "left"}
    adam = lenient(optax.scale_by_adam())
    inside = rac_lora(optax.chain(average_over("data"), adam), 2, 3, **options)
    loss = lambda p, x, y: jnp.mean((x @ p["w"] - y) ** 2)  # noqa: E731
    state = rac_lora(adam, 2, 3, **options).init({"w": w})
    spec = jax.sharding.PartitionSpec

    def step(params, inner, x, y):
        local = jax.tree.map(lambda p: jax.lax.pcast(p, "data", to="varying"), params)
        held = state._replace(factors=(optax.EmptyState(), inner))._replace(rest=inside.init(params).rest)
        updates, after = inside.update(jax.grad(loss)(local, x, y), held)
        return updates, after.factors[1]

    sharded = jax.jit(
        jax.shard_map(
            step, mesh=mesh, in_specs=(spec(), spec(), spec("data"), spec("data")), out_specs=(spec(), spec())
        )
    )
    updates, after = sharded({"w": w}, state.factors, x, y)
    plain = rac_lora(adam, 2, 3, **options)
    expected, expected_state = plain.update(jax.grad(loss)({"w": w}, x, y), state)
    np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(after.mu["w"], expected_state.factors.mu["w"], rtol=1e-4, atol=1e-6)
    text = sharded.lower({"w": w}, state.factors, x, y).compile().as_text()
    assert collectives(text) == [("all-reduce", 64 * 2)]
