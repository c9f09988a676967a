"""BERT as a function: a reference in NumPy, masks, pooling, adapters, meshes, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import leaves_with_paths, partition
from odjax.heads.ggem import GGeM, ggem_pool
from odjax.heads.pooling import token_pooling
from odjax.lowrank import FACTORS, adapt, init_factors, merge
from odjax.models import PARAMETER_AXES, unstack_layers
from odjax.models.bert import Bert, bert

from . import golden

SIZES = {"vocab": 32, "layers": 2, "width": 16, "heads": 4, "mlp_width": 24, "max_length": 12}
LENGTHS = (7, 3, 5, 1, 6, 2, 4, 7)


def perturbed(model, *inputs):
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))["params"]
    noise = np.random.default_rng(1)
    return jax.tree.map(lambda p: jnp.asarray(p + 0.2 * noise.normal(size=p.shape), p.dtype), params)


@pytest.fixture(scope="module")
def texts():
    """Tokens, mask and types [8, 7] of texts of several lengths."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 32, size=(8, 7)).astype(np.int32)
    mask = np.arange(7)[None] < np.asarray(LENGTHS)[:, None]
    types = (np.arange(7)[None] >= np.asarray(LENGTHS)[:, None] // 2).astype(np.int32)
    return jnp.asarray(tokens), jnp.asarray(mask), jnp.asarray(types)


@pytest.fixture(scope="module")
def params(texts):
    return perturbed(Bert(**SIZES, pooling="pooler", classes=3), *texts)


def body(params):
    return {name: leaf for name, leaf in params.items() if name not in ("pooler", "head")}


@pytest.fixture(scope="module")
def features(texts, params):
    return apply(Bert(**SIZES), body(params), *texts, method="features")


def apply(model, params, *inputs, **more):
    return jax.jit(functools.partial(model.apply, **more))({"params": params}, *inputs)


def reference(params, tokens, mask, types):
    """The equations of a post-normalized encoder in float64, from unrolled parameters."""
    norm = functools.partial(golden.layer_norm, eps=1e-12)
    x = params["embed"]["embedding"][tokens] + params["positions"]["embedding"][: tokens.shape[1]]
    x = norm(x + params["types"]["embedding"][types], **params["embed_norm"])
    for i in range(sum(name.startswith("layers_") for name in params)):
        p = params[f"layers_{i}"]
        q, k, v = (golden.project(x, p["attn"][name]) for name in "qkv")
        h = golden.merge_heads(golden.attention(q, k, v, mask[:, None, :]), p["attn"]["o"])
        x = norm(x + h, **p["attn_norm"])
        h = golden.dense(golden.gelu(golden.dense(x, p["mlp"]["up"])), p["mlp"]["down"])
        x = norm(x + h, **p["mlp_norm"])
    return x


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def test_features_logits_and_sentences_follow_their_equations(texts, params, features):
    tokens, mask, types = (np.asarray(leaf) for leaf in texts)
    exact = float64(unstack_layers(params))
    expected = reference(exact, tokens, mask, types)
    np.testing.assert_allclose(np.asarray(features)[mask], expected[mask], rtol=1e-4, atol=2e-5)

    pooled = np.tanh(golden.dense(expected[:, 0], exact["pooler"]))
    logits = apply(Bert(**SIZES, pooling="pooler", classes=3), params, *texts)
    np.testing.assert_allclose(logits, golden.dense(pooled, exact["head"]), rtol=1e-4, atol=2e-5)

    mean = np.stack([x[kept].mean(0) for x, kept in zip(expected, mask, strict=True)])
    np.testing.assert_allclose(apply(Bert(**SIZES), body(params), *texts), mean, rtol=1e-4, atol=2e-5)
    vectors = apply(Bert(**SIZES), body(params), *texts, method="embed_sentences")
    expected = mean / np.linalg.norm(mean, axis=1, keepdims=True)
    np.testing.assert_allclose(vectors, expected, rtol=1e-4, atol=2e-5)


def test_what_lies_at_padding_changes_nothing(texts, params):
    tokens, mask, types = texts
    other = jnp.where(mask, tokens, 31 - tokens)
    got = [
        apply(Bert(**SIZES), body(params), t, m, s, method="embed_sentences")
        for t, m, s in ((tokens, mask, types), (other, mask.astype(jnp.int32), jnp.where(mask, types, 0)))
    ]
    np.testing.assert_array_equal(*got)


def test_a_shorter_batch_gives_the_same_vectors(texts, params):
    tokens, mask, _ = texts
    longer = apply(Bert(**SIZES), body(params), tokens, mask, method="embed_sentences")
    # Row 1 has three tokens: alone it needs neither padding nor a mask.
    alone = apply(Bert(**SIZES), body(params), tokens[1:2, :3], method="embed_sentences")
    np.testing.assert_allclose(alone[0], longer[1], atol=1e-6)


def test_a_text_without_a_token_is_a_vector_of_zeros_with_finite_gradients(texts, params):
    tokens, mask, _ = texts
    mask = mask.at[0].set(False)

    def total(p):
        return jnp.sum(Bert(**SIZES).apply({"params": p}, tokens, mask, method="embed_sentences"))

    vectors = apply(Bert(**SIZES), body(params), tokens, mask, method="embed_sentences")
    np.testing.assert_array_equal(vectors[0], np.zeros(16))
    for path, gradient in leaves_with_paths(jax.jit(jax.grad(total))(body(params))):
        assert np.isfinite(gradient).all(), path


def test_unrolled_layers_compute_the_same_as_scanned_ones(texts, params, features):
    unrolled = Bert(**SIZES, scan=False, remat="full")
    got = apply(unrolled, unstack_layers(body(params)), *texts, method="features")
    np.testing.assert_allclose(got, features, atol=1e-6)


def test_pooling_takes_the_mean_or_the_first_token(texts, params, features):
    mean, cls = (apply(Bert(**SIZES, pooling=p), body(params), *texts) for p in ("mean", "cls"))
    np.testing.assert_array_equal(cls, features[:, 0])
    np.testing.assert_allclose(mean[3], features[3, 0], atol=1e-6)  # one token
    np.testing.assert_allclose(mean[0], jnp.mean(features[0], 0), atol=1e-6)


def test_a_module_pools_the_tokens_of_the_mask_and_the_head_follows(texts, params, features):
    mask, pooling = texts[1], token_pooling("ggem", num_groups=4)
    p = jnp.array([0.5, 1.0, 3.0, 8.0])
    kernel = jax.random.normal(jax.random.key(1), (16, 3))
    trained = {**body(params), "pooling": {"p": p}, "head": {"kernel": kernel, "bias": jnp.zeros(3)}}
    got = apply(Bert(**SIZES, pooling=pooling, classes=3), trained, *texts)
    pooled = ggem_pool(features, p, mask=mask)
    np.testing.assert_allclose(got, pooled @ kernel, rtol=1e-4, atol=1e-5)
    shapes = jax.eval_shape(Bert(**SIZES, pooling=pooling, classes=3).init, jax.random.key(0), *texts)
    assert jax.tree.map(jnp.shape, nn.unbox(shapes)["params"]) == jax.tree.map(jnp.shape, trained)
    # Without a mask all tokens count; a mask of 0 and 1 is one of bool.
    bare = {**body(params), "pooling": {"p": p}}
    model = Bert(**SIZES, pooling=pooling)
    np.testing.assert_allclose(
        apply(model, bare, features, method="pooled"), ggem_pool(features, p), rtol=1e-5
    )
    np.testing.assert_array_equal(
        apply(model, bare, features, mask.astype(jnp.int32), method="pooled"),
        apply(model, bare, features, mask, method="pooled"),
    )


@pytest.mark.parametrize("name", ["mean", "cls"])
def test_a_module_of_a_name_pools_like_the_name(texts, params, name):
    got, expected = (
        apply(Bert(**SIZES, pooling=pooling), body(params), *texts) for pooling in (token_pooling(name), name)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("pooling", [GGeM, ggem_pool, None])
def test_a_pooling_that_is_no_module_is_refused_at_construction(pooling):
    message = r"must be one of mean, cls, pooler, or a module called as pooling\(tokens, cls=, mask=\), got"
    with pytest.raises(TypeError, match=message):
        Bert(**SIZES, pooling=pooling)


def test_a_new_head_predicts_every_class_alike(texts):
    logits, _ = Bert(**SIZES, classes=3).init_with_output(jax.random.key(0), *texts)
    np.testing.assert_array_equal(logits, np.zeros((8, 3)))


def test_bf16_computation_is_close_and_returns_float32(texts, params):
    sizes = {**SIZES, "pooling": "pooler", "classes": 3}
    exact = apply(Bert(**sizes), params, *texts)
    half = apply(Bert(**sizes, dtype=jnp.bfloat16), params, *texts)
    assert half.dtype == jnp.float32
    assert np.abs(half - exact).max() < 8 * 2**-8 * np.abs(exact).max()
    features = apply(Bert(**SIZES, dtype=jnp.bfloat16), body(params), *texts, method="features")
    assert features.dtype == jnp.bfloat16


def test_dropout_is_off_without_training(texts, params):
    model = Bert(**SIZES, pooling="pooler", classes=3, dropout=0.5)
    plain = apply(model.clone(dropout=0.0), params, *texts)
    np.testing.assert_array_equal(apply(model, params, *texts), plain)
    keys = {"dropout": jax.random.key(1)}
    assert not np.allclose(model.apply({"params": params}, *texts, train=True, rngs=keys), plain)


@pytest.mark.parametrize(
    "preset, published",
    # BertModel with its pooler as released: bert-base-uncased, all-MiniLM-L6-v2.
    [("bert-base", 109_482_240), ("minilm-l6", 22_713_216)],
)
def test_presets_have_the_sizes_of_the_published_models(preset, published):
    model = bert(preset, pooling="pooler")
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == published


def test_every_axis_of_every_parameter_has_a_name_or_none(texts):
    model = Bert(**SIZES, pooling="pooler", classes=3)
    variables = jax.eval_shape(model.init, jax.random.key(0), *texts)
    for box in jax.tree.leaves(variables, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)):
        assert isinstance(box, nn.LogicallyPartitioned)
        assert len(box.names) == box.value.ndim
        assert set(box.names) <= {*PARAMETER_AXES, None}


def test_adapters_reach_every_matrix_and_table_and_merge(texts, params):
    where = r"(embed|positions|types)/embedding|layers/(attn|mlp)/\w+/kernel|(pooler|head)/kernel"
    bare = Bert(**SIZES, pooling="pooler", classes=3)
    model = adapt(bare, rank=2, where=where)
    new = init_factors(model, params, jax.random.key(1), *texts)
    np.testing.assert_array_equal(apply(model, new, *texts), apply(bare, params, *texts))
    factors, _ = partition(new, FACTORS)
    adapted = {path.rsplit("/", 1)[0] for path, leaf in leaves_with_paths(factors) if leaf is not None}
    layers = {f"layers/attn/{name}" for name in "qkvo"} | {"layers/mlp/up", "layers/mlp/down"}
    assert adapted == layers | {"embed", "positions", "types", "pooler", "head"}
    noise = np.random.default_rng(2)
    moved = {
        path: jnp.asarray(0.1 * noise.normal(size=leaf.shape), leaf.dtype)
        for path, leaf in leaves_with_paths(factors)
        if leaf is not None
    }
    new = jax.tree_util.tree_map_with_path(
        lambda path, leaf: moved.get("/".join(key.key for key in path), leaf), new
    )
    got = apply(model, new, *texts)
    assert not np.allclose(got, apply(bare, params, *texts), atol=0.05)
    np.testing.assert_allclose(got, apply(bare, merge(model, new), *texts), rtol=1e-4, atol=2e-5)


RULES = [
    ("batch", ("data", "fsdp")),
    ("embed", "fsdp"),
    ("vocab", "tensor"),
    ("heads", "tensor"),
    ("mlp", "tensor"),
    ("act_heads", "tensor"),
    ("act_mlp", "tensor"),
    ("act_vocab", "tensor"),
]


def losses_on(shape, boxed, texts, steps=3):
    """Losses of gradient descent on a mesh of a shape, and the parameters as they lie there."""
    devices = jax.devices()[: int(np.prod(shape))]
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3, devices=devices)
    model = Bert(**SIZES, classes=8)

    def loss(params, *texts):
        logits = jax.nn.log_softmax(model.apply({"params": params}, *texts))
        return -jnp.mean(jnp.diagonal(logits))

    def step(params, *texts):
        value, gradient = jax.value_and_grad(loss)(params, *texts)
        return value, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient)

    values = []
    with jax.set_mesh(mesh), nn.logical_axis_rules(RULES):
        layout = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
        params = jax.device_put(nn.unbox(boxed), layout)
        texts = jax.device_put(texts, NamedSharding(mesh, P(("data", "fsdp"))))
        run = jax.jit(step, out_shardings=(NamedSharding(mesh, P()), layout))
        for _ in range(steps):
            value, params = run(params, *texts)
            values.append(float(value))
    return values, params


