"""What a step of an adapted model compiles to: no gradient of a frozen weight, no copy, no gathered weight."""

import collections
import functools
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import combine, partition, run_edit
from odjax.lowrank.adapt import adapt
from odjax.lowrank.chain import restart
from odjax.lowrank.methods import FACTORS
from odjax.lowrank.parameters import parameter_adapter
from odjax.models import Decoder

KEY = jax.random.key(0)
LAYERS, WIDTH, RANK, ROWS = 8, 1024, 8, 64


class Stack(nn.Module):
    """Eight scanned square layers: the measurement of the documentation, compiled but never run."""

    layers: int = LAYERS

    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        scan = nn.scan(body, variable_axes={True: 0}, split_rngs={True: True}, length=self.layers)
        return scan(nn.Dense(WIDTH, use_bias=False, name="layers"), x, None)[0]


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


X = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32)


@functools.cache
def factored(method, layers=LAYERS):
    model = adapt(Stack(layers), rank=RANK, method=method)
    params = jax.eval_shape(model.init, KEY, X)["params"]

    def step(params, x):
        free, frozen = partition(params, FACTORS)
        grads = jax.grad(lambda f: jnp.sum(model.apply({"params": combine(f, frozen)}, x) ** 2))(free)
        return combine(jax.tree.map(lambda p, g: p - 0.1 * g, free, grads), frozen)

    return model, params, jax.jit(step, donate_argnums=0).lower(params, X).compile()


@functools.cache
def materialized(layers=LAYERS):
    adapter = parameter_adapter("lora", rank=RANK)
    params = jax.eval_shape(Stack(layers).init, KEY, X)["params"]
    free, frozen = jax.eval_shape(adapter.init, KEY, params)

    def step(free, frozen, x):
        def loss(free):
            return jnp.sum(Stack(layers).apply({"params": adapter.materialize(free, frozen)}, x) ** 2)

        return jax.tree.map(lambda p, g: p - 0.1 * g, free, jax.grad(loss)(free))

    return jax.jit(step, donate_argnums=0).lower(free, frozen, X).compile()


WEIGHTS = LAYERS * WIDTH * WIDTH * 4


