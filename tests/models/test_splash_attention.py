"""The splash kernels: interpreted they are attention, on meshes too, and they compile for TPU."""

import functools
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from odjax.models import REMAT_POLICIES, Attention, Decoder, attend, vit
from odjax.models.attention import takes_segments
from odjax.models.splash_attention import splash_attention
from odjax_kernels import aot

interpreted = functools.partial(splash_attention, block=(128, 128, 128), interpret=True)
RULES = [("batch", ("data", "fsdp")), ("act_heads", "tensor"), ("act_kv_heads", "tensor")]
SIZES = {"vocab": 32, "layers": 2, "width": 32, "heads": 4, "kv_heads": 2, "mlp_width": 48, "max_length": 256}


def heads_of(batch, length, keys, heads, kv_heads, width, dtype=jnp.float32):
    shapes = [(batch, length, heads, width)] + [(batch, keys, kv_heads, width)] * 2
    return [jax.random.normal(jax.random.key(i), shape, dtype) for i, shape in enumerate(shapes)]


def documents(batch, length):
    """Ids of documents of different lengths in every row."""
    ends = jnp.arange(1, batch + 1)[:, None] * 23
    return jnp.arange(length)[None] // ends


def value_and_grad(implementation, arrays, **more):
    def total(arrays):
        y = attend(*arrays, implementation=implementation, **more)
        weights = jnp.linspace(0.0, 1.0, y.shape[1])[None, :, None, None]
        return jnp.sum(jnp.sin(y) * weights), y

    (_, y), grads = jax.jit(jax.value_and_grad(total, has_aux=True))(arrays)
    return y, grads


def calls_of_kernels(function, *args):
    """How many kernels run; a call without results does not."""

    def count(jaxpr):
        found = 0
        for eqn in jaxpr.eqns:
            inner = [getattr(value, "jaxpr", value) for value in eqn.params.values()]
            if eqn.primitive.name == "pallas_call":
                found += 1
            elif eqn.outvars:
                found += sum(count(value) for value in inner if hasattr(value, "eqns"))
        return found

    return count(jax.make_jaxpr(function)(*args).jaxpr)


