"""Links into and out of dead neurons."""

import functools

import flax.linen as nn
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given

from odjax.core import leaves_with_paths, unbox
from odjax.models import MLP, Bert, Decoder, EncoderDecoder, ViT
from odjax.sparse.percolation import live_units, percolate
from odjax.sparse.wiring import Ends, Junction, restrict_wiring, wiring_of

seeds = st.integers(0, 2**32 - 1)

WIDTHS = (5, 6, 7, 4, 3)
CHAIN = tuple(Junction((Ends(f"w{i}", (-1,)),), (Ends(f"w{i + 1}", (-2,)),)) for i in range(len(WIDTHS) - 2))
# A gated layer whose gate is fed by a chain: a dead `up` reaches back to the layer before the gate.
REACHING_BACK = (
    Junction((Ends("w0", (1,)),), (Ends("w1", (0,)),)),
    Junction((Ends("w1", (1,)), Ends("up", (1,))), (Ends("w2", (0,)),)),
)

DECODER = Decoder(vocab=16, layers=2, width=8, heads=4, kv_heads=2, head_dim=4, mlp_width=12, max_length=8)
VIT = ViT(
    image=(4, 4),
    patch=2,
    layers=1,
    width=8,
    heads=2,
    mlp_width=12,
    channels=1,
    activation="swiglu",
    scan=False,
)


def random_masks(shapes, seed, density=None):
    rng = np.random.default_rng(seed)
    density = rng.random() if density is None else density
    return {path: rng.random(shape) < density for path, shape in shapes.items()}


def chain(seed, stacked=()):
    return random_masks(
        {f"w{i}": (*stacked, *WIDTHS[i : i + 2]) for i in range(len(WIDTHS) - 1)}, seed, density=0.25
    )


@functools.cache
def compiled(wiring):
    return jax.jit(lambda masks: percolate(masks, wiring))


def run(masks, wiring):
    return {path: np.asarray(mask) for path, mask in compiled(wiring)(masks).items()}


