"""The two views of a chain are one method: the adapter with its restarts, and the gradient transform."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.core import combine, fold_path, fold_step, partition, run_edit
from odjax.lowrank import adapt, merge, rac_lora, restart
from odjax.lowrank.factors import Sizes, frozen_half
from odjax.lowrank.methods import FACTORS, side_of
from odjax.lowrank.sketches import LAWS

KEY = jax.random.key(0)
BLOCK, STEPS = 3, 7

# An inner transform for the factors, and the one that the gradient view needs for the same walk (s = scale).
INNERS = {
    "sgd": lambda s: (optax.sgd(0.02),) * 2,
    "momentum": lambda s: (optax.chain(optax.trace(0.9), optax.scale(-0.02)),) * 2,
    "adam": lambda s: (optax.chain(optax.scale_by_adam(eps=1e-3), optax.scale(-0.02)),) * 2,
    # Identity 2: the factor's gradient without s, and Adam's eps divided by it.
    "adam, s in the lift alone": lambda s: (
        optax.chain(optax.scale_by_adam(eps=1e-3), optax.scale(-0.02)),
        optax.chain(optax.scale(1 / s), optax.scale_by_adam(eps=1e-3 / s), optax.scale(-0.02)),
    ),
    "lion": lambda s: (optax.chain(optax.scale_by_lion(), optax.scale(-0.01)),) * 2,
    "rms": lambda s: (optax.chain(optax.clip(0.5), optax.scale_by_rms(), optax.scale(-0.02)),) * 2,
}


class Net(nn.Module):
    """One layer of a kind, in float64."""

    kind: str
    outputs: int

    @nn.compact
    def __call__(self, x):
        options = {"use_bias": False, "param_dtype": jnp.float64, "name": "q"}
        if self.kind == "dense":
            return nn.Dense(self.outputs, **options)(x)
        if self.kind == "heads":
            return nn.DenseGeneral((2, self.outputs), **options)(x)
        scan = nn.scan(
            lambda layer, x, _: (jnp.tanh(layer(x)), None),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=2,
        )
        return scan(nn.Dense(x.shape[-1], **{**options, "name": "layers"}), x, None)[0]


def sizes_of(kind, inputs, outputs):
    """The name of the layer, and the kinds of the axes of its kernel."""
    return {
        "dense": ("q", Sizes((), (inputs,), (outputs,))),
        "heads": ("q", Sizes((), (inputs,), (2, outputs))),
        "scan": ("layers", Sizes((2,), (inputs,), (inputs,))),
    }[kind]


def lenient(inner):
    """optax promotes int32 counts to floats."""

    def update(updates, state, params=None):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def problem(kind, inputs, outputs):
    model = Net(kind, outputs)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(3, inputs)))
    return model, x, lambda y: jnp.mean(jnp.sin(2 * y) + y**2)


def factor_walk(model, params, loss, inner, edit=None, steps=STEPS):
    """The merged weights after every update; restarts follow them."""
    inner = lenient(inner)

    def step(carry, i):
        params, state = carry
        free, frozen = partition(params, FACTORS)
        updates, state = inner.update(jax.grad(lambda f: loss(combine(f, frozen)))(free), state, free)
        params = combine(optax.apply_updates(free, updates), frozen)
        merged = merge(model, params)
        if edit is not None:
            params, state = jax.lax.cond(
                edit.due(i), lambda p, s: run_edit(edit, KEY, i, p, s), lambda p, s: (p, s), params, state
            )
        return (params, state), merged

    start = (params, inner.init(partition(params, FACTORS)[0]))
    return jax.jit(lambda start: jax.lax.scan(step, start, jnp.arange(1, steps + 1))[1])(start)


def gradient_walk(transform, params, loss, steps=STEPS):
    """The weights after every update."""

    def step(carry, _):
        params, state = carry
        updates, state = transform.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), params

    start = (params, transform.init(params))
    return jax.jit(lambda start: jax.lax.scan(step, start, None, length=steps)[1])(start)


def halves_of(spec, sketch, path, sizes, blocks):
    """The law that draws in each block of the gradient view the frozen half that the factor view has there.

    What the factor view's law drew is looked up by the keys that the gradient view draws with.
    """
    rank, right = spec.rank, side_of(spec, *map(np.prod, sizes[1:])) == "right"
    layers, dim = (int(np.prod(part)) for part in (sizes.batch, sizes.inputs if right else sizes.outputs))
    name, shape = (
        ("lora_b", (*sizes.batch, rank, *sizes.outputs))
        if right
        else ("lora_a", (*sizes.batch, *sizes.inputs, rank))
    )
    keys, halves = [], []
    for block in range(blocks):
        q = frozen_half(spec, {name: jnp.zeros(shape), "lora_sketch": sketch.at[..., 2].set(block)}, sizes)
        q = q if right else jnp.moveaxis(q, len(sizes.batch), -1)
        halves.append(q.reshape(layers, dim, rank))
        keys.append(jax.random.key_data(jax.random.split(fold_path(fold_step(KEY, block), path), layers)))
    keys, halves = jnp.concatenate(keys), jnp.concatenate(halves)

    def law(key, dim, rank, dtype):
        hit = jnp.all(keys == jax.random.key_data(key)[None], axis=-1)
        return jnp.where(jnp.any(hit), halves[jnp.argmax(hit)], jnp.nan)

    return law


@pytest.mark.parametrize(
    "law,inner,kind",
    list(zip(itertools.cycle(LAWS), sorted(INNERS), itertools.cycle(["scan", "dense", "heads"]))),
)
@settings(max_examples=2)
@given(
    inputs=st.integers(2, 6),
    outputs=st.integers(2, 5),
    rank=st.integers(2, 3),
    side=st.sampled_from(["left", "right", "auto"]),
    alpha=st.sampled_from([5.0, 1.0, None]),
)
def test_identities_1_and_2_the_adapter_with_restarts_walks_through_the_weights_of_rac_lora(
    kind, inputs, outputs, rank, side, law, inner, alpha
):
    name, sizes = sizes_of(kind, inputs, outputs)
    rank = min(rank, *map(int, map(np.prod, sizes[1:])))
    with jax.enable_x64(True):
        bare, x, f = problem(kind, inputs, outputs)
        model = adapt(bare, rank=rank, method="rac", side=side, law=law, alpha=alpha, dtype=jnp.float64)
        params = model.init(KEY, x)["params"]
        own, other = INNERS[inner](1.0 if alpha is None else alpha / rank)
        walk = factor_walk(
            model,
            params,
            lambda p: f(model.apply({"params": p}, x)),
            own,
            restart(model, every=BLOCK),
        )
        halves = halves_of(model.spec, params[name]["lora_sketch"], f"{name}/kernel", sizes, 3)
        transform = rac_lora(lenient(other), rank, BLOCK, key=KEY, side=side, law=halves, alpha=alpha)
        base = {name: {"kernel": params[name]["kernel"]}}
        expected = gradient_walk(transform, base, lambda p: f(bare.apply({"params": p}, x)))
        got, expected = walk[name]["kernel"], expected[name]["kernel"]
        assert np.abs(expected[-1] - expected[0]).max() > 1e-4
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@settings(max_examples=3)
@given(
    inputs=st.integers(2, 6),
    outputs=st.integers(2, 5),
    side=st.sampled_from(["left", "right"]),
    inner=st.sampled_from(["sgd", "momentum", "adam"]),
    decay=st.floats(0.5, 5.0),
)
def test_identity_4_decay_of_the_factor_is_decay_towards_the_start_of_the_block(
    inputs, outputs, side, inner, decay
):
    rate = 0.02
    with jax.enable_x64(True):
        bare, x, f = problem("dense", inputs, outputs)
        model = adapt(bare, rank=2, method="rac", side=side, alpha=3.0, dtype=jnp.float64)
        params = model.init(KEY, x)["params"]
        w0 = params["q"]["kernel"]
        base = {"q": {"kernel": w0}}
        own = INNERS[inner](1.5)[0]
        decayed = optax.chain(own, optax.add_decayed_weights(-rate * decay))
        walk = factor_walk(model, params, lambda p: f(model.apply({"params": p}, x)), decayed, steps=4)["q"][
            "kernel"
        ]
        law = halves_of(
            model.spec, params["q"]["lora_sketch"], "q/kernel", Sizes((), (inputs,), (outputs,)), 1
        )
        chain = rac_lora(lenient(own), 2, 4, key=KEY, side=side, law=law, alpha=3.0)

        def towards(goal):
            pull = optax.stateless(
                lambda u, p: jax.tree.map(lambda u, p, g: u - rate * decay * (p - g), u, p, goal)
            )
            return gradient_walk(
                optax.chain(chain, pull), base, lambda p: f(bare.apply({"params": p}, x)), steps=4
            )["q"]["kernel"]

        np.testing.assert_allclose(walk, towards(base), rtol=1e-12, atol=1e-12)
        # Decay outside goes to zero: after one update the two differ by exactly that.
        outside = towards(jax.tree.map(jnp.zeros_like, base))
        np.testing.assert_allclose(walk[0] - outside[0], rate * decay * w0, rtol=1e-9, atol=1e-12)


@functools.cache
def one_block(method):
    bare, x, f = problem("dense", 5, 4)
    model = adapt(
        bare,
        rank=2,
        method=method,
        side="right",
        law="gaussian",
        sketch_scale=0.5,
        alpha=3.0,
        dtype=jnp.float64,
    )
    params = model.init(KEY, x)["params"]
    inner = INNERS["adam"](1.0)[0]
    return factor_walk(model, params, lambda p: f(model.apply({"params": p}, x)), inner)["q"]["kernel"]


@pytest.mark.parametrize("method", ["asym", "lora_fa"])
def test_identity_5_one_block_of_rac_is_asymmetric_lora_and_lora_fa(method):
    with jax.enable_x64(True):
        expected = one_block("rac")
        assert np.abs(expected[-1] - expected[0]).max() > 1e-2
        np.testing.assert_array_equal(one_block(method), expected)


@pytest.mark.parametrize("inputs,outputs", [(6, 4), (4, 6)])
def test_identity_5_with_the_singular_vectors_of_the_gradient_it_is_galore(inputs, outputs):
    with jax.enable_x64(True):
        bare, x, f = problem("dense", inputs, outputs)
        params = bare.init(KEY, x)["params"]
        loss = lambda p: f(bare.apply({"params": p}, x))  # noqa: E731
        inner = lenient(optax.scale_by_adam())
        galore = lenient(optax.contrib.scale_by_galore(2, STEPS, 0.5, inner))
        galore = optax.chain(galore, optax.scale(-0.02))
        # optax keeps its projector on the longer side, and draws it with the first gradient.
        _, state = galore.update(jax.grad(loss)(params), galore.init(params))
        projector = state[0].projector["q"]["kernel"]
        chain = rac_lora(
            optax.chain(inner, optax.scale(-0.02 * 0.5)),
            *(2, STEPS),
            key=KEY,
            side="right" if inputs >= outputs else "left",
            law=lambda key, dim, rank, dtype: projector * np.sqrt(dim),
            scale="orthonormal",
        )
        expected, got = (gradient_walk(t, params, loss)["q"]["kernel"] for t in (galore, chain))
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "law,side,cached",
    [
        ("orthonormal", "right", False),
        ("gaussian", "left", False),
        ("gaussian", "right", True),
        ("cyclic", "left", False),
    ],
)
def test_identity_3_preconditioned_sgd_on_the_factor_is_projected_gradient_descent(law, side, cached):
    gamma, steps = 0.1, 3
    with jax.enable_x64(True):
        bare, x, f = problem("heads", 5, 3)
        model = adapt(
            bare,
            rank=2,
            method="rac",
            side=side,
            law=law,
            alpha=3.0,
            dtype=jnp.float64,
            precondition=True,
            cache_sketch=cached,
        )
        params = model.init(KEY, x)["params"]
        edit = restart(model, every=1)
        walk = factor_walk(
            model, params, lambda p: f(model.apply({"params": p}, x)), optax.sgd(gamma), edit, steps
        )["q"]["kernel"]
        gradient = jax.jit(jax.grad(lambda w: f(bare.apply({"params": {"q": {"kernel": w}}}, x))))
        w, sizes = params["q"]["kernel"], sizes_of("heads", 5, 3)[1]
        leaves = {k: v for k, v in params["q"].items() if k in ("lora_a", "lora_b")}
        for t in range(steps):
            leaves["lora_sketch"] = params["q"]["lora_sketch"].at[2].set(t)
            q = np.asarray(frozen_half(model.spec, leaves, sizes))
            q = q.reshape(5, 2) if side == "right" else q.reshape(2, 6).T
            h, g = q @ np.linalg.pinv(q), np.asarray(gradient(w)).reshape(5, 6)
            w = w - gamma * jnp.asarray(h @ g if side == "right" else g @ h).reshape(5, 2, 3)
            np.testing.assert_allclose(walk[t], w, rtol=1e-12, atol=1e-12)
