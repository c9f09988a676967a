"""LoRA-Guard: a chat model that is untouched, a head that learns from what was labelled."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import combine, leaves_with_paths, partition, unbox
from odjax.heads import TokenPool
from odjax.lowrank import (
    GUARD,
    Guard,
    GuardHead,
    adapt,
    guard_loss,
    last_token,
    merge,
    positive_weights,
    switched,
)
from odjax.models import bert
from odjax.models.generate import generate

from .lowrank_models import KEY, SMALL, TOKENS, small_decoder, trained

WHERE = ".*attn/(q|v)/kernel"
MASK = jnp.array([[True, True, True, False], [True, False, False, False]])
BACKBONES = {
    "decoder": lambda **more: small_decoder(**more),
    "bert": lambda **more: bert("tiny", vocab=16, max_length=8, **SMALL, **more),
}
SEEDS = st.integers(0, 10**6)


@functools.cache
def made(name, **more):
    options = {"dtype": jnp.bfloat16} if more.pop("narrow", False) else {}
    model = Guard(adapt(BACKBONES[name](**options), rank=2, alpha=3.0, where=WHERE), categories=3, **more)
    params = unbox(jax.jit(model.init)(KEY, TOKENS)["params"])
    return model, params


def judged(model, params, tokens, mask, **more):
    run = jax.jit(lambda p, t, m: model.apply({"params": p}, t, m, method="guard", **more))
    return run(params, tokens, mask)


def cases(seed, batch=4, categories=3):
    rng = np.random.default_rng(seed)
    return (
        jnp.asarray(rng.normal(size=batch), jnp.float32),
        jnp.asarray(rng.normal(size=(batch, categories)), jnp.float32),
        jnp.asarray(rng.integers(0, 2, (batch, categories))),
        jnp.asarray(rng.random((batch, categories)) < 0.6),
        jnp.asarray(rng.uniform(0.2, 5, categories), jnp.float32),
        jnp.float32(rng.uniform(0.2, 5)),
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_called_it_is_the_bare_model_to_the_bit_and_to_the_program(name):
    model, params = made(name)
    params, plain = trained(params), model.backbone.inner
    for rngs in (None, {"dropout": KEY}):
        mine, theirs = (
            jax.make_jaxpr(lambda p, m=m, r=rngs: m.apply({"params": p}, TOKENS, rngs=r))(params)
            for m in (model, plain)
        )
        assert str(mine) == str(theirs)
    np.testing.assert_array_equal(
        jax.jit(lambda p: model.apply({"params": p}, TOKENS))(params),
        jax.jit(lambda p: plain.apply({"params": p}, TOKENS))(params),
    )


@pytest.mark.parametrize("name", BACKBONES)
def test_the_parameters_are_those_of_the_backbone_and_a_head(name):
    model, params = made(name)
    theirs = unbox(jax.jit(model.backbone.init)(KEY, TOKENS)["params"])
    assert {p: x.shape for p, x in leaves_with_paths(params)} == {
        **{p: x.shape for p, x in leaves_with_paths(theirs)},
        "guard_head/kernel": (16, 4),
        "guard_head/bias": (4,),
    }
    boxed = jax.eval_shape(model.init, KEY, TOKENS)["params"]
    assert boxed["guard_head"]["kernel"].names == ("embed", "classes")
    assert boxed["layers"]["attn"]["q"]["lora_a"].names == ("layers", "embed", None)


@pytest.mark.parametrize("name", BACKBONES)
def test_at_the_start_the_guard_sees_the_features_of_the_bare_model(name):
    model, params = made(name)
    on, off = (judged(model, params, TOKENS, MASK, on=on) for on in (True, False))
    jax.tree.map(np.testing.assert_array_equal, on, off)
    moved = judged(model, trained(params), TOKENS, MASK)
    assert float(jnp.abs(moved.categories - on.categories).max()) > 1e-3


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize("pooling", ["last", TokenPool("mean")])
def test_padding_on_the_right_changes_no_logit(name, pooling):
    model, params = made(name, pooling=pooling)
    params = trained(params)
    short = judged(model, params, TOKENS, MASK)
    padded = jnp.concatenate([TOKENS, jnp.full((2, 3), 7, jnp.int32)], axis=1)
    longer = judged(model, params, padded, jnp.pad(MASK, ((0, 0), (0, 3))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), short, longer)
    other = judged(model, params, jnp.where(MASK, TOKENS, 3), MASK)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), short, other)


def test_the_guard_reads_the_merged_weights_and_the_pooling_of_its_backbone():
    model, params = made("bert")
    params = trained(params)
    plain = model.backbone.inner
    vector = plain.apply({"params": merge(model.backbone, params)}, TOKENS, MASK)
    head = params["guard_head"]
    logits = vector @ head["kernel"] + head["bias"][None]
    found = judged(model, params, TOKENS, MASK)
    np.testing.assert_allclose(found.unsafe, logits[:, 0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.categories, logits[:, 1:], rtol=1e-4, atol=1e-5)


def test_a_chat_model_generates_as_if_it_had_no_guard():
    model, params = made("decoder")
    params = trained(params)
    ask = [
        jax.jit(lambda p, m=m: generate(m, p, TOKENS, steps=3, key=KEY))(params)
        for m in (switched(model.backbone, False), model.backbone.inner)
    ]
    np.testing.assert_array_equal(*ask)


def test_one_program_judges_with_the_factors_of_some_rows():
    model, params = made("decoder")
    params = trained(params)
    on, off = (judged(model, params, TOKENS, MASK, on=on) for on in (True, False))
    mixed = jax.jit(lambda p, s: model.apply({"params": p}, TOKENS, MASK, on=s, method="guard"))
    found = mixed(params, jnp.array([True, False]))
    for a, b, c in zip(found, on, off, strict=True):
        np.testing.assert_allclose(a, jnp.stack([b[0], c[1]]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("unsafe", [True, False])
def test_only_factors_and_head_are_trained_and_their_number_is_that_of_the_paper(unsafe):
    model = Guard(adapt(BACKBONES["decoder"](), rank=2, where=WHERE), categories=3, unsafe=unsafe)
    params = unbox(jax.eval_shape(model.init, KEY, TOKENS)["params"])
    free, _ = partition(params, GUARD)
    # Two layers of q: 16 -> 16 and v: 16 -> 8.
    count = 2 * (2 * (16 + 16) + 2 * (16 + 8)) + (3 + unsafe) * (16 + 1)
    assert sum(leaf.size for leaf in jax.tree.leaves(free)) == count


def test_a_step_moves_factors_and_head_and_no_gradient_of_another_leaf_exists():
    model, params = made("bert")
    free, frozen = partition(trained(params), GUARD)
    targets = jnp.array([[1, 0, 0], [0, 0, 1]])

    def loss(free):
        verdict = model.apply({"params": combine(free, frozen)}, TOKENS, MASK, method="guard")
        return jnp.sum(guard_loss(*verdict, targets))

    gradient = jax.jit(jax.grad(loss))(free)
    paths = {path for path, _ in leaves_with_paths(gradient)}
    assert paths == {
        *(f"layers/attn/{p}/lora_{half}" for p in "qv" for half in "ab"),
        *("guard_head/kernel", "guard_head/bias"),
    }
    for path, leaf in leaves_with_paths(gradient):
        assert float(jnp.abs(leaf).max()) > 0, path


def test_with_the_top_layer_adapted_what_is_below_it_is_the_chat_path():
    plain = small_decoder(scan=False)
    model = Guard(adapt(plain, rank=2, where="layers_1/attn/(q|v)/kernel"), categories=3)
    params = trained(unbox(jax.jit(model.init)(KEY, TOKENS)["params"]))
    assert not any("lora" in path for path, _ in leaves_with_paths(params["layers_0"]))
    outputs = {"mutable": ["intermediates"], "capture_intermediates": True}
    _, guard = model.apply({"params": params}, TOKENS, method="guard", **outputs)
    _, chat = plain.apply({"params": params}, TOKENS, **outputs)
    below, above = (
        [tree["intermediates"][f"layers_{i}"]["__call__"][0] for tree in (guard, chat)] for i in (0, 1)
    )
    np.testing.assert_array_equal(*below)
    assert not np.array_equal(*above)


def test_a_bare_backbone_is_the_head_alone():
    plain = BACKBONES["bert"]()
    model = Guard(plain, categories=3)
    params = unbox(jax.jit(model.init)(KEY, TOKENS)["params"])
    vector = plain.apply({"params": params}, TOKENS, MASK)
    expected = vector @ params["guard_head"]["kernel"]
    found = judged(model, params, TOKENS, MASK)
    np.testing.assert_allclose(found.unsafe, expected[:, 0], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        jax.jit(lambda p: model.apply({"params": p}, TOKENS, MASK))(params),
        jax.jit(lambda p: plain.apply({"params": p}, TOKENS, MASK))(params),
    )


def test_a_bfloat16_guard_gives_float32_logits_near_those_of_float32():
    model, params = made("decoder")
    narrow, _ = made("decoder", narrow=True, dtype=jnp.bfloat16)
    wide, low = (judged(m, trained(params), TOKENS, MASK) for m in (model, narrow))
    assert low.unsafe.dtype == low.categories.dtype == jnp.float32
    scale = float(jnp.abs(wide.categories).max())
    assert float(jnp.abs(wide.categories - low.categories).max()) < 24 * 2**-8 * scale


def test_without_an_output_of_its_own_unsafe_is_the_largest_category():
    x = jax.random.normal(KEY, (5, 8))
    verdict, _ = GuardHead(3, unsafe=False).init_with_output(KEY, x)
    np.testing.assert_array_equal(verdict.unsafe, verdict.categories.max(axis=1))


def test_the_first_column_of_the_head_moves_unsafe_alone():
    x = jax.random.normal(KEY, (5, 8))
    head = GuardHead(3)
    verdict, variables = head.init_with_output(KEY, x)
    params = unbox(variables["params"])
    assert not params["bias"].any()
    moved = {**params, "kernel": params["kernel"].at[:, 0].add(1.0)}
    again = head.apply({"params": moved}, x)
    np.testing.assert_array_equal(again.categories, verdict.categories)
    np.testing.assert_allclose(again.unsafe, verdict.unsafe + x.sum(axis=1), rtol=1e-5, atol=1e-5)


@given(SEEDS, st.sampled_from([1, 4]))
def test_the_last_token_is_the_one_before_the_padding(seed, batch):
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 6, batch)
    hidden = jnp.asarray(rng.normal(size=(batch, 5, 2)), jnp.float32)
    mask = jnp.arange(5)[None] < jnp.asarray(sizes)[:, None]
    expected = np.stack([hidden[i, n - 1] for i, n in enumerate(sizes)])
    np.testing.assert_array_equal(last_token(hidden, mask), expected)
    np.testing.assert_array_equal(jax.jit(last_token)(hidden, mask), expected)
    np.testing.assert_array_equal(last_token(hidden), hidden[:, 4])


@given(SEEDS)
def test_the_loss_is_half_unsafe_and_half_the_mean_of_the_categories(seed):
    u, c, y, _, w, w0 = cases(seed)
    u, c, y, w, w0 = (np.asarray(x, np.float64) for x in (u, c, y, w, w0))

    def bce(z, y, w):
        p = 1 / (1 + np.exp(-z))
        return -(w * y * np.log(p) + (1 - y) * np.log(1 - p))

    expected = bce(u, y.max(axis=1), w0) / 2 + bce(c, y, w).mean(axis=1) / 2
    found = guard_loss(*cases(seed)[:3], pos_weight=cases(seed)[4], unsafe_pos_weight=cases(seed)[5])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


@given(SEEDS)
def test_with_weights_of_one_it_is_the_cross_entropy_of_optax(seed):
    u, c, y, *_ = cases(seed)
    first = optax.sigmoid_binary_cross_entropy(u, y.max(axis=1).astype(jnp.float32))
    rest = optax.sigmoid_binary_cross_entropy(c, y.astype(jnp.float32))
    np.testing.assert_allclose(guard_loss(u, c, y), first / 2 + rest.mean(axis=1) / 2, rtol=1e-5)


@jax.jit
def loss_and_gradient(u, c, y, mask, w, w0):
    def loss(u, c):
        each = guard_loss(u, c, y, pos_weight=w, unsafe_pos_weight=w0, label_mask=mask)
        return jnp.sum(each), each

    (gradient_u, gradient_c), each = jax.grad(loss, argnums=(0, 1), has_aux=True)(u, c)
    return each, gradient_u, gradient_c


@given(SEEDS)
def test_labels_that_are_not_observed_change_neither_loss_nor_gradient(seed):
    u, c, y, mask, w, w0 = cases(seed)
    y = y.astype(jnp.float32)
    first = loss_and_gradient(u, c, y, mask, w, w0)
    second = loss_and_gradient(u, c, jnp.where(mask, y, jnp.nan), mask, w, w0)
    jax.tree.map(np.testing.assert_array_equal, first, second)
    assert not np.asarray(first[2])[~np.asarray(mask)].any()
    assert np.asarray(first[2])[np.asarray(mask)].all()


def test_a_text_of_which_nothing_is_observed_has_the_loss_of_a_known_unsafe_label_alone():
    u, c = jnp.array([0.3, -2.0]), jnp.ones((2, 3))
    y, mask = jnp.zeros((2, 3)), jnp.zeros((2, 3), bool)
    np.testing.assert_array_equal(guard_loss(u, c, y, label_mask=mask), [0, 0])
    found = guard_loss(u, c, y, label_mask=mask, unsafe_targets=jnp.array([1, 0]))
    np.testing.assert_allclose(found, [np.log1p(np.exp(-0.3)) / 2, np.log1p(np.exp(-2.0)) / 2], rtol=1e-6)


def test_the_loss_is_float32_of_bfloat16_logits_and_float64_of_float64():
    u, c, y, *_ = cases(0)
    low = guard_loss(u.astype(jnp.bfloat16), c.astype(jnp.bfloat16), y, pos_weight=jnp.full(3, 1000.0))
    again = guard_loss(
        u.astype(jnp.bfloat16).astype(jnp.float32),
        c.astype(jnp.bfloat16).astype(jnp.float32),
        y,
        pos_weight=jnp.full(3, 1000.0),
    )
    assert low.dtype == jnp.float32
    np.testing.assert_array_equal(low, again)
    with jax.enable_x64(True):
        assert guard_loss(*(jnp.asarray(np.asarray(x), jnp.float64) for x in (u, c)), y).dtype == jnp.float64


@given(SEEDS)
def test_positive_weights_balance_both_sides_of_every_category(seed):
    rng = np.random.default_rng(seed)
    y, mask = rng.integers(0, 2, (16, 3)), rng.random((16, 3)) < 0.7
    y[:2], mask[:2] = [[1, 1, 1], [0, 0, 0]], True
    weights = positive_weights(jnp.asarray(y), jnp.asarray(mask))
    for j in range(3):
        seen = y[mask[:, j], j]
        np.testing.assert_allclose(weights.categories[j] * seen.mean(), (1 - seen).mean(), rtol=1e-5)
    some = (y * mask).max(axis=1)[mask.any(axis=1)]
    np.testing.assert_allclose(weights.unsafe * some.mean(), (1 - some).mean(), rtol=1e-5)


def test_a_cap_bounds_the_weight_of_a_category_without_positives():
    y = jnp.array([[1, 0], [0, 0], [0, 0]])
    np.testing.assert_allclose(positive_weights(y, cap=10.0).categories, [2, 10])
    with pytest.raises(ValueError, match=r"no positive in category 1, .* infinite: give cap="):
        positive_weights(y)
    with pytest.raises(ValueError, match="cap must be positive, got 0"):
        positive_weights(y, cap=0)
    with pytest.raises(ValueError, match=r"targets must be \[B, C\], got shape \(3,\)"):
        positive_weights(y[:, 0])


def test_over_a_mesh_the_texts_are_judged_as_on_one_device():
    model, params = made("decoder")
    params, tokens = trained(params), jnp.arange(32, dtype=jnp.int32).reshape(8, 4) % 16
    mask = jnp.arange(4)[None] < 1 + jnp.arange(8)[:, None] % 4
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.NamedSharding(mesh, jax.P("data"))
    spread = judged(model, params, jax.device_put(tokens, rows), jax.device_put(mask, rows))
    whole = judged(model, params, tokens, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), spread, whole)


def test_masks_and_targets_that_make_no_sense_are_named():
    hidden, mask = jnp.ones((2, 3, 4)), jnp.ones((2, 3), bool)
    with pytest.raises(ValueError, match="no token in row 1: leave empty texts out"):
        last_token(hidden, mask.at[1].set(False))
    with pytest.raises(ValueError, match="a token behind padding in row 0: pad on the right"):
        last_token(hidden, mask.at[0, 0].set(False))
    with pytest.raises(ValueError, match=r"the shape of tokens \(2, 3\), got \(2, 2\)"):
        last_token(hidden, mask[:, :2])
    with pytest.raises(TypeError, match="mask must be bool, got int32"):
        last_token(hidden, mask.astype(jnp.int32))
    model, params = made("bert")
    with pytest.raises(ValueError, match="pad on the right"):
        model.apply({"params": params}, TOKENS, MASK[:, ::-1], method="guard")
    u, c, y, *_ = cases(0)
    with pytest.raises(ValueError, match="targets must be 0 or 1 where they are observed, got 2"):
        guard_loss(u, c, y.at[0, 0].set(2))
    with pytest.raises(ValueError, match=r"targets must have the shape of categories \(4, 3\), got \(4, 2\)"):
        guard_loss(u, c, y[:, :2])
    with pytest.raises(
        ValueError, match=r"unsafe \[B\] and categories \[B, C\] do not fit: \(3,\), \(4, 3\)"
    ):
        guard_loss(u[:3], c, y)
    with pytest.raises(ValueError, match=r"a number a category \(3,\), got shape \(2,\)"):
        guard_loss(u, c, y, pos_weight=jnp.ones(2))
    with pytest.raises(ValueError, match=r"unsafe_targets must have the shape \(4,\), got \(3,\)"):
        guard_loss(u, c, y, unsafe_targets=jnp.ones(3))
    with pytest.raises(ValueError, match=r"label_mask must have the shape of targets \(4, 3\), got \(4,\)"):
        guard_loss(u, c, y, label_mask=jnp.ones(4, bool))
    with pytest.raises(TypeError, match="label_mask must be bool, got float32"):
        guard_loss(u, c, y, label_mask=jnp.ones((4, 3)))
    with pytest.raises(TypeError, match="categories must be logits, got int32"):
        guard_loss(u, y, y)


def test_guards_that_cannot_be_are_named():
    plain = BACKBONES["decoder"]()
    with pytest.raises(ValueError, match=r"at least two outputs, got categories=1, unsafe=False"):
        GuardHead(1, unsafe=False)
    with pytest.raises(ValueError, match="at least two outputs, got categories=0, unsafe=True"):
        Guard(plain, categories=0)
    with pytest.raises(ValueError, match="a Decoder has no pooling of its own: give pooling='last'"):
        Guard(plain, categories=3, pooling="own")
    with pytest.raises(ValueError, match="pooling must be 'last', 'own', None or a module, got 'mean'"):
        Guard(plain, categories=3, pooling="mean")
    with pytest.raises(TypeError, match="a method features.*, a Dense has none"):
        Guard(nn.Dense(3), categories=3)
    with pytest.raises(TypeError, match="features must be floating point, got int32"):
        GuardHead(3).init(KEY, TOKENS)
    _, variables = GuardHead(3).init_with_output(KEY, jnp.ones((1, 8)))
    with pytest.raises(
        ValueError, match=r"kernel has the shape \(8, 4\), features of width 9 .* need \(9, 4\)"
    ):
        GuardHead(3).apply(variables, jnp.ones((1, 9)))
    nothing = Guard(adapt(plain, where="no/such/kernel"), categories=3)
    with pytest.raises(ValueError, match="no/such/kernel"):
        nothing.init(KEY, TOKENS)
