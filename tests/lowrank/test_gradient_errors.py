"""The gradient view refuses what cannot be, and says what to type instead."""

import jax
import jax.numpy as jnp
import optax
import pytest

from odjax.lowrank import Bernoulli, MatrixView, rac_lora

from .gradient_cases import KEY

W = {"w": jnp.ones((6, 4))}
ROWS = optax.GradientTransformation(
    lambda params: {"rows": jnp.zeros(3)}, lambda g, state, params=None: (g, state)
)


@pytest.mark.parametrize(
    "options,message",
    [
        ({"rank": 0}, "rank must be a whole number of at least 1, got 0"),
        ({"rank": 2.0}, "rank must be a whole number of at least 1, got 2.0"),
        ({"block_steps": 0}, "block_steps must be a whole number of at least 1, got 0"),
        ({"law": "normal"}, "law must be one of"),
        ({"side": "top"}, "side must be one of"),
        ({"scale": "rms"}, "scale must be"),
        ({"on_boundary": "clear"}, "on_boundary must be one of \\('reset', 'keep', 'rotate'\\), got 'clear'"),
        ({"on_boundary": "rotate", "side": Bernoulli(0.5)}, "'rotate' needs one side"),
        ({"cache_sketch": True, "side": Bernoulli(0.5)}, "cache_sketch=True needs one side"),
        ({"alpha": 0.0}, "alpha must be a positive number or None, got 0.0"),
        (
            {"rank": 5},
            "rank 5 is more than the smaller side of 'w' \\(6 inputs, 4 outputs\\): lower it.*clip_rank=True",
        ),
        ({"where": "v"}, "where='v' selects no leaf; the closest paths are 'w'"),
        ({"inner": optax.adamw(0.1)}, "needs params.*scale_by_\\* transform inside and put decay outside"),
        ({"inner": optax.lion(0.1)}, "needs params.*put decay outside"),
        (
            {"inner": ROWS},
            "on_boundary='reset': the inner state\\['rows'\\] of shape \\(3,\\) has the shape of no factor",
        ),
        (
            {"inner": optax.scale_by_rprop(0.1), "on_boundary": "rotate"},
            "'rotate' knows the first moments .* not the inner state.step_sizes",
        ),
        ({"dimension_numbers": {"v": MatrixView((), (0,), (1,))}}, "'v', which matches no path such as 'w'"),
        ({"law": lambda *_: jnp.ones((3, 3))}, "gave shape \\(3, 3\\) for 'w', needed \\(4, 2\\)"),
    ],
)
def test_bad_input_is_an_error_with_the_remedy(options, message):
    options = {"inner": optax.scale_by_adam(), "rank": 2, "block_steps": 3, "key": KEY, **options}

    def use():
        transform = rac_lora(**options)
        transform.update(W, transform.init(W))

    with jax.numpy_dtype_promotion("standard"), pytest.raises(ValueError, match=message):
        use()


@pytest.mark.parametrize(
    "params,options,message",
    [
        ({"w": jnp.ones((4, 4), jnp.int32)}, {"where": "w"}, "cannot adapt 'w', which is int32"),
        ({"w": jnp.ones((4, 4), jnp.complex64)}, {"where": "w"}, "cannot adapt 'w', which is complex64"),
        ({"b": jnp.ones(4)}, {"where": "b"}, "'b' of shape \\(4,\\) is no matrix: narrow where="),
        (
            {"b": jnp.ones(4)},
            {},
            "found no matrix among the parameters \\('b'\\): name the leaves with where=",
        ),
        ({"moe": jnp.ones((4, 4, 4))}, {}, "'moe' of shape .* could be several matrices"),
    ],
)
def test_leaves_that_cannot_be_adapted_are_named(params, options, message):
    with pytest.raises(ValueError, match=message):
        rac_lora(optax.sgd(0.1), 2, 3, key=KEY, **options).init(params)


def test_a_missing_or_legacy_key_and_a_non_transform_are_type_errors():
    with pytest.raises(TypeError, match="key must be a typed key; got None"):
        rac_lora(optax.sgd(0.1), 2, 3, key=None)
    with pytest.raises(TypeError, match="legacy uint32 key"):
        rac_lora(optax.sgd(0.1), 2, 3, key=jax.random.PRNGKey(0))
    with pytest.raises(TypeError, match="inner must be an optax transform"):
        rac_lora(optax.sgd, 2, 3, key=KEY)
