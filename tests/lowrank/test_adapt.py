"""Adapters by interception: the same function at the start, the same function as the merged weights."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import leaves_with_paths, partition
from odjax.lowrank.adapt import adapt
from odjax.lowrank.merge import init_factors, merge, start_from
from odjax.lowrank.methods import ADDED, FACTORS, METHODS
from odjax.lowrank.sketches import Bernoulli
from odjax.models import MLP

from .lowrank_models import ANY, KEY, MODELS, TOKENS, bare, small_decoder, trained


@functools.cache
def adapted(name, method, **settings):
    model, inputs, where = MODELS[name]
    model = adapt(model, rank=2, method=method, alpha=3.0, where=where, **settings)
    params = nn.unbox(jax.jit(model.init)(KEY, *inputs)["params"])
    return model, params, jax.jit(lambda p, rngs=None: model.apply({"params": p}, *inputs, rngs=rngs))


PAIRS = [
    *(("scanned decoder", method) for method in ("lora", "rac", "dylora")),
    ("unrolled tied decoder", "rac"),
    ("unrolled tied decoder", "lora"),
    ("vit", "rac"),
    *(("mlp", method) for method in METHODS if method not in ("dora", "pissa")),
    ("conv net", "lora"),
    ("conv net", "rac"),
    ("products", "lora"),
    ("products", "rac"),
]


@pytest.mark.parametrize("name,method", PAIRS)
def test_the_base_keeps_its_paths_and_values_and_the_function_is_the_same_at_the_start(name, method):
    params, apply = bare(name)
    _, own, apply_adapted = adapted(name, method)
    mine = dict(leaves_with_paths(own))
    for path, leaf in leaves_with_paths(params):
        np.testing.assert_array_equal(leaf, mine[path], err_msg=path)
    np.testing.assert_array_equal(apply(params), apply_adapted(own))


@pytest.mark.parametrize("name,method", [*PAIRS, ("products", "dora"), ("mlp", "dora"), ("conv net", "dora")])
def test_the_factored_forward_pass_is_that_of_the_merged_weights(name, method):
    _, apply = bare(name)
    model, params, apply_adapted = adapted(name, method)
    params = trained(params)
    out, merged = apply_adapted(params), apply(merge(model, params))
    assert float(jnp.abs(out - apply(merge(model, adapted(name, method)[1]))).max()) > 1e-3
    np.testing.assert_allclose(out, merged, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("name", ["products", "conv net"])
def test_dora_starts_as_the_base_within_rounding(name):
    params, apply = bare(name)
    _, own, apply_adapted = adapted(name, "dora")
    np.testing.assert_allclose(apply_adapted(own), apply(params), rtol=1e-6, atol=1e-6)


def test_a_merged_dora_filter_has_the_trained_length_for_each_output_channel():
    model, params, _ = adapted("conv net", "dora")
    params = trained(params)
    merged = merge(model, params)["first"]["kernel"]
    assert params["first"]["lora_magnitude"].shape == (6,)
    lengths = jnp.sqrt(jnp.sum(merged**2, axis=(0, 1, 2)))
    np.testing.assert_allclose(lengths, jnp.abs(params["first"]["lora_magnitude"]), rtol=1e-5)


def test_merging_is_exact_in_float64():
    with jax.enable_x64(True):
        x = jnp.linspace(-1.0, 1.0, 30, dtype=jnp.float64).reshape(2, 3, 5)
        model = adapt(
            nn.Dense(4, param_dtype=jnp.float64), rank=2, method="dora", alpha=3.0, dtype=jnp.float64
        )
        params = trained(model.init(KEY, x)["params"])
        out = model.apply({"params": params}, x)
        expected = model.inner.apply({"params": merge(model, params)}, x)
        np.testing.assert_allclose(out, expected, rtol=1e-13)


def test_cached_sketches_are_the_drawn_ones():
    model, params, apply = adapted("mlp", "rac")
    cached, own, apply_cached = adapted("mlp", "rac", cache_sketch=True)
    assert any(path.endswith("lora_frozen") for path, _ in leaves_with_paths(own))
    np.testing.assert_allclose(apply(trained(params)), apply_cached(trained(own)), rtol=1e-6)
    for a, b in zip(
        jax.tree.leaves(merge(model, trained(params))),
        jax.tree.leaves(merge(cached, trained(own))),
        strict=True,
    ):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


def test_layers_of_a_scan_have_sketches_of_their_own():
    _, params, _ = adapted("scanned decoder", "rac")
    state = params["layers"]["attn"]["q"]["lora_sketch"]
    assert state.shape == (2, 3)
    assert not np.array_equal(state[0, :2], state[1, :2])
    assert not np.array_equal(state, params["layers"]["attn"]["k"]["lora_sketch"])


@pytest.mark.parametrize(
    "method,count", [("lora", 2 * (6 + 8) + 2 * (8 + 6) + 2 * (6 + 4)), ("rac", 16 + 16 + 12)]
)
def test_the_trained_count_is_that_of_the_paper(method, count):
    _, params, _ = adapted("mlp", method)
    free, _ = partition(params, FACTORS)
    assert sum(leaf.size for leaf in jax.tree.leaves(free)) == count


def test_axis_names_of_the_factors_are_those_of_the_kernel():
    model, inputs, where = MODELS["scanned decoder"]
    for method in ("lora", "rac"):
        boxed = jax.eval_shape(adapt(model, rank=2, method=method, where=where).init, KEY, *inputs)["params"]
        attention = boxed["layers"]["attn"]
        assert attention["o"]["lora_a"].names == ("layers", "heads", "head_dim", None)
        assert attention["q"]["lora_a"].names == ("layers", "embed", None)
        if method == "lora":
            assert attention["q"]["lora_b"].names == ("layers", None, "heads", "head_dim")
        else:
            assert boxed["layers"]["mlp"]["up"]["lora_b"].names == ("layers", None, "mlp")


def test_methods_and_attributes_of_the_model_are_there():
    model, params, apply = adapted("scanned decoder", "lora")
    params = trained(params)
    features = model.apply({"params": params}, TOKENS, method="features")
    logits = model.apply({"params": params}, features, method="logits")
    np.testing.assert_allclose(logits, apply(params), rtol=1e-5, atol=1e-5)
    assert model.vocab == 16
    with pytest.raises(AttributeError, match="no_such_thing"):
        model.no_such_thing  # noqa: B018


def test_rslora_is_lora_with_alpha_times_the_root_of_the_rank():
    x = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)
    params = trained(adapt(nn.Dense(4), rank=4).init(KEY, x)["params"])
    a = adapt(nn.Dense(4), rank=4, method="rslora", alpha=3.0).apply({"params": params}, x)
    b = adapt(nn.Dense(4), rank=4, method="lora", alpha=6.0).apply({"params": params}, x)
    np.testing.assert_array_equal(a, b)


def test_the_gradient_of_dora_takes_the_length_as_a_constant():
    x = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)
    model = adapt(nn.Dense(4, use_bias=False), rank=2, method="dora")
    params = trained(model.init(KEY, x)["params"])
    weight = params["kernel"] + params["lora_a"] @ params["lora_b"]
    length = jnp.linalg.norm(weight, axis=0)

    def plain(free):
        w = params["kernel"] + free["lora_a"] @ free["lora_b"]
        return jnp.sum(jnp.sin(x @ (w * (free["lora_magnitude"] / length)[None])))

    free = {name: leaf for name, leaf in params.items() if name.startswith("lora_")}
    expected = jax.grad(plain)(free)
    found = jax.grad(lambda f: jnp.sum(jnp.sin(model.apply({"params": {**params, **f}}, x))))(free)
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=1e-4, atol=1e-5)


def test_pissa_starts_as_the_base_and_its_factors_are_the_principal_part():
    params, apply = bare("mlp")
    model, _, apply_adapted = adapted("mlp", "pissa")
    x = MODELS["mlp"][1][0]
    own = init_factors(model, params, KEY, x)
    np.testing.assert_allclose(apply_adapted(own), apply(params), rtol=1e-5, atol=1e-5)
    values = jnp.linalg.svd(params["dense_0"]["kernel"], compute_uv=False)
    rest = jnp.linalg.svd(own["dense_0"]["kernel"], compute_uv=False)
    np.testing.assert_allclose(rest[: len(values) - 2], values[2:], rtol=1e-4, atol=1e-5)


def test_pissa_splits_every_layer_of_a_scan_and_the_table_beside_it():
    params, apply = bare("scanned decoder")
    model, inputs, where = MODELS["scanned decoder"]
    model = adapt(model, rank=2, method="pissa", alpha=3.0, where=where)
    own = init_factors(model, params, KEY, *inputs)
    out = jax.jit(lambda p: model.apply({"params": p}, *inputs))(own)
    np.testing.assert_allclose(out, apply(params), rtol=1e-4, atol=1e-5)
    for path in (("layers", "attn", "q"), ("layers", "mlp", "down"), ("embed",)):
        before, after = params, own
        for name in path:
            before, after = before[name], after[name]
        leaf = "embedding" if "embedding" in before else "kernel"
        shape = (2, -1, 16) if path[-1] == "down" else (2, 16, -1) if path[0] == "layers" else (1, -1, 16)
        values, rest = (
            np.linalg.svd(np.asarray(tree[leaf]).reshape(shape), compute_uv=False) for tree in (before, after)
        )
        np.testing.assert_allclose(rest[:, :-2], values[:, 2:], rtol=1e-3, atol=1e-5, err_msg="/".join(path))


class ScannedTables(nn.Module):
    """An embedding in each layer of a scan, as for the layers' own tokens."""

    @nn.compact
    def __call__(self, tokens):
        def body(table, x, tokens):
            return jnp.tanh(x + table(tokens)), None

        scan = nn.scan(
            body, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=nn.broadcast, length=3
        )
        return scan(nn.Embed(7, 5, name="layers"), jnp.zeros((*tokens.shape, 5)), tokens)[0]