def to_the_end(masks: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The definition for a chain of matrices: drop one neuron's links at a time until none is dead."""
    masks = {path: mask.copy() for path, mask in masks.items()}
    while True:
        before = sum(mask.sum() for mask in masks.values())
        for i in range(len(masks) - 1):
            first, second = masks[f"w{i}"], masks[f"w{i + 1}"]
            for j in range(first.shape[1]):
                if not first[:, j].any() or not second[j].any():
                    first[:, j] = second[j] = False
        if sum(mask.sum() for mask in masks.values()) == before:
            return masks


def shapes_of(model, *inputs):
    params = unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    return {path: leaf.shape for path, leaf in leaves_with_paths(params)}


@given(seed=seeds)
def test_two_sweeps_reach_the_fixed_point_of_a_chain(seed):
    masks = chain(seed)
    got, want = run(masks, CHAIN), to_the_end(masks)
    for path in masks:
        np.testing.assert_array_equal(got[path], want[path])


@given(seed=seeds)
def test_percolation_only_removes_is_idempotent_and_leaves_units_with_links_on_all_sides_or_none(seed):
    shapes = {path: shape for path, shape in DECODER_SHAPES.items() if path.startswith("layers")}
    for wiring in (wiring_of(DECODER), wiring_of(DECODER, exact=False)):
        names = {ends.path for junction in wiring for ends in junction.inputs + junction.outputs}
        masks = random_masks({path: shapes[path] for path in sorted(names)}, seed)
        got = run(masks, wiring)
        again = run(got, wiring)
        for path, mask in masks.items():
            assert not (got[path] & ~mask).any()
            np.testing.assert_array_equal(again[path], got[path])
        for junction, live in zip(wiring, live_units(got, wiring), strict=True):
            for ends in junction.inputs + junction.outputs:
                alone = live_units(got, (Junction((ends,)),))[0]
                np.testing.assert_array_equal(alone, live)


@given(seed=seeds)
def test_a_wiring_that_reaches_back_is_swept_until_nothing_changes(seed):
    masks = random_masks({"w0": (3, 4), "w1": (4, 4), "up": (3, 4), "w2": (4, 3)}, seed, density=0.3)
    got = run(masks, REACHING_BACK)
    one, two = (np.asarray(units) for units in live_units(got, REACHING_BACK))
    for path, axis, live in (("w0", 0, one), ("w1", 1, one), ("w1", 0, two), ("up", 0, two), ("w2", 1, two)):
        np.testing.assert_array_equal(got[path].any(axis), live)


def test_dead_ends_run_through_the_whole_chain_both_ways():
    line = {f"w{i}": np.zeros((2, 2), bool) for i in range(4)}
    for i in range(4):
        line[f"w{i}"][0, 0] = True  # one whole line,
        line[f"w{i}"][1, 1] = i != 3  # and one that goes nowhere
    assert [run(line, CHAIN)[f"w{i}"].tolist() for i in range(4)] == [[[True, False], [False, False]]] * 4
    backwards = {f"w{3 - i}": mask for i, mask in enumerate(line.values())}
    assert [run(backwards, CHAIN)[f"w{i}"].tolist() for i in range(4)] == [
        [[True, False], [False, False]]
    ] * 4


def test_stacked_layers_percolate_each_for_itself():
    stacked = tuple(
        Junction(
            *(
                tuple(ends._replace(stacked=1) for ends in side)
                for side in (junction.inputs, junction.outputs)
            )
        )
        for junction in CHAIN
    )
    masks = chain(3, stacked=(3,))
    got = run(masks, stacked)
    for layer in range(3):
        want = to_the_end({path: mask[layer] for path, mask in masks.items()})
        for path in masks:
            np.testing.assert_array_equal(got[path][layer], want[path])


def test_masks_in_shards_percolate_as_on_one_device_and_are_not_gathered():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    wiring = (
        Junction((Ends("a", (1,)),), (Ends("b", (0,)),)),
        Junction((Ends("b", (1,)),), (Ends("c", (0,)),)),
    )
    masks = random_masks({"a": (16, 24), "b": (24, 32), "c": (32, 16)}, 5, density=0.06)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data", None))
    placed = jax.device_put(masks, rows)
    fn = jax.jit(lambda masks: percolate(masks, wiring), out_shardings=rows)
    executable = fn.lower(placed).compile()
    gathered = [line for line in executable.as_text().splitlines() if " all-gather(" in line]
    assert not [line for line in gathered if "[16,24]" in line or "[24,32]" in line or "[32,16]" in line]
    want = run(masks, wiring)
    for path, mask in executable(placed).items():
        np.testing.assert_array_equal(mask, want[path])
        assert want[path].sum() < masks[path].sum()


def masked(params, masks, folded=None):
    """Parameters with 0 off the masks, and with constants added to some of them."""

    def one(path, leaf):
        leaf = np.where(masks[path], leaf, np.float32(0)) if path in masks else leaf
        return leaf + folded[path] if folded and path in folded else leaf

    flat = {path: one(path, leaf) for path, leaf in leaves_with_paths(params)}
    return jax.tree.structure(params).unflatten(list(flat.values()))


def nonzero_params(model, *inputs):
    """Parameters in which nothing is zero, biases least of all."""
    rng = np.random.default_rng(7)
    shapes = unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"])
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32) / 2, shapes)


DECODER_SHAPES = shapes_of(DECODER, jnp.zeros((1, 4), jnp.int32))


def wired_masks(wiring, shapes, density, seed):
    names = sorted({ends.path for junction in wiring for ends in junction.inputs + junction.outputs})
    return random_masks({path: shapes[path] for path in names}, seed, density)


def test_a_decoder_computes_the_same_without_the_dropped_links():
    tokens = jnp.arange(6)[None] % 5
    params = nonzero_params(DECODER, tokens)
    wiring = wiring_of(DECODER)
    masks = wired_masks(wiring, DECODER_SHAPES, 0.5, seed=0)
    q, k, v, o = (masks[f"layers/attn/{name}/kernel"] for name in "qkvo")
    gate, up, down = (masks[f"layers/mlp/{name}/kernel"] for name in ("gate", "up", "down"))
    k[:, :, 0, 0::2] = q[:, :, 2:, 1::2] = v[:, :, 0, 1] = o[:, 2:, 3] = False
    k[:, :, 0, 1] = gate[:, :, 0] = up[:, :, 1] = down[:, 2] = False
    after = run(masks, wiring)
    for kernel in ("attn/q", "attn/k", "attn/v", "attn/o", "mlp/gate", "mlp/up", "mlp/down"):
        path = f"layers/{kernel}/kernel"
        assert after[path].sum() < masks[path].sum(), path
    apply = jax.jit(lambda params: DECODER.apply({"params": params}, tokens))
    want = apply(masked(params, masks))
    np.testing.assert_allclose(apply(masked(params, after)), want, rtol=1e-4, atol=1e-5)
    # The rule as published takes dimensions of a head apart that rotary positions mix.
    published = run(masks, wiring_of(DECODER, exact=False))
    assert not np.allclose(apply(masked(params, published)), want, rtol=1e-2, atol=1e-2)


