"""The gradient view beside the factor view, written out plainly: the identities that tie them together."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.lowrank import Bernoulli, rac_lora, sketch
from odjax.lowrank.sketches import LAWS, fixed_side

from .gradient_cases import INNERS, KEY, factor_view, lenient, quadratic, run


@settings(max_examples=8)
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
        gamma = 0.1
        transform = rac_lora(
            *(optax.sgd(gamma), 2, 1), key=KEY, side=side, law=law, alpha=3.0, precondition=True
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
                    rac_lora(optax.sgd(0.04 * 1.5**2 if p else 0.04), 2, 2, precondition=p, **options),
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