@pytest.mark.parametrize("method", ["lora", "rac", "pissa"])
def test_an_embedding_inside_a_scan_has_factors_for_each_layer(method):
    tokens = jnp.arange(6).reshape(2, 3)
    model = adapt(ScannedTables(), rank=2, method=method, where="layers/embedding", alpha=3.0)
    base = ScannedTables().init(KEY, tokens)["params"]
    own = init_factors(model, base, KEY, tokens)
    trainable = {path: leaf.shape for path, leaf in leaves_with_paths(partition(own, FACTORS)[0])}
    assert all(shape[0] == 3 for shape in trainable.values())
    np.testing.assert_allclose(
        model.apply({"params": own}, tokens),
        model.inner.apply({"params": base}, tokens),
        rtol=1e-5,
        atol=1e-6,
    )
    own = trained(own)
    merged = merge(model, own)
    assert np.abs(merged["layers"]["embedding"] - base["layers"]["embedding"]).max(axis=(1, 2)).min() > 1e-2
    np.testing.assert_allclose(
        model.apply({"params": own}, tokens),
        model.inner.apply({"params": merged}, tokens),
        rtol=1e-4,
        atol=1e-5,
    )


def test_init_factors_takes_the_given_weights_and_the_lengths_of_dora_are_theirs():
    params, _ = bare("mlp")
    model, _, _ = adapted("mlp", "dora")
    doubled = jax.tree.map(lambda x: 2 * x, params)
    own = init_factors(model, doubled, KEY, MODELS["mlp"][1][0])
    base, added = partition(own, lambda path, _: "lora" not in path)
    np.testing.assert_array_equal(base["dense_0"]["kernel"], doubled["dense_0"]["kernel"])
    length = jnp.linalg.norm(doubled["dense_0"]["kernel"], axis=0)
    np.testing.assert_allclose(added["dense_0"]["lora_magnitude"], length, rtol=1e-6)
    assert start_from(adapted("mlp", "lora")[0], own) is own