def test_an_mlp_computes_the_same_once_constants_are_folded():
    model = MLP((6, 7, 5, 3), activation="tanh")
    x = jnp.linspace(-1, 1, 12).reshape(3, 4)
    params = nonzero_params(model, x)
    wiring = wiring_of(model)
    masks = wired_masks(wiring, shapes_of(model, x), 0.25, seed=1)
    after = run(masks, wiring)
    folded, constant = {}, np.zeros(4)
    for i in range(4):
        dropped = masks[f"dense_{i}/kernel"] & ~after[f"dense_{i}/kernel"]
        layer = params[f"dense_{i}"]
        folded[f"dense_{i}/bias"] = jnp.asarray(
            constant @ (np.asarray(layer["kernel"]) * dropped), jnp.float32
        )
        constant = np.tanh(np.asarray(layer["bias"] + folded[f"dense_{i}/bias"]))
        # What a neuron with links gives is no constant, but none of its links into live neurons was dropped.
    apply = jax.jit(lambda params: model.apply({"params": params}, x))
    assert sum(mask.sum() for mask in after.values()) < sum(mask.sum() for mask in masks.values())
    np.testing.assert_allclose(
        apply(masked(params, after, folded)), apply(masked(params, masks)), rtol=1e-5, atol=1e-5
    )


