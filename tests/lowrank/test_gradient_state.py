"""The state of the gradient view: its sizes and dtypes, and what happens to it at a boundary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from odjax.lowrank import rac_lora, sketch

from .gradient_cases import INNERS, KEY, lenient, run, traced

W = {"w": jnp.ones((6, 4))}
ROWS = optax.GradientTransformation(
    lambda params: {"rows": jnp.zeros(3)}, lambda g, state, params=None: (g, state)
)


def test_rotation_moves_first_moments_by_r_and_second_moments_by_its_square():
    params = {"w": jnp.ones((6, 4)), "v": jnp.ones((4, 6))}
    g = jax.tree.map(lambda p: jnp.arange(p.size, dtype=jnp.float32).reshape(p.shape) / 10, params)
    inner = lenient(optax.scale_by_adam(b1=0.9, b2=0.99))
    transform = rac_lora(inner, 2, 1, key=KEY, on_boundary="rotate", scale="orthonormal")
    _, state = transform.update(g, transform.init(params))
    _, after = transform.update(jax.tree.map(jnp.zeros_like, g), state)
    old, new = (np.asarray(sketch(KEY, t, "w", 4, 2, scale="orthonormal")) for t in (0, 1))
    r = new.T @ old
    np.testing.assert_allclose(after.factors.mu["w"], 0.9 * state.factors.mu["w"] @ r.T, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(after.factors.nu["w"], 0.99 * state.factors.nu["w"] @ (r * r).T, rtol=1e-5)
    old, new = (np.asarray(sketch(KEY, t, "v", 4, 2, scale="orthonormal")) for t in (0, 1))
    r = new.T @ old
    np.testing.assert_allclose(after.factors.mu["v"], 0.9 * r @ state.factors.mu["v"], rtol=1e-5, atol=1e-6)
    assert int(after.factors.count) == 2


def test_reset_clears_moments_and_their_count_and_lets_schedules_go_on():
    params, g = {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}, {"w": jnp.ones((6, 4)), "b": jnp.ones(4)}
    inner = lenient(optax.chain(optax.scale_by_adam(), optax.scale_by_schedule(lambda t: -0.1)))
    counts = {}
    for mode in ("reset", "keep"):
        transform = rac_lora(inner, 2, 3, key=KEY, on_boundary=mode)
        state = transform.init(params)
        update, traces = traced(transform.update)
        for _ in range(4):
            _, state = update(g, state)
        counts[mode] = (int(state.factors[0].count), int(state.factors[1].count), int(state.rest[0].count))
        assert len(traces) == 1
    assert counts == {"reset": (1, 4, 4), "keep": (4, 4, 4)}


def test_leaves_that_are_not_adapted_get_exactly_the_inner_transform():
    params = {"w": jnp.ones((6, 4)), "b": jnp.linspace(0.0, 1.0, 4), "e": jnp.ones((3, 3))}
    f = lambda p: jnp.sum(jnp.sin(p["w"])) + jnp.sum(p["b"] ** 2) + jnp.sum(p["e"] ** 3)  # noqa: E731
    inner = lenient(INNERS["adam"]())
    got = run(rac_lora(inner, 2, 3, key=KEY, where="w"), f, params, 8)
    alone = run(inner, f, params, 8)
    np.testing.assert_array_equal(got["b"], alone["b"])
    np.testing.assert_array_equal(got["e"], alone["e"])


@pytest.mark.parametrize(
    "side,numbers", [("left", 2 * (3 * 8)), ("right", 2 * (3 * 4)), ("auto", 2 * (3 * 8))]
)
def test_a_moment_of_an_adapted_leaf_has_rank_times_the_other_side(side, numbers):
    transform = rac_lora(optax.scale_by_adam(), 3, 5, key=KEY, side=side)
    state = jax.eval_shape(
        transform.init, {"layers": {"kernel": jax.ShapeDtypeStruct((2, 8, 4), jnp.bfloat16)}}
    )
    assert state.factors.mu["layers/kernel"].size == state.factors.nu["layers/kernel"].size == numbers
    assert state.factors.mu["layers/kernel"].dtype == jnp.float32
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == 2 * numbers + 2 + 1 + 1 + 1


def test_attention_kernels_keep_the_axis_that_is_not_sketched():
    shapes = {"attn": {"q": {"kernel": jnp.zeros((8, 2, 3))}, "o": {"kernel": jnp.zeros((2, 3, 8))}}}
    state = rac_lora(optax.trace(0.9), 2, 5, key=KEY, side="right").init(shapes)
    assert state.factors.trace["attn/q/kernel"].shape == (2, 2, 3)
    state = rac_lora(optax.trace(0.9), 2, 5, key=KEY, side="left").init(shapes)
    assert state.factors.trace["attn/o/kernel"].shape == (2, 3, 2)


def test_bf16_parameters_have_float32_factors_and_bf16_updates():
    params = {"w": jnp.ones((8, 4), jnp.bfloat16)}
    transform = rac_lora(lenient(optax.scale_by_adam()), 2, 2, key=KEY)
    updates, state = jax.jit(transform.update)(params, transform.init(params))
    assert updates["w"].dtype == jnp.bfloat16
    assert state.factors.nu["w"].dtype == jnp.float32
    single = rac_lora(lenient(optax.scale_by_adam()), 2, 2, key=KEY)
    exact, _ = single.update({"w": jnp.ones((8, 4))}, single.init({"w": jnp.ones((8, 4))}))
    np.testing.assert_array_equal(updates["w"], exact["w"].astype(jnp.bfloat16))


def test_stacked_layers_have_sketches_of_their_own():
    w = jnp.broadcast_to(jnp.arange(32.0).reshape(1, 8, 4), (3, 8, 4))
    tx = rac_lora(optax.sgd(1.0), 2, 2, key=KEY)
    params = {"layers": {"kernel": w}}
    updates, _ = tx.update(params, tx.init(params))
    u = np.asarray(updates["layers"]["kernel"])
    assert not np.allclose(u[0], u[1])
    q = sketch(KEY, 0, "layers/kernel", 4, 2, batch=(3,))
    np.testing.assert_allclose(u, -w @ q @ jnp.swapaxes(q, 1, 2), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode,branches", [("reset", 0), ("keep", 0), ("rotate", 1)])
def test_the_boundary_branches_over_factor_sized_state_only(mode, branches):
    transform = rac_lora(lenient(optax.scale_by_adam()), 2, 5, key=KEY, on_boundary=mode)
    params = {"w": jnp.ones((64, 32))}
    jaxpr = jax.make_jaxpr(transform.update)(params, transform.init(params))
    conds = [e for e in jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conds) == branches
    assert all(v.aval.size <= 64 * 2 for e in conds for v in (*e.invars, *e.outvars))
    full = [e for e in jaxpr.eqns if any(v.aval.size >= 64 * 32 for v in e.outvars)]
    assert not [e for e in full if e.primitive.name == "select_n"]


def test_donating_the_state_leaves_the_callers_key_alone():
    key = jax.random.key(5)
    tx = rac_lora(optax.trace(0.9), 2, 3, key=key)
    update = jax.jit(tx.update, donate_argnums=1)
    first, _ = update(W, tx.init(W))
    again, _ = update(W, tx.init(W))
    np.testing.assert_array_equal(first["w"], again["w"])
    assert not jax.random.key_data(key).is_deleted()


def test_clip_rank_lowers_the_rank_of_a_small_leaf_only():
    params = {"a": jnp.ones((6, 4)), "b": jnp.ones((6, 2))}
    state = rac_lora(optax.trace(0.9), 3, 3, key=KEY, clip_rank=True).init(params)
    assert (state.factors.trace["a"].shape, state.factors.trace["b"].shape) == ((6, 3), (6, 2))


def test_an_inner_transform_that_cannot_be_reset_works_with_keep():
    tx = rac_lora(ROWS, 2, 3, key=KEY, on_boundary="keep")
    updates, _ = tx.update(W, tx.init(W), W)
    assert updates["w"].shape == (6, 4)


@pytest.mark.parametrize("law,numbers", [("orthonormal", 2 * 4 * 2), ("coordinate", 2 * 2)])
def test_a_cached_sketch_is_drawn_once_a_block_and_changes_no_number(law, numbers):
    params = {"layers": {"kernel": jnp.arange(48.0).reshape(2, 6, 4) / 48}}
    options = {"key": KEY, "law": law, "on_boundary": "rotate"}
    adam = lenient(optax.scale_by_adam())
    drawn, cached = (rac_lora(adam, 2, 3, cache_sketch=c, **options) for c in (False, True))
    states = [drawn.init(params), cached.init(params)]
    assert states[0].sketches == ()
    assert states[1].sketches["layers/kernel"].size == numbers
    update, traces = traced(cached.update)
    steps, kept = [jax.jit(drawn.update), update], []
    for i in range(7):
        g = jax.tree.map(lambda p, i=i: p + jax.random.normal(jax.random.key(i), p.shape), params)
        (a, states[0]), (b, states[1]) = (step(g, state) for step, state in zip(steps, states, strict=True))
        np.testing.assert_array_equal(a["layers"]["kernel"], b["layers"]["kernel"])
        kept.append(np.asarray(states[1].sketches["layers/kernel"]))
    assert len(traces) == 1
    for i in range(1, 7):
        assert np.array_equal(kept[i], kept[i - 1]) == (i % 3 != 0)


def outside_of_branches(jaxpr):
    """The names of the primitives that run whatever the branches do."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        if eqn.primitive.name != "cond":
            for value in eqn.params.values():
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    yield from outside_of_branches(inner)


def test_a_cached_sketch_is_drawn_in_a_branch_alone():
    def names(cached):
        tx = rac_lora(lenient(optax.scale_by_adam()), 2, 3, key=KEY, cache_sketch=cached)
        return list(outside_of_branches(jax.make_jaxpr(tx.update)(W, tx.init(W)).jaxpr))

    assert names(True).count("cholesky") == 0
    assert names(True).count("cond") == 1
    assert names(False).count("cholesky") > 0
    assert names(False).count("cond") == 0