def test_dylora_draws_one_rank_for_all_and_trains_its_last_row_and_column():
    x = jnp.linspace(-1.0, 1.0, 12).reshape(2, 6)
    frozen = adapt(nn.Dense(4), rank=4, method="dylora")
    params = trained(frozen.init(KEY, x)["params"])
    widths = set()
    for seed in range(12):
        rngs = {"dropout": jax.random.key(seed)}

        def loss(p, model=frozen, rngs=rngs):
            return jnp.sum(model.apply({"params": p}, x, rngs=rngs) ** 2)

        grads = jax.grad(loss)(params)
        rows = np.flatnonzero(np.abs(grads["lora_b"]).max(-1))
        assert len(rows) == 1
        np.testing.assert_array_equal(np.flatnonzero(np.abs(grads["lora_a"]).max(0)), rows)
        served = frozen.inner.apply({"params": merge(frozen, params, rank=int(rows[0]) + 1)}, x)
        np.testing.assert_allclose(
            frozen.apply({"params": params}, x, rngs=rngs), served, rtol=1e-5, atol=1e-6
        )
        widths.add(int(rows[0]))
    assert len(widths) > 2
    full = adapt(nn.Dense(4), rank=4, method="dylora", train_all=True)
    grads = jax.grad(lambda p: jnp.sum(full.apply({"params": p}, x, rngs={"dropout": KEY}) ** 2))(params)
    live = np.flatnonzero(np.abs(grads["lora_b"]).max(-1))
    np.testing.assert_array_equal(live, np.arange(len(live)))