def test_a_vision_transformer_with_biases_computes_the_same_once_constants_are_folded():
    images = jnp.linspace(-1, 1, 32).reshape(2, 4, 4, 1)
    params = nonzero_params(VIT, images)
    wiring = wiring_of(VIT)
    masks = wired_masks(wiring, shapes_of(VIT, images), 0.5, seed=2)
    masks["layers_0/attn/v/kernel"][:, 0, 1] = masks["layers_0/attn/o/kernel"][1, 2] = False
    masks["layers_0/mlp/gate/kernel"][:, 3:5] = masks["layers_0/mlp/up/kernel"][:, 4:6] = False
    after = run(masks, wiring)
    layer = params["layers_0"]
    dropped = {path: (masks[path] & ~after[path]).astype(np.float32) for path in masks}
    value = np.einsum(
        "hd,hdw->w",
        layer["attn"]["v"]["bias"],
        layer["attn"]["o"]["kernel"] * dropped["layers_0/attn/o/kernel"],
    )
    gate = layer["mlp"]["gate"]["bias"]
    hidden = gate / (1 + np.exp(-gate)) * layer["mlp"]["up"]["bias"]
    down = hidden @ (layer["mlp"]["down"]["kernel"] * dropped["layers_0/mlp/down/kernel"])
    for kernel in ("attn/v", "attn/o", "mlp/down"):
        assert dropped[f"layers_0/{kernel}/kernel"].any(), kernel
    folded = {"layers_0/attn/o/bias": value, "layers_0/mlp/down/bias": down}
    apply = jax.jit(lambda params: VIT.apply({"params": params}, images))
    np.testing.assert_allclose(
        apply(masked(params, after, folded)), apply(masked(params, masks)), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("name", ["mlp", "decoder", "encoder_decoder", "vit", "bert"])
def test_the_wiring_of_every_model_fits_its_parameters(name, scan, exact):
    tokens = jnp.zeros((1, 4), jnp.int32)
    small = {"vocab": 8, "layers": 2, "width": 8, "heads": 2, "mlp_width": 12, "scan": scan}
    model, inputs = {
        "mlp": (MLP((6, 5, 3)), (jnp.zeros((1, 4)),)),
        "decoder": (Decoder(**small, kv_heads=1, max_length=8, qk_norm=not exact), (tokens,)),
        "encoder_decoder": (EncoderDecoder(**small), (tokens, tokens)),
        "vit": (VIT.clone(layers=2, scan=scan), (jnp.zeros((1, 4, 4, 1)),)),
        "bert": (Bert(**small, max_length=8), (tokens, tokens != 1)),
    }[name]
    wiring = wiring_of(model, exact=exact)
    shapes = shapes_of(model, *inputs)
    kernels = {path for path in shapes if path.endswith("kernel") and "layers" in path}
    if exact and name not in ("mlp", "decoder"):
        kernels = {path for path in kernels if "/q/" not in path and "/k/" not in path}
    named = {ends.path for junction in wiring for ends in junction.inputs + junction.outputs}
    assert named == (kernels or {f"dense_{i}/kernel" for i in range(3)})
    masks = {path: jax.ShapeDtypeStruct(shapes[path], jnp.bool_) for path in named}
    out = jax.eval_shape(lambda masks: percolate(masks, wiring), masks)
    assert {path: mask.shape for path, mask in out.items()} == {path: shapes[path] for path in named}


def test_normalized_queries_are_not_taken_apart():
    model = DECODER.clone(qk_norm=True)
    names = [ends.path for junction in wiring_of(model) for ends in junction.inputs]
    assert "layers/attn/q/kernel" not in names
    assert "layers/attn/v/kernel" in names


def test_a_dense_leaf_is_left_out_of_the_wiring():
    whole = tuple(junction._replace(cut=None) for junction in wiring_of(DECODER))
    left = {"layers": {"attn": {"q": {"kernel": 1}, "v": {"kernel": 1}, "o": {"kernel": 1}}, "mlp": None}}
    assert restrict_wiring(whole, left) == (whole[1],)
    gated = {"layers/mlp/up/kernel": 1, "layers/mlp/down/kernel": 1}
    assert restrict_wiring(whole, gated) == (whole[2]._replace(inputs=whole[2].inputs[1:]),)
    both = {"layers/mlp/up/kernel": 1, "layers/mlp/gate/kernel": 1}
    assert restrict_wiring(whole, both) == (whole[2]._replace(outputs=()),)
    # In a sum a dense input feeds every neuron: nothing dies.
    summed = (whole[2]._replace(product=False),)
    assert restrict_wiring(summed, gated) == ()


def test_leaves_outside_of_the_wiring_and_the_structure_of_the_tree_stay():
    masks = {"w0": jnp.ones((2, 2), bool), "w1": jnp.zeros((2, 2), bool), "other": [jnp.ones(3, bool), None]}
    got = percolate(masks, CHAIN[:1])
    assert jax.tree.structure(got) == jax.tree.structure(masks)
    assert got["other"][0] is masks["other"][0]
    assert not got["w0"].any()


def test_bad_input_is_named():
    masks = {"w0": jnp.ones((2, 3), bool), "w1": jnp.ones((4, 2), bool)}
    with pytest.raises(
        ValueError, match=r"names 'w1', which has no mask \(there are 'w0'\); restrict_wiring"
    ):
        percolate({"w0": masks["w0"]}, CHAIN[:1])
    with pytest.raises(ValueError, match=r"junction 0 .* units differ: 'w0' has \[3\], 'w1' has \[4\]"):
        percolate(masks, CHAIN[:1])
    with pytest.raises(TypeError, match="mask of 'w0' must be bool, got float32: type mask != 0"):
        percolate({**masks, "w0": jnp.ones((2, 3))}, CHAIN[:1])
    for axes, stacked in (((2,), 0), ((), 0), ((1, 0), 0), ((0,), 1), ((0, 1), 0)):
        with pytest.raises(
            ValueError, match=r"are not the neurons of 'w0' \[2, 3\]: name them in increasing"
        ):
            live_units(masks, (Junction((Ends("w0", axes, stacked),)),))
    for split, shared in (((2, 2), (1,)), ((3,), (1,))):
        with pytest.raises(ValueError, match=r"is not a view of the \[3\] neurons of 'w0'"):
            live_units(masks, (Junction((Ends("w0", (1,), 0, split, shared),)),))
    with pytest.raises(ValueError, match="junction 0 of the wiring has no inputs"):
        percolate(masks, (Junction((), (Ends("w1", (0,)),)),))
    with pytest.raises(TypeError, match="knows MLP, Decoder, EncoderDecoder, ViT and Bert, got Dense"):
        wiring_of(nn.Dense(3))
