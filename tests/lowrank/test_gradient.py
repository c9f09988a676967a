"""The gradient view beside the factor view, written out plainly here; composition, memory, sharding, errors."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.core.paths import leaves_with_paths
from odjax.lowrank import Bernoulli, MatrixView, average_over, lift, project, rac_lora, sketch
from odjax.lowrank.sketches import LAWS, fixed_side

KEY = jax.random.key(0)
INNERS = {
    "sgd": lambda: optax.sgd(0.05),
    "momentum": lambda: optax.chain(optax.trace(0.9), optax.scale(-0.03)),
    "adam": lambda: optax.chain(optax.scale_by_adam(), optax.scale(-0.02)),
    "lion": lambda: optax.chain(optax.scale_by_lion(), optax.scale(-0.01)),
    "rms": lambda: optax.chain(optax.clip(0.5), optax.scale_by_rms(), optax.scale(-0.02)),
}


def lenient(inner):
    """optax promotes int32 counts to floats."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def quadratic(shape, seed=0, dtype=jnp.float64):
    """f(W) = |C * (W - W*)|^2 / 2 + sum cos W, its start, with entries of C in [0.5, 2]."""
    rng = np.random.default_rng(seed)
    c, best, start = (
        jnp.asarray(a, dtype) for a in (rng.uniform(0.5, 2, shape), *rng.normal(size=(2, *shape)))
    )
    return lambda w: jnp.sum((c * (w - best)) ** 2) / 2 + jnp.sum(jnp.cos(w)), start


def run(transform, f, params, steps):
    """The parameters after every update."""

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jax.grad(f)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    return jax.jit(lambda p: jax.lax.scan(step, (p, transform.init(p)), None, length=steps)[1])(params)


def factor_view(inner, f, w, blocks, k, draw, s, side):
    """Algorithm 1 of the paper: train Z from zero for k steps on f(W + s lift(Q, Z)), merge, draw again."""
    inner = lenient(inner)

    def block(w, t):
        q = draw(t)

        def step(carry, _):
            z, state = carry
            g = jax.grad(lambda z: f(w + s * lift(q, z, side)))(z)
            u, state = inner.update(g, state)
            z = z + u
            return (z, state), w + s * lift(q, z, side)

        z = jnp.zeros_like(project(q, w, side))
        _, path = jax.lax.scan(step, (z, inner.init(z)), None, length=k)
        return path[-1], path

    return jax.jit(lambda w: jax.lax.scan(block, w, jnp.arange(blocks))[1].reshape(-1, *w.shape))(w)


@settings(max_examples=10)
@given(
    inputs=st.integers(2, 7),
    outputs=st.integers(2, 7),
    rank=st.integers(1, 3),
    side=st.sampled_from(["left", "right", "auto"]),
    law=st.sampled_from(LAWS),
    inner=st.sampled_from(sorted(INNERS)),
    scale=st.sampled_from(["unit_rms", "orthonormal", 0.3]),
    alpha=st.sampled_from([None, 1.0, 3.0]),
    layers=st.sampled_from([(), (2,)]),
)
def test_identity_1_the_gradient_view_walks_through_the_weights_of_the_factor_view(
    inputs, outputs, rank, side, law, inner, scale, alpha, layers
):
    rank = min(rank, inputs, outputs)
    with jax.enable_x64(True):
        path = "layers/kernel" if layers else "kernel"
        shape = (*layers, inputs, outputs)
        f, w = quadratic(shape)
        at = fixed_side(side, inputs, outputs)
        dim = outputs if at == "left" else inputs
        expected = factor_view(
            *(INNERS[inner](), f, w, 3, 4),
            lambda t: sketch(KEY, t, path, dim, rank, law, jnp.float64, batch=layers, scale=scale),
            *(1.0 if alpha is None else alpha / rank, at),
        )
        transform = rac_lora(
            *(lenient(INNERS[inner]()), rank, 4), key=KEY, side=side, law=law, scale=scale, alpha=alpha
        )
        tree = {"layers": {"kernel": w}} if layers else {"kernel": w}
        got = run(transform, lambda p: f(jax.tree.leaves(p)[0]), tree, 12)
        np.testing.assert_allclose(jax.tree.leaves(got)[0], expected, rtol=1e-12, atol=1e-12)


