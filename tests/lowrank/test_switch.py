"""Adapters on or off: off is the bare model to the bit, one value an example is the two groups apart."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import combine, leaves_with_paths, partition
from odjax.lowrank import FACTORS, adapt, switched
from odjax.models import bert
from odjax.models.generate import generate

from .lowrank_models import KEY, MODELS, SMALL, TOKENS, small_decoder, trained

BERT = bert("tiny", vocab=16, max_length=8, **SMALL)
SWITCHED = {
    **{name: MODELS[name] for name in ("scanned decoder", "unrolled tied decoder", "vit", "mlp")},
    "bert": (BERT, (TOKENS, TOKENS > 2), r"layers/.*kernel"),
}


@functools.cache
def made(name, method="lora"):
    model, inputs, where = SWITCHED[name]
    model = adapt(model, rank=2, alpha=3.0, method=method, where=where, dropout=0.5)
    params = nn.unbox(jax.jit(model.init)(KEY, *inputs)["params"])
    return model, trained(params), inputs


def program(model, params, *inputs, **kwargs):
    return str(jax.make_jaxpr(lambda p, *x: model.apply({"params": p}, *x, **kwargs))(params, *inputs))


@pytest.mark.parametrize(
    "name,method",
    [("scanned decoder", "dylora"), ("unrolled tied decoder", "rac"), ("bert", "lora"), ("vit", "lora")],
)
def test_switched_off_the_program_is_that_of_the_bare_model(name, method):
    model, params, inputs = made(name, method)
    for rngs in (None, {"dropout": KEY}):
        off = program(switched(model, False), params, *inputs, rngs=rngs)
        assert off == program(model.inner, params, *inputs, rngs=rngs)
    assert off != program(model, params, *inputs)


@pytest.mark.parametrize("name", ["scanned decoder", "bert", "vit"])
def test_switched_off_every_bit_is_that_of_the_bare_model_whatever_the_factors_hold(name):
    model, params, inputs = made(name)
    free, frozen = partition(params, FACTORS)
    params = combine(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), free), frozen)
    out = jax.jit(lambda p: switched(model, False).apply({"params": p}, *inputs))(params)
    expected = jax.jit(lambda p: model.inner.apply({"params": p}, *inputs))(params)
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(
        jax.jit(lambda p: model.apply({"params": p}, *inputs, on=False))(params), expected
    )


@pytest.mark.parametrize("name", SWITCHED)
def test_one_value_an_example_is_the_two_groups_apart(name):
    model, params, inputs = made(name)
    rows = inputs[0].shape[0]
    on, off = (
        jax.jit(lambda p, on=on: model.apply({"params": p}, *inputs, on=on))(params) for on in (True, False)
    )
    assert float(jnp.abs(on - off).max()) > 1e-3
    both = jax.jit(lambda p, switch: switched(model, switch).apply({"params": p}, *inputs))
    for chosen, dtype in ((0, bool), (0, jnp.float32), (1, jnp.float32)):
        switch = jnp.arange(rows) == chosen
        expected = jnp.where(switch.reshape((-1,) + (1,) * (on.ndim - 1)), on, off)
        np.testing.assert_allclose(both(params, switch.astype(dtype)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["dora", "rac", "lora"])
def test_a_number_scales_the_update_of_its_example(method):
    x = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)
    model = adapt(nn.Dense(4), rank=2, method=method)
    params = trained(model.init(KEY, x)["params"])
    y, bare = (model.apply({"params": params}, x, on=on) for on in (True, False))
    half = model.apply({"params": params}, x, on=jnp.array([0.5, 1.0]))
    np.testing.assert_allclose(half, bare + jnp.array([[0.5], [1.0]]) * (y - bare), rtol=1e-5, atol=1e-6)


def test_an_example_that_is_off_ignores_factors_that_are_not_finite():
    model = adapt(nn.Dense(4), rank=2)
    x = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)
    params = model.init(KEY, x)["params"]
    params = {**params, "lora_b": jnp.full_like(params["lora_b"], jnp.inf)}
    y = model.apply({"params": params}, x, on=jnp.array([False, True]))
    np.testing.assert_array_equal(y[0], model.inner.apply({"params": params}, x)[0])
    assert not bool(jnp.isfinite(y[1]).any())


def test_the_gradient_of_the_factors_is_that_of_the_examples_that_are_on():
    model = adapt(small_decoder(layers=1, remat="full"), rank=2, where=".*attn/q/kernel")
    params = trained(nn.unbox(jax.jit(model.init)(KEY, TOKENS)["params"]))

    def loss(params, tokens, on):
        y = model.apply({"params": params}, tokens, on=on)
        return jnp.sum(jnp.sin(y))

    found = jax.jit(jax.grad(loss))(params, TOKENS, jnp.array([False, True]))
    expected = jax.jit(jax.grad(lambda p: loss(p, TOKENS[1:], True)))(params)
    for path, leaf in leaves_with_paths(partition(expected, FACTORS)[0]):
        mine = dict(leaves_with_paths(found))[path]
        np.testing.assert_allclose(mine, leaf, rtol=1e-4, atol=1e-6, err_msg=path)


def test_a_model_generates_with_its_adapters_off_what_the_bare_model_generates():
    model, params, _ = made("scanned decoder")

    def ask(model):
        run = jax.jit(lambda p: generate(model, p, TOKENS, steps=4, key=KEY, temperature=1.5))
        return run(params)

    expected = ask(model.inner)
    np.testing.assert_array_equal(ask(switched(model, False)), expected)
    guarded = ask(model)
    assert not np.array_equal(guarded, expected)
    mixed = ask(switched(model, jnp.array([False, True])))
    np.testing.assert_array_equal(mixed, jnp.stack([expected[0], guarded[1]]))


def test_methods_take_the_switch_too():
    model, params, _ = made("scanned decoder")
    for method in ("features", "__call__"):
        off = model.apply({"params": params}, TOKENS, method=method, on=False)
        np.testing.assert_array_equal(off, model.inner.apply({"params": params}, TOKENS, method=method))
    again = switched(model, False).apply({"params": params}, TOKENS, on=True)
    np.testing.assert_array_equal(again, model.apply({"params": params}, TOKENS))


@pytest.mark.parametrize(
    "name,on", [("scanned decoder", False), ("scanned decoder", "array"), ("bert", False)]
)
def test_the_parameters_are_the_same_however_it_is_switched(name, on):
    model, _, inputs = made(name)
    on = jnp.ones(inputs[0].shape[0], bool) if on == "array" else on
    mine, switched_off = (nn.unbox(jax.jit(m.init)(KEY, *inputs)) for m in (model, switched(model, on)))
    jax.tree.map(np.testing.assert_array_equal, mine, switched_off)


def test_over_a_mesh_the_examples_are_switched_as_on_one_device():
    model, params, _ = made("mlp")
    x = jnp.linspace(-1.0, 1.0, 48).reshape(8, 6)
    on = jnp.arange(8) % 3 == 0
    run = jax.jit(lambda p, x, on: model.apply({"params": p}, x, on=on))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    np.testing.assert_allclose(
        run(params, jax.device_put(x, rows), jax.device_put(on, rows)), run(params, x, on), rtol=1e-6
    )


def test_what_cannot_switch_is_an_error_that_names_it():
    model, params, inputs = made("mlp")
    apply = functools.partial(model.apply, {"params": params}, *inputs)
    with pytest.raises(ValueError, match=r"on has 3 examples, but .* 'dense_0/kernel' gives has the shape"):
        apply(on=jnp.ones(3, bool))
    with pytest.raises(ValueError, match=r"one value an example \[B\], got shape \(2, 1\)"):
        apply(on=jnp.ones((2, 1), bool))
    with pytest.raises(ValueError, match=r"got shape \(\)"):
        switched(model, jnp.asarray(True))
    with pytest.raises(TypeError, match=r"bool or floating point, got int32: on.astype\(bool\)"):
        switched(model, jnp.ones(2, jnp.int32))
    with pytest.raises(TypeError, match=r"True, False or an array \[B\], got 'off'"):
        switched(model, "off")
    with pytest.raises(TypeError, match="the model that odjax.lowrank.adapt returned, got Bert"):
        switched(BERT, False)
    assert switched(model, np.bool_(False)).on is False


def test_a_table_that_all_examples_share_cannot_be_switched_one_by_one():
    model = adapt(BERT, rank=2, where="positions/embedding")
    params = jax.jit(model.init)(KEY, TOKENS)["params"]
    model.apply({"params": params}, TOKENS)
    with pytest.raises(ValueError, match=r"'positions/embedding' gives has the shape \(1, 4, 16\)"):
        model.apply({"params": params}, TOKENS, on=jnp.ones(2, bool))
