"""Programs of sparse training: what an ordinary step costs, and how a change of links divides over devices."""

import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.sparse import chts, topology_edit, uniform

WIDTH, LAYERS, BATCH = 256, 2, 256
PATHS = [f"w{i}" for i in range(LAYERS)]
PARAMS = {path: jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32) for path in PATHS}
PLAN = uniform(PARAMS, 0.9)
INTERVAL, END = 100, 1000


def sparse(**options):
    return chts(
        optax.adam(1e-3),
        PLAN,
        key=jax.random.key(0),
        interval=INTERVAL,
        end=END,
        regrowth_rule="top",
        **options,
    )


def step_of(optimizer):
    """The compiled training step of an MLP."""

    def loss(params, x):
        for path in PATHS:
            x = jnp.tanh(x @ params[path])
        return jnp.mean(x)

    @jax.jit
    def step(params, state, x):
        gradients = jax.grad(loss)(params, x)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(optimizer.init, PARAMS)
    return step.lower(PARAMS, state, jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)).compile()


@pytest.fixture(scope="module")
def programs():
    return {
        "adam": step_of(optax.adam(1e-3)),
        "by_edit": step_of(sparse(by_edit=True)),
        "in the update": step_of(sparse()),
    }


def test_an_edit_leaves_the_step_the_work_of_the_plain_optimizer(programs):
    plain, own = (programs[name].cost_analysis()["flops"] for name in ("adam", "by_edit"))
    # A product forward and two backward, one for the first layer; masks are some shifts and selections a weight.
    products = (3 * LAYERS - 1) * 2 * BATCH * WIDTH**2
    assert plain >= products
    assert own - plain < 0.05 * products


def test_the_step_with_an_edit_has_no_conditional_and_no_scores(programs):
    text = programs["by_edit"].as_text()
    assert "conditional(" not in text
    assert "popcnt(" not in text
    assert text.count(" dot(") == programs["adam"].as_text().count(" dot(")


def test_masks_are_a_thirtysecond_of_a_moment_in_the_state():
    plain, own = (jax.eval_shape(tx.init, PARAMS) for tx in (optax.adam(1e-3), sparse()))

    def size(tree):
        return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

    weights = LAYERS * WIDTH**2
    assert size(own.masks) == weights // 8
    assert size(own) - size(plain) < weights // 8 + 64


def test_an_unpacked_mask_is_no_more_than_a_byte_a_weight_of_temporaries(programs):
    plain, own = (programs[name].memory_analysis().temp_size_in_bytes for name in ("adam", "by_edit"))
    assert own - plain <= LAYERS * WIDTH**2 + 4096


def test_only_masks_and_overlaps_come_out_of_the_conditional(programs):
    results = re.findall(r"= (\([^)]*\)|\S+) conditional\(", programs["in the update"].as_text())
    found = [sorted(re.findall(r"\w+\[[\d,]*\]", result)) for result in results]
    assert sorted(LAYERS * [f"u32[{WIDTH // 32},{WIDTH}]", "f32[]"]) in found
    # The others are the ties of selections.
    assert not [result for result in found if f"f32[{WIDTH},{WIDTH}]" in result]


def test_the_products_of_a_change_of_links_divide_over_eight_devices():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    text, flops = {}, {}
    for name, axes in {"one": None, "eight": ("fsdp", "tensor")}.items():
        with jax.set_mesh(mesh if axes else jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,))):
            optimizer = sparse(by_edit=True, axes=axes, exact=False)
            edit = topology_edit(optimizer, every=INTERVAL, end=END)
            state = jax.eval_shape(optimizer.init, PARAMS)
            if axes:
                split = NamedSharding(mesh, P("fsdp", "tensor"))
                put = lambda x, split=split: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=split)  # noqa: E731
                params = jax.tree.map(put, PARAMS)
            else:
                params = PARAMS
            change = jax.jit(lambda p, s, edit=edit: edit.apply(jax.random.key(0), jnp.int32(INTERVAL), p, s))
            compiled = change.lower(params, state).compile()
        text[name] = compiled.as_text()
        # Products alone: 2 multiplications and additions for each output and contracted index.
        flops[name] = sum(
            2 * int(r) * int(c) * WIDTH
            for r, c in re.findall(r"= f32\[(\d+),(\d+)\]\S* (?:dot|fusion)\([^\n]*dot_general", text[name])
        )
    assert flops["one"] >= LAYERS * 4 * WIDTH**3
    assert 0 < flops["eight"] <= flops["one"] / 8 * 1.01
    gathered = re.findall(r"= (\w+)\[[\d,]*\]\S* all-gather(?:-start)?\(", text["eight"])
    assert "f32" not in gathered
