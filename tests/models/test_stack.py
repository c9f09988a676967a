"""Stacking, scanning and rematerialization."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.models import REMAT_POLICIES, Decoder, encoder_decoder, stack_layers, unstack_layers, vit

SIZES = {"vocab": 11, "layers": 3, "width": 8, "heads": 2, "kv_heads": 1, "mlp_width": 12, "max_length": 16}


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(5), (2, 6), 0, 11)


@pytest.fixture(scope="module")
def params(tokens):
    return nn.unbox(jax.jit(Decoder(**SIZES).init)(jax.random.key(0), tokens))["params"]


def value_and_grad(model, params, tokens):
    def loss(params):
        return jnp.mean(jnp.square(model.apply({"params": params}, tokens)))

    return jax.jit(jax.value_and_grad(loss))(params)


@given(st.integers(1, 5), st.integers(1, 3))
def test_stacking_inverts_unstacking(layers, width):
    tree = {"layers": {"a": {"w": jnp.arange(layers * width).reshape(layers, width)}}, "norm": jnp.ones(2)}
    assert len(unstack_layers(tree)) == layers + 1
    jax.tree.map(np.testing.assert_array_equal, stack_layers(unstack_layers(tree)), tree)


def test_more_than_ten_layers_are_stacked_in_numerical_order():
    tree = {f"layers_{i}": {"w": jnp.asarray(i)} for i in range(12)}
    assert stack_layers(tree)["layers"]["w"].tolist() == list(range(12))


def test_stacking_refuses_a_gap():
    with pytest.raises(ValueError, match=r"numbered 0\.\.1, got \[0, 2\]"):
        stack_layers({"layers_0": {"w": jnp.ones(1)}, "layers_2": {"w": jnp.ones(1)}})


def test_scanned_and_unrolled_decoders_are_the_same_function(params, tokens):
    scanned, grads = value_and_grad(Decoder(**SIZES), params, tokens)
    unrolled, unrolled_grads = value_and_grad(Decoder(**SIZES, scan=False), unstack_layers(params), tokens)
    np.testing.assert_allclose(scanned, unrolled, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
        grads,
        stack_layers(unrolled_grads),
    )


def test_an_unrolled_model_has_the_tree_that_unstacking_gives(tokens):
    for model, inputs in (
        (Decoder(**SIZES), (tokens,)),
        (vit("tiny-digits", classes=10), (jnp.zeros((1, 8, 8, 1)),)),
        (encoder_decoder("tiny", vocab=7), (tokens, tokens)),
    ):
        scanned = jax.eval_shape(model.init, jax.random.key(0), *inputs)
        unrolled = jax.eval_shape(model.clone(scan=False).init, jax.random.key(0), *inputs)
        expected = jax.eval_shape(unstack_layers, nn.unbox(scanned)["params"])
        assert nn.unbox(unrolled)["params"] == expected


def test_scanned_and_unrolled_layers_start_differently_from_one_another(params):
    kernel = params["layers"]["attn"]["q"]["kernel"]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("remat", [name for name in REMAT_POLICIES if name not in ("none", "offload")])
def test_rematerialization_changes_no_gradient(params, tokens, remat, scan):
    params = params if scan else unstack_layers(params)
    plain = value_and_grad(Decoder(**SIZES, scan=scan), params, tokens)
    again = value_and_grad(Decoder(**SIZES, scan=scan, remat=remat), params, tokens)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), plain, again)


def test_full_rematerialization_keeps_one_activation_a_layer(params, tokens):
    def residuals(remat):
        model = Decoder(**SIZES, remat=remat)
        _, pullback = jax.vjp(lambda p: model.apply({"params": p}, tokens), params)
        return sum(leaf.size for leaf in jax.tree.leaves(pullback))

    assert residuals("full") < residuals("dots") < residuals("none")


def test_no_product_of_a_projection_runs_twice_where_they_are_kept(params, tokens):
    def products(remat):
        model = Decoder(**SIZES, remat=remat)
        return str(
            jax.make_jaxpr(jax.grad(lambda p: model.apply({"params": p}, tokens).sum()))(params)
        ).count("dot_general[")

    # Attention's own two do: queries with keys, and weights with values.
    assert products("projections") == products("none") + 2
    assert products("full") > products("projections") + 5


def test_offload_moves_what_it_keeps_to_the_host():
    model = Decoder(**SIZES, remat="offload")
    tokens = jnp.zeros((2, 6), jnp.int32)
    variables = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))
    jaxpr = jax.make_jaxpr(jax.grad(lambda v: model.apply(v, tokens).sum()))(variables)
    assert "pinned_host" in str(jaxpr) or "<host>" in str(jaxpr)


@pytest.mark.parametrize(
    "make",
    [
        lambda remat: Decoder(**SIZES, remat=remat),
        lambda remat: vit("tiny-digits", remat=remat),
        lambda remat: encoder_decoder("tiny", vocab=7, remat=remat),
    ],
    ids=["decoder", "vit", "encoder_decoder"],
)
def test_an_unknown_policy_names_the_known_ones(make):
    with pytest.raises(
        ValueError, match="none, dots, dots_no_batch, offload, projections, attention, full, got 'some'"
    ):
        make("some")


def test_variables_that_an_interceptor_adds_are_stacked_with_the_layers(tokens):
    def add_a_variable(next_fun, args, kwargs, context):
        y = next_fun(*args, **kwargs)
        if isinstance(context.module, nn.DenseGeneral) and context.method_name == "__call__":
            gain = context.module.param("gain", nn.initializers.zeros, ())
            y = y * (1 + gain)
        return y

    model = Decoder(**SIZES, remat="full")
    with nn.intercept_methods(add_a_variable):
        variables = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens))
        grads = jax.grad(lambda v: jnp.mean(model.apply(v, tokens) ** 2))(variables)
    assert grads["params"]["layers"]["attn"]["q"]["gain"].shape == (3,)
    assert np.all(np.asarray(grads["params"]["layers"]["attn"]["v"]["gain"]) != 0)