def test_identity_2_adam_without_s_below_equals_adam_with_eps_over_s():
    with jax.enable_x64(True):
        f, w = quadratic((5, 4))
        s, eps = 4.0, 1e-2
        with_s = rac_lora(
            lenient(optax.chain(optax.scale_by_adam(eps=eps), optax.scale(-0.02))), 2, 4, key=KEY, alpha=8.0
        )
        # The same step with s kept in the lift alone: the factor's gradient is divided by s first.
        without = rac_lora(
            lenient(optax.chain(optax.scale(1 / s), optax.scale_by_adam(eps=eps / s), optax.scale(-0.02))),
            *(2, 4),
            key=KEY,
            alpha=8.0,
        )
        a, b = (run(t, lambda p: f(p["w"]), {"w": w}, 12)["w"] for t in (with_s, without))
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
        other = rac_lora(
            lenient(optax.chain(optax.scale(1 / s), optax.scale_by_adam(eps=eps), optax.scale(-0.02))),
            *(2, 4),
            key=KEY,
            alpha=8.0,
        )
        assert np.abs(run(other, lambda p: f(p["w"]), {"w": w}, 12)["w"] - a).max() > 1e-6


@pytest.mark.parametrize("law", ["orthonormal", "gaussian", "rademacher", "coordinate", "cyclic"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_identity_3_preconditioned_sgd_is_projected_gradient_descent(law, side):
    with jax.enable_x64(True):
        f, w = quadratic((5, 4))
        gamma, s = 0.1, 1.5
        transform = rac_lora(
            *(optax.sgd(gamma / s**2), 2, 1), key=KEY, side=side, law=law, alpha=3.0, precondition=True
        )
        got = run(transform, lambda p: f(p["w"]), {"w": w}, 5)["w"]
        grad = jax.jit(jax.grad(f))
        for t in range(5):
            q = np.asarray(sketch(KEY, t, "w", 4 if side == "left" else 5, 2, law, jnp.float64))
            h, g = q @ np.linalg.pinv(q), np.asarray(grad(w))
            w = w - gamma * (g @ h if side == "left" else h @ g)
            np.testing.assert_allclose(got[t], w, rtol=1e-12, atol=1e-12)


def test_identity_3_an_orthonormal_sketch_needs_no_preconditioner_and_a_gaussian_one_does():
    with jax.enable_x64(True):
        f, w = quadratic((5, 4))

        def pair(law, scale):
            options = {"key": KEY, "law": law, "scale": scale, "alpha": 3.0}
            return (
                run(
                    rac_lora(optax.sgd(0.04), 2, 2, precondition=p, **options),
                    lambda p: f(p["w"]),
                    {"w": w},
                    6,
                )["w"]
                for p in (False, True)
            )

        plain, preconditioned = pair("orthonormal", "orthonormal")
        np.testing.assert_allclose(plain, preconditioned, rtol=1e-12, atol=1e-12)
        plain, preconditioned = pair("gaussian", "orthonormal")
        assert np.abs(plain - preconditioned).max() > 1e-3


def test_identity_4_decay_on_the_factor_pulls_to_the_start_of_the_block_and_outside_to_zero():
    with jax.enable_x64(True):
        _, w = quadratic((5, 4))
        flat = lambda p: 0.0 * jnp.sum(p["w"])  # noqa: E731
        outside = optax.chain(
            rac_lora(optax.sgd(1.0), 2, 4, key=KEY), optax.add_decayed_weights(-0.1)
        )  # without a gradient only the decay moves the weights
        got = run(outside, flat, {"w": w}, 3)["w"]
        np.testing.assert_allclose(got[-1], 0.9**3 * w, rtol=1e-12)
        decayed = optax.chain(optax.add_decayed_weights(0.1), optax.sgd(0.5))
        z = jnp.zeros((5, 2))
        q = sketch(KEY, 0, "w", 4, 2, dtype=jnp.float64)
        update, _ = decayed.update(jnp.zeros_like(z), decayed.init(z), z)
        np.testing.assert_array_equal(w + lift(q, z + update, "left"), w)


@pytest.mark.parametrize("law,rotating", [("orthonormal", False), ("gaussian", True)])
def test_identity_5_one_block_is_lora_fa_and_galore_and_flora_are_other_sketches(law, rotating):
    with jax.enable_x64(True):
        f, w = quadratic((6, 4))
        if not rotating:  # GaLore's sketch: the leading right singular vectors of the first gradient
            g = jax.grad(f)(w)
            basis = jnp.linalg.svd(g)[2][:2].T
            transform = rac_lora(
                *(lenient(INNERS["adam"]()), 2, 6),
                key=KEY,
                law=lambda key, dim, rank, dtype: basis * 2.0,
                scale="orthonormal",
            )
            expected = factor_view(INNERS["adam"](), f, w, 1, 6, lambda t: basis, 1.0, "left")
            np.testing.assert_allclose(
                run(transform, lambda p: f(p["w"]), {"w": w}, 6)["w"], expected, rtol=1e-12, atol=1e-12
            )
            return
        # FLORA's momentum: M in the coordinates of the new projection, M <- M Q_old^T Q_new / dim.
        beta, rate = 0.9, 0.02
        transform = rac_lora(
            *(optax.chain(optax.trace(beta), optax.scale(-rate)), 2, 2),
            key=KEY,
            law=law,
            on_boundary="rotate",
        )
        got = run(transform, lambda p: f(p["w"]), {"w": w}, 6)["w"]
        m, grad = jnp.zeros((6, 2)), jax.jit(jax.grad(f))
        for t in range(6):
            q = sketch(KEY, t // 2, "w", 4, 2, law, jnp.float64)
            if t and t % 2 == 0:
                m = m @ sketch(KEY, t // 2 - 1, "w", 4, 2, law, jnp.float64).T @ q / 4
            m = beta * m + grad(w) @ q
            w = w - rate * m @ q.T
            np.testing.assert_allclose(got[t], w, rtol=1e-12, atol=1e-12)


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
        update = jax.jit(transform.update)
        for _ in range(4):
            _, state = update(g, state)
        counts[mode] = (int(state.factors[0].count), int(state.factors[1].count), int(state.rest[0].count))
        assert update._cache_size() == 1
    assert counts == {"reset": (1, 4, 4), "keep": (4, 4, 4)}


def test_leaves_that_are_not_adapted_get_exactly_the_inner_transform():
    params = {"w": jnp.ones((6, 4)), "b": jnp.linspace(0.0, 1.0, 4), "e": jnp.ones((3, 3))}
    f = lambda p: jnp.sum(jnp.sin(p["w"])) + jnp.sum(p["b"] ** 2) + jnp.sum(p["e"] ** 3)  # noqa: E731
    inner = lenient(INNERS["adam"]())
    got = run(rac_lora(inner, 2, 3, key=KEY, where="w"), f, params, 8)
    alone = run(inner, f, params, 8)
    np.testing.assert_array_equal(got["b"], alone["b"])
    np.testing.assert_array_equal(got["e"], alone["e"])


def test_updates_of_a_block_lie_in_the_sketched_space_and_have_its_rank():
    with jax.enable_x64(True):
        f, w = quadratic((7, 6))
        path = np.asarray(
            run(rac_lora(lenient(INNERS["adam"]()), 2, 5, key=KEY), lambda p: f(p["w"]), {"w": w}, 10)["w"]
        )
        starts = [np.asarray(w), path[4], path[9]]
        for t in range(2):
            moved = starts[t + 1] - starts[t]
            q = np.asarray(sketch(KEY, t, "w", 6, 2, dtype=jnp.float64))
            assert np.linalg.matrix_rank(moved, tol=1e-9) == 2
            np.testing.assert_allclose(moved - moved @ q @ np.linalg.pinv(q), 0, atol=1e-12)
        assert np.linalg.matrix_rank(starts[2] - starts[0], tol=1e-9) == 4


def test_full_rank_orthonormal_sgd_is_sgd():
    with jax.enable_x64(True):
        f, w = quadratic((5, 4))
        options = {"key": KEY, "side": "left", "scale": "orthonormal"}
        got = run(rac_lora(optax.sgd(0.1), 4, 2, **options), lambda p: f(p["w"]), {"w": w}, 6)["w"]
        np.testing.assert_allclose(got, run(optax.sgd(0.1), f, w, 6), rtol=1e-12, atol=1e-12)


def test_bernoulli_ends_are_the_fixed_sides_and_the_middle_takes_both():
    with jax.enable_x64(True):
        f, w = quadratic((5, 4))
        walk = lambda side: run(  # noqa: E731
            rac_lora(lenient(INNERS["adam"]()), 2, 3, key=KEY, side=side), lambda p: f(p["w"]), {"w": w}, 24
        )["w"]
        np.testing.assert_allclose(walk(Bernoulli(1.0)), walk("left"), rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(walk(Bernoulli(0.0)), walk("right"), rtol=1e-12, atol=1e-12)
        path = np.concatenate([np.asarray(w)[None], np.asarray(walk(Bernoulli(0.5)))])
        lefts = 0
        for t in range(8):
            moved = path[3 * t + 3] - path[3 * t]
            inside = []
            for side, dim in (("left", 4), ("right", 5)):
                q = np.asarray(sketch(KEY, t, "w", dim, 2, dtype=jnp.float64))
                h = q @ np.linalg.pinv(q)
                inside.append(np.allclose(moved, moved @ h if side == "left" else h @ moved, atol=1e-12))
            assert sum(inside) == 1
            lefts += inside[0]
        assert 0 < lefts < 8


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


PARAMS = {"body": {"kernel": jnp.arange(32.0).reshape(8, 4) / 10, "bias": jnp.ones(4)}}


@pytest.mark.parametrize(
    "name", ["chain", "multi_transform", "multi_steps", "apply_if_finite", "inject", "inside"]
)
def test_it_composes_with_the_wrappers_of_optax(name):
    tx = rac_lora(lenient(optax.scale_by_adam()), 2, 2, key=KEY)
    made = {
        "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), tx, optax.add_decayed_weights(0.1)),
        "multi_transform": lambda: optax.multi_transform(
            {"a": tx, "b": optax.sgd(0.1)}, {"body": {"kernel": "a", "bias": "b"}}
        ),
        "multi_steps": lambda: optax.MultiSteps(tx, 2).gradient_transformation(),
        "apply_if_finite": lambda: optax.apply_if_finite(tx, 3),
        "inject": lambda: optax.inject_hyperparams(lambda rate: optax.chain(tx, optax.scale(rate)))(0.5),
        "inside": lambda: rac_lora(
            lenient(optax.inject_hyperparams(optax.sgd)(0.5, momentum=0.9)), 2, 2, key=KEY
        ),
    }[name]()
    made = lenient(made)
    params, state = PARAMS, made.init(PARAMS)
    shapes = jax.tree.map(jnp.shape, state)
    update = jax.jit(made.update)
    for _ in range(5):
        updates, state = update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    assert update._cache_size() == 1
    assert jax.tree.map(jnp.shape, state) == shapes
    assert float(jnp.abs(params["body"]["kernel"] - PARAMS["body"]["kernel"]).max()) > 0
    assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(params))


def test_multi_steps_counts_real_updates():
    tx = optax.MultiSteps(rac_lora(optax.sgd(0.1), 2, 2, key=KEY), 3).gradient_transformation()
    state, update = tx.init(PARAMS), jax.jit(lenient(tx).update)
    for _ in range(6):
        _, state = update(PARAMS, state, PARAMS)
    assert int(state.inner_opt_state.count) == 2


def test_optax_maps_over_the_factors_of_the_state():
    tx = rac_lora(optax.scale_by_adam(), 2, 2, key=KEY)
    state = optax.tree.map_params(tx, lambda leaf: leaf + 1, tx.init(PARAMS))
    assert float(state.factors.mu["body/kernel"].min()) == float(state.rest.nu["body"]["bias"].min()) == 1
    assert int(state.count) == int(state.factors.count) == 0


def test_boxed_parameters_and_nnx_states_give_the_numbers_of_a_dict():
    tx = rac_lora(lenient(optax.adam(0.1)), 2, 2, key=KEY)
    plain = PARAMS["body"]
    boxed = {k: nn.Partitioned(v, ("x",) * v.ndim) for k, v in plain.items()}
    layer = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    state = nnx.state(layer)
    state["kernel"].set_value(plain["kernel"])
    state["bias"].set_value(plain["bias"])
    results = []
    for tree in (plain, boxed, state):
        opt = tx.init(tree)
        for _ in range(3):
            updates, opt = tx.update(tree, opt, tree)
            tree = optax.apply_updates(tree, updates)
        results.append(dict(leaves_with_paths(tree)))
    for other in results[1:]:
        assert set(other) == set(results[0])
        for path, leaf in other.items():
            np.testing.assert_array_equal(leaf, results[0][path])


def test_stacked_layers_have_sketches_of_their_own():
    w = jnp.broadcast_to(jnp.arange(32.0).reshape(1, 8, 4), (3, 8, 4))
    tx = rac_lora(optax.sgd(1.0), 2, 2, key=KEY)
    params = {"layers": {"kernel": w}}
    updates, _ = tx.update(params, tx.init(params))
    u = np.asarray(updates["layers"]["kernel"])
    assert not np.allclose(u[0], u[1])
    q = sketch(KEY, 0, "layers/kernel", 4, 2, batch=(3,))
    np.testing.assert_allclose(u, -w @ q @ jnp.swapaxes(q, 1, 2), rtol=1e-4, atol=1e-4)


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