CASES = {
    "a causal one of grouped heads": ((256, 256, 4, 2, 64), {"causal": True}),
    "one of packed documents": (
        (150, 150, 2, 1, 16),
        {"causal": True, "segments": (documents(2, 150), documents(2, 150))},
    ),
    "one without order, of a length that no block divides": ((197, 197, 2, 2, 16), {}),
    "one to a shorter source whose end is padding": (
        (200, 140, 2, 2, 16),
        {"mask": (jnp.arange(140)[None] < jnp.array([140, 77])[:, None])[:, None, None]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients_are_those_of(case):
    shape, more = CASES[case]
    arrays = heads_of(2, *shape)
    y, grads = value_and_grad(interpreted, arrays, **more)
    z, expected = value_and_grad("xla", arrays, **more)
    np.testing.assert_allclose(y, z, atol=2e-6)
    for ours, theirs in zip(grads, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_a_causal_query_beyond_the_keys_does_not_see_their_padding():
    arrays = heads_of(1, 256, 130, 1, 1, 8)
    y = jax.jit(interpreted, static_argnames="is_causal")(*arrays, is_causal=True)
    np.testing.assert_allclose(y, attend(*arrays, causal=True, implementation="xla"), atol=2e-6)


def test_two_backward_kernels_give_the_same_gradients():
    arrays = heads_of(1, 128, 128, 2, 1, 16)
    _, two = value_and_grad(functools.partial(interpreted, fused=False), arrays, causal=True)
    _, expected = value_and_grad("xla", arrays, causal=True)
    for a, b in zip(two, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_values_are_close_in_bfloat16():
    arrays = heads_of(1, 128, 128, 2, 2, 16, jnp.bfloat16)
    y = jax.jit(interpreted, static_argnames="is_causal")(*arrays, is_causal=True)
    exact = attend(*(x.astype(jnp.float32) for x in arrays), causal=True)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)


# Of data, fsdp and tensor; four parts of the heads are more than there are key heads.
@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 2, 4)], ids=str)
def test_it_is_the_same_on_devices_that_divide_batch_and_heads(shape):
    arrays = heads_of(4, 128, 128, 4, 2, 8)
    more = {"causal": True, "segments": (documents(4, 128),) * 2}
    y, grads = value_and_grad("xla", arrays, **more)
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        z, divided = value_and_grad(interpreted, arrays, **more)
    assert z.sharding.shard_shape(z.shape) == (4 // (shape[0] * shape[1]), 128, 4 // shape[2], 8)
    np.testing.assert_allclose(y, z, atol=2e-6)
    for a, b in zip(grads, divided, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_what_the_mesh_does_not_divide_stays_whole():
    arrays = heads_of(3, 128, 128, 3, 1, 8)
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        y = jax.jit(interpreted)(*arrays)
    np.testing.assert_allclose(y, attend(*arrays, implementation="xla"), atol=2e-6)


def test_inside_a_divided_function_it_takes_the_parts_that_it_gets():
    arrays = heads_of(2, 128, 128, 2, 2, 8)
    mesh = jax.make_mesh(
        (2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:4]
    )
    rows = jax.sharding.PartitionSpec("data")
    with jax.set_mesh(mesh), nn.logical_axis_rules([("batch", "data"), *RULES[1:]]):
        part = jax.shard_map(
            interpreted, in_specs=(rows,) * 3, out_specs=rows, axis_names={"data"}, check_vma=False
        )
        y = jax.jit(part)(*arrays)
    np.testing.assert_allclose(y, attend(*arrays, implementation="xla"), atol=2e-6)


def decoder_step(attention, remat="full", **change):
    model = Decoder(**{**SIZES, **change}, attention=attention, remat=remat)
    tokens = jax.random.randint(jax.random.key(1), (2, 128), 0, SIZES["vocab"])
    segments = documents(2, 128)
    plain = model.clone(attention=None)
    params = nn.unbox(jax.jit(plain.init)(jax.random.key(0), tokens))

    def loss(params):
        return jnp.mean(jnp.square(model.apply(params, tokens, segments)))

    return loss, params


def test_a_scanned_decoder_of_packed_documents_has_the_same_gradients():
    loss, params = decoder_step(interpreted, "attention")
    expected = jax.jit(jax.grad(decoder_step("xla")[0]))(params)
    for a, b in zip(*map(jax.tree.leaves, (jax.jit(jax.grad(loss))(params), expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_no_mask_of_documents_is_made():
    for attention, made in (("splash", 0), ("xla", 1)):
        loss, params = decoder_step(attention)
        text = str(jax.make_jaxpr(loss)(params))
        assert ("bool[2,1,128,128]" in text) == made, attention


@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_the_forward_kernel_runs_again_under_full_rematerialization_alone(remat):
    loss, params = decoder_step("splash", remat)
    assert calls_of_kernels(jax.grad(loss), params) == (3 if remat == "full" else 2)


def test_a_few_queries_and_masks_of_queries_are_left_to_plain_attention():
    one = heads_of(2, 1, 160, 4, 2, 8)
    many = heads_of(2, 160, 160, 4, 2, 8)
    slots = (jnp.arange(160)[None] <= jnp.array([3, 159])[:, None])[:, None, None]
    steps = jnp.tril(jnp.ones((160, 160), bool))[None, None]
    ids = (documents(2, 160),) * 2
    ours, plain = (jax.jit(functools.partial(attend, implementation=name)) for name in ("splash", "xla"))
    for arrays, mask, segments in ((one, slots, None), (many, steps, ids)):
        y = ours(*arrays, mask, segments=segments)
        np.testing.assert_allclose(y, plain(*arrays, mask, segments=segments), atol=2e-6)
    assert calls_of_kernels(ours, *one) == 0
    assert calls_of_kernels(ours, *many) == 1


def test_a_decoder_with_the_kernel_generates_with_a_cache_anywhere():
    _, params = decoder_step("splash")
    tokens = jnp.arange(8, dtype=jnp.int32)[None]
    plain, ours = (Decoder(**SIZES, attention=attention) for attention in ("xla", "splash"))
    step = jax.jit(functools.partial(ours.apply, cache_length=160, mutable=["cache"]))
    np.testing.assert_allclose(step(params, tokens)[0], jax.jit(plain.apply)(params, tokens), atol=1e-5)


def test_images_are_seen_whole():
    model = vit("tiny-digits", attention="splash", image=(48, 48), patch=4)
    images = jnp.ones((1, 48, 48, 1))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    assert calls_of_kernels(model.apply, nn.unbox(shapes), images) == 1


def test_only_functions_that_ask_for_documents_get_them():
    asked = []

    def by_documents(query, key, value, *, mask, is_causal, segments=None):
        asked.append((mask, segments))
        return query

    def by_mask(query, key, value, *, mask, is_causal):
        asked.append((mask.shape, None))
        return query

    x, ids = jnp.ones((1, 4, 2, 4)), jnp.array([[0, 0, 1, 1]])
    attend(x, x, x, segments=(ids, ids), implementation=by_documents)
    attend(x, x, x, segments=(ids, ids), implementation=by_mask)
    assert asked == [(None, (ids, ids)), ((1, 1, 4, 4), None)]
    assert takes_segments(interpreted)
    layer = Attention(heads=2, kv_heads=2, head_dim=4, causal=True)
    x = jax.random.normal(jax.random.key(0), (1, 4, 8))
    y, params = jax.jit(layer.init_with_output)(jax.random.key(1), x, segments=(ids, ids))
    np.testing.assert_allclose(y[:, 2:], jax.jit(layer.apply)(params, x[:, 2:]), atol=1e-6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"block": (100, 128, 128)}, r"block must be .*multiples of 128.*got \(100, 128, 128\)"),
        ({"block": (128, 256, 384)}, "the third divides the second"),
        ({"backward": (128, 0, 128)}, "backward must be"),
        ({"segments": (jnp.zeros((1, 128)), jnp.zeros((1, 64)))}, r"keys \(1, 128\), got .*\(1, 64\)"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        splash_attention(*heads_of(1, 128, 128, 1, 1, 8), **change)


def test_sequences_over_several_devices_are_refused():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with (
        jax.set_mesh(mesh),
        nn.logical_axis_rules([("length", "data")]),
        pytest.raises(ValueError, match="the rules divide 'length' over data: map it to None"),
    ):
        jax.jit(interpreted)(*heads_of(1, 128, 128, 1, 1, 8))


def test_it_lowers_for_tpu_without_its_compiler():
    shapes = [jax.ShapeDtypeStruct((1, 2048, 2, 64), jnp.bfloat16)] * 3
    step = jax.grad(lambda *x: jnp.sum(attend(*x, causal=True, implementation="splash")))
    lowered = jax.export.export(jax.jit(step), platforms=["tpu"])(*shapes)
    assert lowered.mlir_module().count("stablehlo.custom_call @tpu_custom_call") == 2


STEP = """
import json, re
import flax.linen as nn, jax, jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from odjax.models import Decoder

devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
axes = ("data", "fsdp", "tensor")
mesh = jax.make_mesh((1, 4, 2), axes, axis_types=(AxisType.Auto,) * 3, devices=devices)
rules = [("batch", ("data", "fsdp")), ("embed", "fsdp"), ("vocab", "tensor")]
rules += [(name, "tensor") for name in ("heads", "kv_heads", "mlp", "act_heads", "act_kv_heads", "act_mlp")]
model = Decoder(
    vocab=256, layers=3, width=256, heads=4, kv_heads=2, head_dim=64, mlp_width=512, dtype=jnp.bfloat16,
    attention="splash", remat="attention",
)
tokens = jax.ShapeDtypeStruct((8, 384), jnp.int32, sharding=NamedSharding(mesh, P(("data", "fsdp"))))

def loss(params, tokens, segments):
    return jnp.mean(jnp.square(model.apply(params, tokens, segments)))

with jax.set_mesh(mesh), nn.logical_axis_rules(rules):
    boxed = jax.eval_shape(lambda tokens: model.init(jax.random.key(0), tokens), tokens)
    laid_out = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, rules)
    step = jax.jit(jax.grad(loss), in_shardings=(laid_out, tokens.sharding, tokens.sharding))
    text = step.lower(nn.unbox(boxed), tokens, tokens).compile().as_text()
calls = re.findall(r"%([a-z_]+)[.0-9]* = [^=]* custom-call\\(.*tpu_custom_call.*", text)
shapes = re.findall(r"(bf16[^{]*).*?tpu_custom_call", text)
print(json.dumps({"kernels": sorted(calls), "shapes": shapes}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not aot.is_available(), reason="libtpu is not installed (pip install 'odjax[aot]')")
def test_a_scanned_step_on_a_mesh_compiles_for_tpu_with_each_kernel_once():
    report = json.loads(aot.run_script(STEP).splitlines()[-1])
    # Every device has two rows of eight, and two heads of four; the gradients of queries are one array for
    # each block of keys.
    assert report["kernels"] == [
        "splash_mha_dkv_segmented_no_residuals",
        "splash_mha_fwd_segmented_residuals",
    ]
    assert sorted(report["shapes"]) == ["bf16[2,1,2,384,64]", "bf16[2,2,384,64]"]