def temporary(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("method", ["lora", "rac"])
def test_a_layer_more_costs_a_tenth_of_the_temporaries_of_materialize(method):
    # On the CPU a scan keeps copies of the weights of two layers, whatever their number; the rest is activations.
    short, long = (temporary(factored(method, layers)[2]) for layers in (LAYERS, 2 * LAYERS))
    full_short, full_long = (temporary(materialized(layers)) for layers in (LAYERS, 2 * LAYERS))
    assert long - short < 0.1 * (full_long - full_short)
    assert short < full_short / 6
    # The frozen weights are updated in place, and no copy of them is made.
    assert short < 0.4 * WEIGHTS
    assert factored(method)[2].memory_analysis().alias_size_in_bytes >= WEIGHTS


@pytest.mark.parametrize("method", ["lora", "rac", "dora"])
def test_no_operation_makes_an_array_of_the_size_of_a_weight(method):
    model = adapt(nn.Dense(37, use_bias=False), rank=2, method=method)
    x = jax.ShapeDtypeStruct((5, 41), jnp.float32)
    params = jax.eval_shape(model.init, KEY, x)["params"]

    def gradient(free, frozen, x):
        return jax.grad(lambda f: jnp.sum(model.apply({"params": combine(f, frozen)}, x) ** 2))(free)

    free, frozen = partition(params, FACTORS)
    jaxpr = jax.make_jaxpr(gradient)(free, frozen, x)
    made = [
        v.aval.shape
        for eqn in jaxpr.eqns
        for v in eqn.outvars
        if eqn.primitive.name in ("dot_general", "transpose")
    ]
    assert made
    assert (41, 37) not in made
    assert (37, 41) not in made
    # The check can fail: differentiating the weight too does make one.
    full = jax.make_jaxpr(
        jax.grad(lambda p: jnp.sum(model.inner.apply({"params": {"kernel": p}}, jnp.ones((5, 41))) ** 2))
    )
    shapes = [v.aval.shape for eqn in full(frozen["kernel"]).eqns for v in eqn.outvars]
    assert (41, 37) in shapes


TINY = {"layers": 3, "width": 20, "heads": 4, "kv_heads": 2, "head_dim": 6, "mlp_width": 28, "vocab": 64}
LAYER = {20 * 24, 20 * 12, 20 * 28}  # numbers of the kernels of one layer; no activation has as many


def operations(text):
    """How often the compiled program has (operation, number of elements of its result)."""
    found = re.findall(r"= [a-z]\w*\[([\d,]*)\]\S* ([\w-]+)\(", text)
    return collections.Counter((op, math.prod(int(d) for d in dims.split(",") if d)) for dims, op in found)


@functools.cache
def decoder_step(method, trained):
    """A step of a scanned and rematerialised decoder whose linear layers are all adapted."""
    model = adapt(Decoder(**TINY, max_length=7, remat="full"), rank=2, method=method, where="layers/.*kernel")
    tokens = jax.ShapeDtypeStruct((5, 7), jnp.int32)
    params = nn.unbox(jax.eval_shape(model.init, KEY, tokens)["params"])

    def step(params, tokens):
        free, frozen = partition(params, trained)

        def loss(free):
            logits = model.apply({"params": combine(free, frozen)}, tokens)
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        return combine(jax.tree.map(lambda p, g: p - 0.1 * g, free, jax.grad(loss)(free)), frozen)

    return operations(jax.jit(step, donate_argnums=0).lower(params, tokens).compile().as_text())


@pytest.mark.parametrize("method,computes", [("lora", set()), ("rac", set()), ("dora", {"multiply"})])
def test_a_compiled_step_only_reads_frozen_kernels_and_has_no_gradient_of_them(method, computes):
    found = decoder_step(method, FACTORS)
    # A stack of kernels is an argument of the loop and nothing else: no gradient, no sum, no copy.
    stacks = {op for op, size in found if size in {3 * n for n in LAYER}}
    assert stacks <= {"parameter", "get-tuple-element", "bitcast"}
    # One layer's is a slice of it (in a fusion of its own); the lengths of DoRA square its entries on the way.
    layers = {op for op, size in found if size in LAYER}
    assert "dynamic-slice" in layers
    assert layers <= {"dynamic-slice", "bitcast", "fusion", "parameter"} | computes


def test_a_compiled_step_that_trains_the_kernels_has_their_gradients():
    found = decoder_step("lora", ".*")
    assert {size for op, size in found if op == "dot"} >= LAYER


def test_a_restart_works_in_place():
    model, params, _ = factored("rac")
    edit = restart(model, every=2, on_boundary="keep")
    state = {"count": jnp.int32(0)}
    compiled = (
        jax.jit(lambda p, s: run_edit(edit, KEY, 2, p, s), donate_argnums=(0, 1))
        .lower(params, abstract(state))
        .compile()
    )
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes >= WEIGHTS
    # One update of the size of the weights at most, on top of the weights themselves.
    assert memory.temp_size_in_bytes <= 1.2 * WEIGHTS


RULES = [
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("mlp", "tensor"),
    ("act_heads", "tensor"),
    ("act_kv_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
]
SIZES = {"layers": 3, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "vocab": 64, "max_length": 8}


@functools.cache
def on_mesh(shape):
    """Losses of three steps with a restart after the second, and the compiled restart."""
    model = adapt(Decoder(**SIZES), rank=2, method="rac", where=".*(q|o|up|down)/kernel")
    tokens = jax.random.randint(KEY, (8, 8), 0, 64)
    boxed = jax.jit(model.init)(KEY, tokens)["params"]
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
    edit = restart(model, every=2, on_boundary="keep")

    def step(params, tokens):
        free, frozen = partition(params, FACTORS)

        def loss(free):
            logits = model.apply({"params": combine(free, frozen)}, tokens)[:, :-1]
            return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], -1))

        value, grads = jax.value_and_grad(loss)(free)
        return value, combine(jax.tree.map(lambda p, g: p - 0.05 * g, free, grads), frozen)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        params = jax.device_put(nn.unbox(boxed), shardings)
        tokens = jax.device_put(tokens, NamedSharding(mesh, P(("data", "fsdp"))))
        whole = NamedSharding(mesh, P())
        run = jax.jit(step, out_shardings=(whole, shardings))
        again = (
            jax.jit(lambda p: run_edit(edit, KEY, 2, p, {})[0], out_shardings=shardings)
            .lower(params)
            .compile()
        )
        values = []
        for i in range(3):
            value, params = run(params, tokens)
            values.append(float(value))
            if i == 1:
                params = again(params)
    return values, again.as_text(), jax.device_get(params)