def test_dropout_touches_only_the_adapters_input_and_only_with_a_key():
    x = jnp.ones((2, 64))
    model = adapt(nn.Dense(4), rank=2, dropout=0.5)
    params = model.init(KEY, x)["params"]
    still = model.inner.apply({"params": merge(model, params)}, x)
    np.testing.assert_array_equal(model.apply({"params": params}, x, rngs={"dropout": KEY}), still)
    params = trained(params)
    calm = model.apply({"params": params}, x)
    dropped = model.apply({"params": params}, x, rngs={"dropout": KEY})
    assert not np.allclose(calm, dropped)


def test_bfloat16_weights_take_float32_factors():
    model = adapt(
        small_decoder(param_dtype=jnp.bfloat16, dtype=jnp.bfloat16), rank=2, method="rac", where=ANY
    )
    params = nn.unbox(jax.jit(model.init)(KEY, TOKENS)["params"])
    kinds = {path: leaf.dtype for path, leaf in leaves_with_paths(params)}
    assert kinds["layers/attn/q/kernel"] == jnp.bfloat16
    assert kinds["layers/attn/q/lora_a"] == jnp.float32
    assert merge(model, params)["layers"]["attn"]["q"]["kernel"].dtype == jnp.bfloat16
    assert model.apply({"params": params}, TOKENS).dtype == jnp.float32


def test_the_added_leaves_are_all_found_by_one_pattern():
    for settings in ({"method": "dora"}, {"method": "rac", "cache_sketch": True}):
        _, params, _ = adapted("mlp", settings.pop("method"), **settings)
        added, base = partition(params, ADDED)
        assert all("lora" in path for path, _ in leaves_with_paths(added))
        assert not any("lora" in path for path, _ in leaves_with_paths(base))


