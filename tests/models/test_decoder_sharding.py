"""The models on meshes: the same losses everywhere, and no gathered stack."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.models import Decoder, encoder_decoder, vit

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
MESHES = {"1": (1, 1, 1), "8x1x1": (8, 1, 1), "1x8x1": (1, 8, 1), "2x2x2": (2, 2, 2)}
EVERY_MESH = ("decoder", "vit")
# Unlike every other size, so that a stack and an activation are known by them.
LAYERS, LENGTH = 5, 13
SIZES = {"layers": LAYERS, "width": 32, "heads": 4, "mlp_width": 48}


def mesh_of(name):
    shape = MESHES[name]
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)


def tokens(length=16, vocab=64):
    return jax.random.randint(jax.random.key(3), (8, length), 0, vocab)


def cross_entropy(logits, targets):
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1))


def decoder_problem(**change):
    model = Decoder(vocab=64, kv_heads=2, max_length=16, **SIZES, **change)
    batch = (tokens(LENGTH),)
    return model, batch, lambda p, x: cross_entropy(model.apply({"params": p}, x)[:, :-1], x[:, 1:])


def vit_problem():
    model = vit("tiny-digits", classes=8, **SIZES)
    batch = (jax.random.uniform(jax.random.key(4), (8, 8, 8, 1)), jnp.arange(8))
    return model, batch, lambda p, x, y: cross_entropy(model.apply({"params": p}, x), y)


def translation_problem():
    model = encoder_decoder("tiny", vocab=64, **SIZES)
    batch = (tokens(12), tokens(16))
    return model, batch, lambda p, s, t: cross_entropy(model.apply({"params": p}, s, t)[:, :-1], t[:, 1:])


PROBLEMS = {
    "decoder": decoder_problem,
    "tied decoder": functools.partial(decoder_problem, tied=True, remat="full"),
    "vit": vit_problem,
    "encoder_decoder": translation_problem,
}


@functools.cache
def initial(problem):
    """Boxed parameters that are the same on every mesh."""
    model, batch, _ = PROBLEMS[problem]()
    inputs = batch[: 2 if problem == "encoder_decoder" else 1]
    return jax.jit(model.init)(jax.random.key(0), *inputs)["params"]


@functools.cache
def on_mesh(problem, mesh_name):
    """A compiled step of gradient descent, sharded parameters and batch."""
    _, batch, loss = PROBLEMS[problem]()
    boxed = initial(problem)
    mesh = mesh_of(mesh_name)

    def step(params, *batch):
        value, grads = jax.value_and_grad(loss)(params, *batch)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)

    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        params = jax.device_put(nn.unbox(boxed), shardings)
        rows = NamedSharding(mesh, P(("data", "fsdp")))
        batch = jax.device_put(batch, rows)
        compiled = (
            jax.jit(
                step,
                in_shardings=(shardings, *[rows] * len(batch)),
                out_shardings=(NamedSharding(mesh, P()), shardings),
            )
            .lower(params, *batch)
            .compile()
        )
    return compiled, params, batch


@functools.cache
def losses(problem, mesh_name, steps=4):
    step, params, batch = on_mesh(problem, mesh_name)
    values = []
    for _ in range(steps):
        value, params = step(params, *batch)
        values.append(float(value))
    return values


@pytest.mark.parametrize(
    "problem, mesh",
    [(p, m) for p in PROBLEMS for m in MESHES if m == "2x2x2" or (m != "1" and p in EVERY_MESH)],
)
def test_losses_do_not_depend_on_the_mesh(problem, mesh):
    expected = losses(problem, "1")
    assert expected[-1] < expected[0]
    np.testing.assert_allclose(losses(problem, mesh), expected, rtol=1e-5)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_parameters_are_really_split(problem):
    _, params, _ = on_mesh(problem, "2x2x2")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = [key.key for key in path]
        if names[-1] in ("kernel", "embedding") and names[0] not in ("patch", "head"):
            assert leaf.size == 4 * leaf.addressable_shards[0].data.size, names


def collectives(text, kind):
    """Shapes of the results of every collective of a kind."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
            found += [tuple(map(int, s.split(","))) for s in re.findall(r"\[([\d,]+)\]", match[1])]
    return found


@pytest.mark.parametrize(
    "problem, mesh", [("decoder", "1x8x1"), ("vit", "1x8x1"), *[(p, "2x2x2") for p in PROBLEMS]]
)
def test_a_compiled_step_gathers_no_stack_of_layers(problem, mesh):
    compiled, _, _ = on_mesh(problem, mesh)
    gathered = collectives(compiled.as_text(), "all-gather")
    assert gathered, "parameters are split over fsdp, so a layer's slice must be gathered"
    assert not [shape for shape in gathered if LAYERS in shape]
    assert not [shape for shape in collectives(compiled.as_text(), "all-to-all") if LAYERS in shape]


def test_the_lookup_of_tokens_is_not_replicated():
    compiled, _, _ = on_mesh("decoder", "2x2x2")
    # 8 rows over data and fsdp: two on each device, never more.
    for kind in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        shapes = collectives(compiled.as_text(), kind)
        many = ((4, LENGTH), (8, LENGTH))
        assert not [shape for shape in shapes if shape[:2] in many or {4 * LENGTH, 8 * LENGTH} & {*shape}]