def collectives_of(text):
    """How often the compiled program has (operation, dtype, shape)."""
    kinds = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    found = collections.Counter()
    for result, op in re.findall(rf"= (\(.*?\)|\S+) ({kinds})(?:-start)?\(", text):
        found.update((op, dtype, dims) for dtype, dims in re.findall(r"([a-z]\w*)\[([\d,]*)\]", result))
    return found


@functools.cache
def mesh_of_eight():
    return jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)


@functools.cache
def step_collectives(law):
    """Collectives of a step on fsdp x tensor; without a law, of the bare model.

    The bare model trains what lies before its first layer, so that its backward pass goes through all of them.
    """
    model = Decoder(**SIZES, remat="full")
    if law is not None:
        model = adapt(model, rank=2, method="rac", law=law, where=".*(q|o|up|down)/kernel")
    trained = "embed/embedding" if law is None else FACTORS
    tokens, mesh = jax.ShapeDtypeStruct((8, 8), jnp.int32), mesh_of_eight()
    boxed = jax.eval_shape(model.init, KEY, tokens)["params"]

    def gradient(params, tokens):
        free, frozen = partition(params, trained)

        def loss(free):
            logits = model.apply({"params": combine(free, frozen)}, tokens)
            return -jnp.mean(jax.nn.log_softmax(logits)[..., 0])

        return jax.grad(loss)(free)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        out = partition(shardings, trained)[0]
        compiled = jax.jit(gradient, in_shardings=(shardings, rows), out_shardings=out)
        return collectives_of(compiled.lower(nn.unbox(boxed), tokens).compile().as_text())


@pytest.mark.parametrize("law", ["orthonormal", "cyclic"])
def test_a_step_on_a_mesh_gathers_what_the_bare_model_gathers_and_factors_of_one_layer(law):
    more = step_collectives(law) - step_collectives(None)
    sizes = {
        (op, dims): math.prod(int(d) for d in dims.split(",") if d)
        for op, _, dims in more
        if op != "all-reduce"
    }
    # A layer's factor has at most 48 x 2 numbers, a stack of them three times as many, a kernel 32 x 32.
    assert sizes
    assert max(sizes.values()) <= 48 * 2, sizes
    assert not [dims for _, dims in sizes if dims.startswith("3,")]


def test_a_restart_of_selected_coordinates_on_a_mesh_talks_to_nobody():
    model = adapt(Decoder(**SIZES), rank=2, method="rac", law="cyclic", where=".*(q|o|up|down)/kernel")
    mesh = mesh_of_eight()
    boxed = jax.eval_shape(model.init, KEY, jax.ShapeDtypeStruct((8, 8), jnp.int32))["params"]

    def again(params):
        return run_edit(restart(model, every=2, on_boundary="keep"), KEY, 2, params, {})[0]

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        compiled = jax.jit(again, in_shardings=(shardings,), out_shardings=shardings)
        assert not collectives_of(compiled.lower(nn.unbox(boxed)).compile().as_text())


def test_sharded_and_unsharded_chains_are_the_same():
    alone, spread = on_mesh((1, 1, 1)), on_mesh((2, 2, 2))
    np.testing.assert_allclose(alone[0], spread[0], rtol=2e-5)
    assert alone[0][2] < alone[0][0]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=2e-5), alone[2], spread[2])


def test_a_restart_on_a_mesh_gathers_no_weight():
    found = collectives_of(on_mesh((2, 2, 2))[1])
    sizes = [math.prod(int(n) for n in dims.split(",") if n) for _, _, dims in found]
    # A factor of all layers has at most 3 x 48 x 2 numbers, a weight of one layer at least 32 x 32.
    assert 0 < max(sizes) <= 3 * 48 * 2, found