class Transposed(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.ConvTranspose(2, (3,), name="up")(x)


@pytest.mark.parametrize(
    "settings,message",
    [
        ({"rank": 0}, "rank must be at least 1, got 0: to leave a leaf alone, narrow where="),
        ({"method": "locon"}, "method must be one of lora, rslora, rac"),
        ({"alpha": float("inf")}, "alpha must be a finite number"),
        ({"alpha_pattern": {".*": float("nan")}}, "alpha_pattern.*must be a finite number"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"side": "top"}, "side must be one of left, right, auto.*odjax.rac_lora"),
        ({"method": "rac", "law": "cauchy"}, "law must be one of"),
        ({"law": "gaussian"}, "trains both factors and draws no sketch: drop law="),
        ({"method": "lora_fa", "side": "left"}, "choose method='asym' for side='left'"),
        ({"where": "(kernel"}, "is not a regular expression"),
        (
            {"side": Bernoulli(0.5)},
            "side that is drawn for each block needs the gradient view, odjax.rac_lora",
        ),
        ({"precondition": True}, "'lora' has no frozen half: drop precondition=, or choose one of rac, asym"),
        ({"method": "rac", "precondition": True, "alpha": 0.0}, "alpha must not be 0, pass None"),
        ({"method": "pissa", "alpha": -1.0}, "pissa takes the root of S / s: alpha must be positive"),
        ({"method": "pissa", "alpha_pattern": {".*": 0.0}}, "alpha must be positive"),
        ({"cache_sketch": True}, "'lora' has no frozen half: drop cache_sketch="),
        (
            {"method": "rac", "law": "cyclic", "cache_sketch": True},
            "law='cyclic' draws rank indices, there is no array to keep",
        ),
        ({"init": "zeros"}, "init must be one of kaiming, gaussian"),
        ({"dtype": jnp.int32}, "dtype of the factors must be a real floating one"),
    ],
)
def test_settings_that_cannot_be_are_refused_when_the_model_is_adapted(settings, message):
    with pytest.raises(ValueError, match=message):
        adapt(nn.Dense(4), **settings)


def test_what_is_no_bare_linen_module_is_refused():
    with pytest.raises(TypeError, match=r"takes a flax.linen module, got function: .*parameter_adapter"):
        adapt(lambda x: x)
    with pytest.raises(ValueError, match="adapted already"):
        adapt(adapt(nn.Dense(4)))
    with pytest.raises(TypeError, match="rank must be an int, got 2.5"):
        adapt(nn.Dense(4), rank=2.5)


@pytest.mark.parametrize(
    "model,settings,message",
    [
        (MLP((8, 6, 4)), {"where": "dense_9/kernel"}, "selects no leaf; the closest paths are 'dense_"),
        (MLP((8, 6, 4)), {"where": lambda path, leaf: False}, "selects no leaf"),
        (
            MLP((8, 6, 4)),
            {"rank": 7, "method": "rac"},
            "rank 7 is above the smaller dimension of 'dense_1/kernel'",
        ),
        (MLP((8, 6, 4)), {"rank": 7, "method": "pissa"}, "pass clip_rank=True"),
        (MLP((8, 6, 4)), {"rank_pattern": {"q": 2}}, "where='q' selects no leaf"),
        (nn.LayerNorm(), {}, "calls no layer that can be adapted: nn.Dense"),
        (Transposed(), {}, "'up/kernel' belongs to a ConvTranspose, which cannot be adapted"),
        (nn.Conv(6, (1,), feature_group_count=2), {}, "a convolution of 2 groups"),
        (nn.Einsum((3, 6), "bti,oi->bto"), {}, "write its letters in that order"),
        (nn.Dense(4, param_dtype=jnp.complex64, dtype=jnp.complex64), {}, "only real floating weights"),
    ],
)
def test_what_does_not_fit_the_model_is_refused_at_init(model, settings, message):
    with pytest.raises(ValueError, match=message):
        adapt(model, **{"rank": 2, **settings}).init(KEY, jnp.ones((2, 4, 6)))


def test_a_clipped_rank_is_the_smaller_dimension():
    model = adapt(nn.Dense(4), rank=7, method="rac", clip_rank=True)
    assert model.init(KEY, jnp.ones((1, 6)))["params"]["lora_a"].shape == (6, 4)


def test_parameters_without_factors_are_refused_with_the_remedy():
    params, _ = bare("mlp")
    with pytest.raises(ValueError, match=r"no 'lora_a' beside 'dense_0/kernel'.*init_factors"):
        adapted("mlp", "lora")[0].apply({"params": params}, MODELS["mlp"][1][0])


def test_dora_refuses_an_embedding():
    model = adapt(nn.Embed(8, 4), rank=2, method="dora", where="embedding")
    with pytest.raises(
        ValueError, match="'embedding' belongs to an embedding: method='dora' adapts linear layers"
    ):
        model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))
