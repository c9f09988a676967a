"""Names and layouts of PyTorch's tensors and of Flax's parameters: exact inverses, and errors that list all."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import leaves_with_paths
from odjax.io import (
    BERT,
    BERT_CLASSIFIER,
    DINOV2,
    LLAMA,
    VIT,
    VIT_CLASSIFIER,
    Pair,
    PathMap,
    names_of,
    to_params,
    to_tensors,
    under,
)
from odjax.io.path_map import places_of_leaf
from odjax.lowrank import adapt
from odjax.models import Decoder, stack_layers, unstack_layers, vit
from odjax.models.bert import bert

TINY = {"vocab": 16, "layers": 2, "width": 8, "heads": 2, "kv_heads": 1, "head_dim": 6, "mlp_width": 12}

NAMES = PathMap(
    (
        Pair("emb", "table", "embedding"),
        Pair("blocks.{i}.{p:q|k}_proj", "blocks[i]/{p}"),
        Pair("blocks.{i}.out", "blocks[i]/out", inputs=2),
        Pair("blocks.{i}.c_attn", "blocks[i]/joint", "conv1d"),
        Pair("blocks.{i}.norm", "blocks[i]/norm", "norm"),
        Pair("blocks.{i}.scale", "blocks[i]/scale", "parameter"),
        Pair("conv.{n}", "conv_{n}", "conv"),
        Pair("cls_token", "cls", "parameter", ones=1),
    )
)
# Every leaf of an unrolled layer: shape in Flax, shape in PyTorch.
LEAVES = {
    "q/kernel": ((5, 2, 3), (6, 5)),
    "q/bias": ((2, 3), (6,)),
    "k/kernel": ((5, 4), (4, 5)),
    "out/kernel": ((2, 3, 5), (5, 6)),
    "out/bias": ((5,), (5,)),
    "joint/kernel": ((5, 7), (5, 7)),
    "norm/scale": ((5,), (5,)),
    "norm/bias": ((5,), (5,)),
    "scale": ((5,), (5,)),
}
TORCH = {
    "q": "q_proj",
    "k": "k_proj",
    "out": "out",
    "joint": "c_attn",
    "norm": "norm",
    "scale": "scale",
}
DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int8]


def nested(leaves):
    tree = {}
    for path, leaf in leaves.items():
        *folders, name = path.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[name] = leaf
    return tree


@st.composite
def trees(draw):
    """Parameters of a model with a stack, scanned or not, every leaf of a dtype of its own and any bits."""
    layers, scanned = draw(st.integers(1, 3)), draw(st.booleans())
    random = np.random.default_rng(draw(st.integers(0, 2**32)))

    def leaf(shape):
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        return np.frombuffer(random.bytes(int(np.prod(shape)) * dtype.itemsize), dtype).reshape(shape)

    leaves = {"table/embedding": leaf((3, 5)), "cls": leaf((1, 5)), "conv_a/kernel": leaf((3, 2, 4, 6))}
    for path, (shape, _) in LEAVES.items():
        if scanned:
            leaves[f"blocks/{path}"] = leaf((layers, *shape))
        else:
            leaves |= {f"blocks_{i}/{path}": leaf(shape) for i in range(layers)}
    return nested(leaves), layers


def assert_same_bits(found, expected):
    found, expected = dict(leaves_with_paths(found)), dict(leaves_with_paths(expected))
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert np.ascontiguousarray(found[path]).tobytes() == np.ascontiguousarray(leaf).tobytes(), path


@given(trees())
def test_parameters_come_back_bit_for_bit_and_tensors_too(tree):
    params, layers = tree
    tensors = to_tensors(params, NAMES)
    for i in range(layers):
        for path, (_, shape) in LEAVES.items():
            module, _, leaf = path.partition("/")
            end = "." + {"kernel": "weight", "scale": "weight"}.get(leaf, leaf) if leaf else ""
            assert tensors[f"blocks.{i}.{TORCH[module]}{end}"].shape == shape
    assert tensors["cls_token"].shape == (1, 1, 5)
    assert tensors["conv.a.weight"].shape == (6, 4, 3, 2)
    again = to_params(tensors, NAMES, params)
    assert_same_bits(again, params)
    assert_same_bits(to_tensors(again, NAMES), tensors)


def test_a_linear_layer_computes_the_same_in_both_layouts():
    random = np.random.default_rng(0)
    x, weight, bias = (random.normal(size=shape) for shape in ((4, 5), (6, 5), (6,)))
    like = {
        "table": {"embedding": np.zeros((1, 1))},
        "blocks_0": {"q": {"kernel": np.zeros((5, 2, 3)), "bias": np.zeros((2, 3))}},
    }
    tensors = {"blocks.0.q_proj.weight": weight, "blocks.0.q_proj.bias": bias, "emb.weight": np.ones((1, 1))}
    q = to_params(tensors, NAMES, like)["blocks_0"]["q"]
    # PyTorch's view(4, 2, 3) of x W^T + b.
    np.testing.assert_allclose(
        np.einsum("bi,ihd->bhd", x, q["kernel"]) + q["bias"], (x @ weight.T + bias).reshape(4, 2, 3)
    )


def test_a_convolution_computes_the_same_in_both_layouts():
    random = np.random.default_rng(0)
    weight, x = random.normal(size=(6, 4, 3, 2)), random.normal(size=(1, 5, 5, 4))
    kernel = to_params({"conv.a.weight": weight}, NAMES, {"conv_a": {"kernel": np.zeros((3, 2, 4, 6))}})[
        "conv_a"
    ]["kernel"]
    y = nn.Conv(6, (3, 2), padding="VALID", use_bias=False).apply(
        {"params": {"kernel": jnp.asarray(kernel, jnp.float32)}}, jnp.asarray(x, jnp.float32)
    )
    # Cross-correlation by its definition, channels first.
    expected = sum(weight[:, :, a, b] @ x[0, 1 + a, 2 + b] for a in range(3) for b in range(2))
    np.testing.assert_allclose(y[0, 1, 2], expected, atol=1e-5)


def decoder_params(**more):
    model = Decoder(**TINY, **more)
    return nn.unbox(jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 3), jnp.int32)))["params"]


def test_a_decoder_has_the_names_of_llama_scanned_or_not():
    params = decoder_params(qk_norm=True)
    tensors = to_tensors(params, LLAMA)
    attn = [f"self_attn.{p}" for p in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")]
    mlp = [f"mlp.{p}_proj" for p in ("gate", "up", "down")]
    layer = ["input_layernorm", "post_attention_layernorm", *attn, *mlp]
    assert set(tensors) == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
        *(f"model.layers.{i}.{name}.weight" for i in range(2) for name in layer),
    }
    unrolled = unstack_layers(params)
    assert_same_bits(to_tensors(unrolled, LLAMA), tensors)
    assert_same_bits(to_params(tensors, LLAMA, unrolled), unrolled)
    assert_same_bits(stack_layers(to_params(tensors, LLAMA, unrolled)), params)


def test_axis_names_stay_around_the_leaves():
    boxed = jax.eval_shape(Decoder(**TINY).init, jax.random.key(0), jnp.zeros((1, 3), jnp.int32))["params"]
    params = to_params(to_tensors(decoder_params(), LLAMA), LLAMA, boxed)
    assert params["layers"]["attn"]["q"]["kernel"].names == ("layers", "embed", "heads", "head_dim")
    assert isinstance(params["layers"]["attn"]["q"]["kernel"].value, np.ndarray)


def test_every_fault_is_in_the_error():
    params = decoder_params()
    tensors = to_tensors(params, LLAMA)
    tensors["model.layers.0.rotary_emb.inv_freq"] = np.zeros(3)  # a buffer: ignored
    assert_same_bits(to_params(tensors, LLAMA, params), params)
    wrong = {**tensors, "visual.weight": np.zeros((2, 2)), "model.layers.0.mlp.extra": np.zeros(1)}
    with pytest.raises(
        ValueError, match=r"visual.weight \[2, 2\] has no place; model.layers.0.mlp.extra"
    ) as caught:
        to_params(wrong, LLAMA, params)
    assert "rotary" not in str(caught.value)
    short = {
        name: value
        for name, value in tensors.items()
        if "layers.1.mlp.up" not in name and "norm.w" not in name
    }
    with pytest.raises(ValueError, match="no tensor for: ") as caught:
        to_params(short, LLAMA, params)
    for path in ("layers/mlp/up/kernel (layers [1] missing", "norm/scale"):
        assert path in str(caught.value)
    turned = tensors | {
        "model.layers.1.self_attn.q_proj.weight": tensors["model.layers.1.self_attn.q_proj.weight"].T
    }
    with pytest.raises(
        ValueError, match=r"q_proj.weight \[8, 12\] does not fit layers/attn/q/kernel layer 1 \[8, 2, 6\]"
    ):
        to_params(turned, LLAMA, params)
    deeper = tensors | {"model.layers.2.mlp.up_proj.weight": tensors["model.layers.1.mlp.up_proj.weight"]}
    with pytest.raises(ValueError, match=r"layers/mlp/up/kernel \(layers \[\] missing, \[2\] too many"):
        to_params(deeper, LLAMA, params)


def test_leaves_that_may_stay_are_asked_for_by_pattern():
    params = decoder_params()
    tensors = {name: tensor for name, tensor in to_tensors(params, LLAMA).items() if name != "lm_head.weight"}
    other = jax.tree.map(jnp.zeros_like, params)
    for keep in ("lm_head/.*", lambda path, leaf: path == "lm_head/kernel" and leaf.shape == (8, 16)):
        found = to_params(tensors, LLAMA, other, keep=keep)
        assert not np.any(found["lm_head"]["kernel"])
        assert_same_bits(found["layers"], params["layers"])
    with pytest.raises(ValueError, match="no tensor for: lm_head/kernel"):
        to_params(tensors, LLAMA, other)


def test_parameters_without_a_name_are_all_listed():
    with pytest.raises(ValueError, match=r"a/kernel \[2, 3\] has no name; b \[1\] has no name"):
        to_tensors({"a": {"kernel": np.zeros((2, 3))}, "b": np.zeros(1)}, LLAMA)


def test_names_that_fit_two_pairs_are_refused():
    double = PathMap((Pair("a.{x}", "a_{x}"), Pair("a.b", "a_b")))
    with pytest.raises(ValueError, match="two pairs"):
        to_tensors({"a_b": {"kernel": np.zeros((2, 3))}}, double)
    with pytest.raises(ValueError, match="a.b.weight has the places a_b/kernel, a_b/kernel"):
        to_params({"a.b.weight": np.zeros((3, 2))}, double, {"a_b": {"kernel": np.zeros((2, 3))}})
    same = PathMap((Pair("a", "x"), Pair("a", "y")))
    with pytest.raises(ValueError, match="y/kernel has a name that is taken, a.weight"):
        to_tensors({"x": {"kernel": np.zeros((2, 3))}, "y": {"kernel": np.zeros((2, 3))}}, same)
    merged = PathMap((Pair("a", "x"), Pair("b", "x")))
    both = {"a.weight": np.zeros((3, 2)), "b.weight": np.zeros((3, 2))}
    with pytest.raises(ValueError, match="b.weight and a.weight are both for x/kernel"):
        to_params(both, merged, {"x": {"kernel": np.zeros((2, 3))}})


def test_a_prefix_is_added_to_every_name():
    tensors = to_tensors({"norm": {"scale": np.ones(2)}}, under(LLAMA, "student."))
    assert list(tensors) == ["student.model.norm.weight"]
    assert under(LLAMA, "a.").ignore == (r"a\..*\.rotary_emb\.inv_freq",)


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (Pair("a", "b", "dense"), "kind of 'a' must be one of linear"),
        (Pair("a.{i}", "b"), "must have the same placeholders"),
        (Pair("a.{i}.{i}", "b_{i}"), "must have the same placeholders, each once"),
        (Pair("a.{i}.{j}", "b[i]/c[j]"), "more than one stack"),
    ],
)
def test_a_map_that_cannot_be_inverted_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        PathMap((pair,))


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (Decoder(**TINY), LLAMA),
        (adapt(Decoder(**TINY)), LLAMA),
        (bert("tiny"), BERT),
        (bert("tiny", classes=2), BERT_CLASSIFIER),
        (vit("tiny-digits"), VIT),
        (vit("tiny-digits", classes=10), VIT_CLASSIFIER),
        (vit("tiny-digits", layer_scale=1.0), DINOV2),
    ],
)
def test_every_parameter_of_our_models_has_a_name(model, expected):
    assert names_of(model) == expected
    bare = getattr(model, "inner", model)
    images = isinstance(bare, type(vit("tiny-digits")))
    x = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32) if images else jax.ShapeDtypeStruct((1, 3), jnp.int32)
    for path, leaf in leaves_with_paths(jax.eval_shape(bare.init, jax.random.key(0), x)["params"]):
        assert places_of_leaf(expected, path, leaf.shape), path


def test_a_model_without_names_asks_for_a_map():
    with pytest.raises(ValueError, match="no names for Dense: write an odjax.io.PathMap"):
        names_of(nn.Dense(3))