def test_losses_do_not_depend_on_the_mesh(texts):
    model = Bert(**SIZES, classes=8)
    boxed = jax.jit(model.init)(jax.random.key(0), *texts)["params"]
    expected, _ = losses_on((1, 1, 1), boxed, texts)
    assert expected[-1] < expected[0]
    got, params = losses_on((2, 2, 2), boxed, texts)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    for name in ("attn/q", "attn/o", "mlp/up", "mlp/down"):
        kernel = functools.reduce(dict.__getitem__, name.split("/"), params["layers"])["kernel"]
        assert kernel.size == 4 * kernel.addressable_shards[0].data.size, name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"heads": 3}, "width must be a multiple of heads, got 16 and 3"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
        ({"pooling": "max"}, "pooling must be one of mean, cls, pooler, or a module, got 'max'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"activation": "gelu_new"}, "activation must be one of relu, gelu"),
        ({"remat": "all"}, "remat must be one of none"),
        ({"attention": "flash"}, "attention must be one of"),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused_at_construction(change, message):
    with pytest.raises(ValueError, match=message):
        Bert(**{**SIZES, **change})


@pytest.mark.parametrize(
    "inputs, message",
    [
        ((jnp.zeros((1, 13), jnp.int32),), "a text of 13 tokens is longer than max_length 12: cut it"),
        ((jnp.zeros(5, jnp.int32),), r"tokens must be integers \[batch, length\], got int32 of shape \(5,\)"),
        ((jnp.zeros((1, 5)),), "got float32"),
        (
            (jnp.zeros((2, 5), jnp.int32), jnp.ones((2, 4))),
            r"mask must have the shape of tokens \(2, 5\), got \(2, 4\)",
        ),
        ((jnp.zeros((2, 5), jnp.int32), None, jnp.zeros((1, 5), jnp.int32)), r"types must have the shape"),
    ],
    ids=["too long", "rank", "dtype", "mask", "types"],
)
def test_texts_that_do_not_fit_are_refused(params, inputs, message):
    with pytest.raises(ValueError, match=message):
        Bert(**SIZES).apply({"params": body(params)}, *inputs)


def test_an_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match="unknown BERT preset 'large'; there are tiny, minilm-l6, bert-base"):
        bert("large")
