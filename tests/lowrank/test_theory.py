"""The theorems of the paper, on problems whose constants are known, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.lowrank import Bernoulli, lift, rac_lora, sketch
from odjax_train.proofs import rac_lora_theory as theory

KEY = jax.random.key(0)


@settings(max_examples=3)
@given(st.sampled_from([(2, 5), (5, 3)]), st.integers(0, 1000))
def test_every_projected_step_descends_by_at_least_half_gamma_g_h_g(shape, seed):
    inputs, outputs = shape
    with jax.enable_x64(True):
        loss, start = theory.quadratic(inputs, outputs, 5.0, seed)
        assert theory.worst_descent(loss, start, 1.0, 10, jax.random.key(seed)) <= 1e-14


@pytest.mark.parametrize("side,dim", [("left", 4), ("right", 6), ("both", None)])
def test_the_mean_gap_of_a_strongly_convex_quadratic_shrinks_at_the_rate_of_the_theorem(side, dim):
    with jax.enable_x64(True):
        condition, steps, rank = 4.0, 60, 1
        loss, start = theory.quadratic(6, 4, condition, 1)
        # Mixed sides: lambda = p r/m + (1 - p) r/n.
        rate = rank / dim if dim else 0.3 * rank / 4 + 0.7 * rank / 6
        side = side if dim else Bernoulli(0.3)
        run = jax.jit(jax.vmap(lambda key: theory.descend(loss, start, rank, 1.0, steps, key, side)))
        gaps = np.asarray(run(jax.random.split(KEY, 64)))
        bound = (1 - rate / condition) ** np.arange(steps + 1)
        error = gaps.std(0, ddof=1) / 64**0.5
        assert (gaps.mean(0) <= bound + 3 * error + 1e-12).all()
        assert gaps.mean(0)[-1] > 0.01 * bound[-1] ** 4  # it is no faster than descent on the full gradient


def test_iterations_times_rank_over_dim_are_constant():
    with jax.enable_x64(True):
        loss, start = theory.quadratic(6, 4, 12.6, 0)
        counts = []
        for side, dim, rank in (("left", 4, 1), ("left", 4, 2), ("right", 6, 1)):
            run = jax.jit(
                jax.vmap(
                    lambda key, side=side, rank=rank: theory.descend(loss, start, rank, 1.0, 600, key, side)
                )
            )
            mean = np.asarray(run(jax.random.split(KEY, 16))).mean(0)
            assert mean[-1] < 1e-3
            counts.append(np.argmax(mean <= 1e-3) * rank / dim)
        assert max(counts) / min(counts) < 1.25, counts


def test_the_counter_example_stops_lora_and_a_frozen_sketch_and_not_the_chain():
    with jax.enable_x64(True):
        np.testing.assert_allclose(theory.LOWEST, -2.025)  # -(1/40 + 8/4)
        np.testing.assert_allclose(theory.counter_example(jnp.asarray(theory.OPTIMUM)), 0, atol=1e-15)
        gaps = theory.counter_example_gaps(20, 1000)
    floor = theory.rank_one_floor()
    assert floor > 0.1
    for name in ("LoRA", "Asymmetric LoRA"):
        assert not (gaps[name] < floor).any(), name
    assert not (gaps["COLA, K = 10"] < 1e6).any()
    assert (gaps["RAC-LoRA"] < 1e-12).all()


def test_several_descent_steps_in_a_block_keep_the_bound_counted_in_blocks():
    with jax.enable_x64(True):
        condition, blocks = 4.0, 15
        loss, start = theory.quadratic(6, 4, condition, 2)
        run = jax.jit(
            jax.vmap(lambda key: theory.descend(loss, start, 1, 1.0, 3 * blocks, key, block_steps=3))
        )
        gaps = np.asarray(run(jax.random.split(KEY, 64)))
        assert (np.diff(gaps, axis=1) <= 1e-14).all()
        ends = gaps[:, ::3]
        error = ends.std(0, ddof=1) / 8
        assert (ends.mean(0) <= (1 - 0.25 / condition) ** np.arange(blocks + 1) + 3 * error + 1e-12).all()


def test_raw_gaussian_sketches_diverge_at_a_rate_at_which_preconditioned_ones_converge():
    with jax.enable_x64(True):

        def last(precondition):
            run = lambda key: theory.descend(  # noqa: E731
                *(theory.counter_example, jnp.zeros((3, 3)), 1, 1 / theory.SMOOTH, 600, key),
                law="gaussian",
                scale="unit_rms",
                precondition=precondition,
                block_steps=10,
            )
            return np.asarray(jax.jit(jax.vmap(run))(jax.random.split(KEY, 20)))[:, -1]

        # gamma mu lambda = (1 / 20) 2 (1 / 3), 60 blocks from a first gap of 2.025
        assert last(True).mean() <= 2.025 * (1 - 1 / 30) ** 60
        assert not (last(False) < 1e6).any()


def test_the_rank_of_what_was_learned_grows_with_the_blocks_to_full():
    with jax.enable_x64(True):
        best = jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)))
        tx = rac_lora(optax.sgd(0.3), 1, 2, key=KEY, scale="orthonormal")
        params, state = {"w": jnp.zeros((6, 5))}, None
        state = tx.init(params)
        update = jax.jit(tx.update)
        for block in range(6):
            for _ in range(2):
                updates, state = update({"w": params["w"] - best}, state)
                params = optax.apply_updates(params, updates)
            assert np.linalg.matrix_rank(params["w"], tol=1e-9) == min(block + 1, 5)


@settings(max_examples=5)
@given(st.sampled_from([1, 5]), st.sampled_from(["left", "right"]), st.integers(0, 1000))
def test_the_mean_factor_of_clients_that_share_a_sketch_is_the_mean_of_their_models(clients, side, seed):
    with jax.enable_x64(True):
        assert theory.federated_error(clients, seed) < 1e-14
        rng = np.random.default_rng(seed)
        w = rng.normal(size=(5, 4))
        q = sketch(jax.random.key(seed), 3, "w", 4 if side == "left" else 5, 2, dtype=jnp.float64)
        z = rng.normal(size=(clients, 5, 2) if side == "left" else (clients, 2, 4))
        merged = [w + lift(q, jnp.asarray(one), side) for one in z]
        np.testing.assert_allclose(
            np.mean(merged, 0), w + lift(q, jnp.asarray(z.mean(0)), side), rtol=1e-13, atol=1e-13
        )


def test_averaging_both_factors_of_lora_is_not_exact():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(4, 5, 2)), rng.normal(size=(4, 2, 3))
    assert np.abs((a @ b).mean(0) - a.mean(0) @ b.mean(0)).max() > 0.1
