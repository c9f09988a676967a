"""Merging: one rounding, nothing lost, nothing but the weights changed; adapters at the parameters."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.lowrank.adapt import adapt
from odjax.lowrank.chain import next_block
from odjax.lowrank.merge import merge, rounded, unmerge
from odjax.lowrank.parameters import parameter_adapter

KEY = jax.random.key(0)
X = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)


def one(method="lora", **settings):
    model = adapt(nn.Dense(4), rank=2, method=method, **settings)
    params = model.init(KEY, X)["params"]
    for name in ("lora_a", "lora_b"):
        if name in params:
            params[name] = params[name] + jax.random.normal(jax.random.key(1), params[name].shape)
    return model, params


def test_merging_untrained_factors_leaves_the_weights_to_the_bit():
    for method in ("lora", "rac", "asym", "cola"):
        model = adapt(nn.Dense(4), rank=2, method=method)
        params = model.init(KEY, X)["params"]
        np.testing.assert_array_equal(merge(model, params)["kernel"], params["kernel"])


def test_unmerging_gives_the_base_within_a_unit_in_the_last_place():
    model, params = one()
    again = unmerge(model, merge(model, params), params)
    size = np.maximum(np.abs(params["kernel"]), np.abs(merge(model, params)["kernel"]))
    assert np.all(np.abs(again["kernel"] - params["kernel"]) <= np.spacing(size))
    np.testing.assert_array_equal(again["lora_a"], params["lora_a"])
    with pytest.raises(ValueError, match="'dora' rescales the merged columns: keep the base"):
        unmerge(one("dora")[0], {}, {})


def test_axis_names_stay_on_the_merged_weights():
    dense = nn.Dense(4, kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("embed", "mlp")))
    model = adapt(dense, rank=2)
    merged = merge(model, model.init(KEY, X)["params"])
    assert merged["kernel"].names == ("embed", "mlp")


def test_a_thousand_tiny_merges_do_not_vanish():
    # Each merge adds 1e-4 to weights of 1: half a unit in the last place of bfloat16 is 4e-3.
    def total(dtype, stochastic):
        model = adapt(nn.Dense(16, use_bias=False, param_dtype=dtype, dtype=dtype), rank=1, method="cola")
        params = {
            "kernel": jnp.ones((16, 16), dtype),
            "lora_a": jnp.zeros((16, 1)),
            "lora_b": jnp.zeros((1, 16)),
        }

        def block(params, key):
            params = {**params, "lora_a": jnp.full((16, 1), 0.01), "lora_b": jnp.full((1, 16), 0.01)}
            return next_block(model, params, key, stochastic=stochastic), None

        params, _ = jax.jit(lambda p: jax.lax.scan(block, p, jax.random.split(KEY, 1000)))(params)
        return np.asarray(params["kernel"].astype(jnp.float32))

    np.testing.assert_allclose(total(jnp.float32, False), 1.1, rtol=1e-4)
    np.testing.assert_array_equal(total(jnp.bfloat16, False), 1.0)
    # 256 weights, each a sum of 1000 roundings of 2^-7 with chance 1e-4 2^7: deviation of the mean about 0.002.
    assert abs(total(jnp.bfloat16, True).mean() - 1.1) < 0.01


def test_stochastic_rounding_goes_to_a_neighbour_and_keeps_what_is_exact():
    x = jnp.array([1.0, -2.5, 0.0, jnp.inf, -jnp.inf, jnp.nan])
    np.testing.assert_array_equal(rounded(x, jnp.bfloat16, KEY).astype(jnp.float32), x)
    x = jax.random.normal(KEY, (4096,))
    r = rounded(x, jnp.bfloat16, jax.random.key(1)).astype(jnp.float32)
    assert np.all(np.abs(r - x) <= np.abs(x) * 2.0**-7)
    assert abs(float(jnp.mean((r - x) / jnp.abs(x)))) < 2.0**-7 * 0.05
    np.testing.assert_array_equal(rounded(x, jnp.float32, KEY), x)
    with pytest.raises(ValueError, match="stochastic rounding is to bfloat16, the weight is float16"):
        rounded(x, jnp.float16, KEY)


def test_what_cannot_be_merged_is_refused():
    model, params = one()
    with pytest.raises(ValueError, match="nothing in params is adapted"):
        merge(model, {"kernel": params["kernel"]})
    with pytest.raises(ValueError, match="rank= serves a part of the ranks of 'dylora'"):
        merge(model, params, rank=1)
    with pytest.raises(ValueError, match="rank must be 1 to 2 for 'kernel', got 3"):
        merge(one("dylora")[0], params, rank=3)
    with pytest.raises(ValueError, match="no kernel or embedding beside them"):
        merge(model, {"x": {"lora_a": params["lora_a"], "lora_b": params["lora_b"]}})
    with pytest.raises(TypeError, match=r"expected the model that odjax.lowrank.adapt returned, got Dense"):
        merge(nn.Dense(4), params)


PARAMS = {
    "layers": {"w": {"kernel": jnp.arange(48.0).reshape(2, 6, 4) / 48}, "scale": jnp.ones((2, 6))},
    "attn": {"q": {"kernel": jnp.ones((6, 2, 3))}},
}


@pytest.mark.parametrize("method", ["lora", "rac", "dora", "rslora", "cola"])
def test_materialize_gives_the_base_at_the_start_and_advance_keeps_the_function(method):
    adapter = parameter_adapter(method, rank=2, alpha=3.0)
    free, frozen = adapter.init(KEY, PARAMS)
    assert sorted(free) == ["attn/q/kernel", "layers/w/kernel"]
    start = adapter.materialize(free, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), start, PARAMS)
    np.testing.assert_array_equal(start["layers"]["scale"], PARAMS["layers"]["scale"])
    if method not in ("rac", "cola"):
        with pytest.raises(ValueError, match=f"'{method}' is no chain: advance is for rac, cola, relora"):
            adapter.advance(KEY, free, frozen)
        return
    free = jax.tree.map(lambda leaf: leaf + 0.1, free)
    before = adapter.materialize(free, frozen)
    assert np.abs(before["layers"]["w"]["kernel"] - PARAMS["layers"]["w"]["kernel"]).max() > 1e-2
    free, frozen = adapter.advance(KEY, free, frozen)
    after = adapter.materialize(free, frozen)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), before, after)


def test_preconditioning_changes_the_gradient_of_the_parameters_and_not_their_values():
    settings = {
        "rank": 2,
        "where": "w",
        "side": "right",
        "law": "gaussian",
        "alpha": 3.0,
        "dtype": np.float64,
    }
    with jax.enable_x64(True):
        params = {"w": jax.random.normal(KEY, (6, 4), jnp.float64)}
        plain, other = (parameter_adapter("rac", precondition=p, **settings) for p in (False, True))
        free, frozen = plain.init(KEY, params)
        free = jax.tree.map(lambda z: z + 0.1, free)

        def weight(adapter):
            return lambda z: adapter.materialize({"w": {"lora_b": z}}, frozen)["w"]

        z = free["w"]["lora_b"]
        np.testing.assert_array_equal(weight(plain)(z), weight(other)(z))
        usual, preconditioned = (
            jax.grad(lambda z, a=a: jnp.sum(jnp.sin(weight(a)(z))))(z) for a in (plain, other)
        )
        q = jax.jacobian(weight(plain))(z)[:, 0, :, 0]  # s Q
        np.testing.assert_allclose(q.T @ q @ preconditioned, usual, rtol=1e-9)


def test_merging_the_mean_of_clients_factors_is_the_mean_of_their_merged_weights():
    adapter = parameter_adapter("rac", rank=2, where="w", side="left", dtype=np.float64)
    with jax.enable_x64(True):
        params = {"w": jax.random.normal(KEY, (6, 4), jnp.float64)}
        zero, frozen = adapter.init(KEY, params)
        clients = [
            jax.tree.map(lambda z, i=i: z + jax.random.normal(jax.random.key(i), z.shape, z.dtype), zero)
            for i in (1, 2, 3)
        ]
        mean = jax.tree.map(lambda *z: sum(z) / 3, *clients)
        merged = adapter.advance(KEY, mean, frozen)[1].params["w"]
        each = [adapter.advance(KEY, z, frozen)[1].params["w"] for z in clients]
        np.testing.assert_allclose(merged, sum(each) / 3, rtol=1e-12)


def test_adapters_at_the_parameters_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match=r"'pissa' needs the module route: use odjax.lowrank.adapt"):
        parameter_adapter("pissa")
    with pytest.raises(
        ValueError, match="dropout= is for the module route, odjax.lowrank.adapt: here there is"
    ):
        parameter_adapter(dropout=0.1)
    with pytest.raises(ValueError, match="cache_sketch= is for the module route"):
        parameter_adapter("rac", cache_sketch=True)
    with pytest.raises(ValueError, match="selects no leaf"):
        parameter_adapter(where="nothing").init(KEY, PARAMS)
    with pytest.raises(TypeError, match="key must be a typed key"):
        parameter_adapter().init(0, PARAMS)
    adapter = parameter_adapter(rank=2)
    free, frozen = adapter.init(KEY, PARAMS)
    with pytest.raises(ValueError, match=r"they differ at \['attn/q/kernel'\]"):
        adapter.materialize({"layers/w/kernel": free["layers/w/kernel"]}, frozen)
