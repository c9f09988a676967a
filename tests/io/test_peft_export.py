"""What adapters become in PEFT's format, and that nothing is lost on the way there and back."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import leaves_with_paths
from odjax.io import Pair, PathMap, export_peft, import_peft, load_peft, save_peft
from odjax.io.peft_config import DEFAULTS, alpha_and_rank, is_target, pattern_value, read_config
from odjax.lowrank import adapt, init_factors, merge, next_block
from odjax.lowrank.factors import Sizes, frozen_half
from odjax.models import unstack_layers

from .peft_models import INPUTS, NAMES, base_of, model_of

PREFIX = "base_model.model."


class Pairs(nn.Module):
    """Two linear layers, the name of one the end of the other's."""

    def setup(self):
        self.fc = nn.Dense(6)
        self.deep_fc = nn.Dense(4)

    def __call__(self, x):
        return self.deep_fc(self.fc(x))


PAIRS = PathMap((Pair("fc", "fc"), Pair("deep.fc", "deep_fc")))


@pytest.fixture(scope="module")
def pairs():
    x = jnp.ones((1, 5))
    return nn.unbox(Pairs().init(jax.random.key(0), x)["params"]), x


def factored(pairs, **settings):
    """(adapted model, its parameters with factors that are not zero)."""
    base, x = pairs
    model = adapt(Pairs(), **settings)
    params = init_factors(model, base, jax.random.key(1), x)
    return model, {name: trained(layer) for name, layer in params.items()}


def trained(layer):
    def moved(name, leaf):
        noise = jax.random.normal(jax.random.key(len(name)), leaf.shape)
        return leaf + noise.astype(leaf.dtype) if name in ("lora_a", "lora_b") else leaf

    return {name: moved(name, leaf) for name, leaf in layer.items()}


def assert_same_bits(found, expected):
    found, expected = dict(leaves_with_paths(found)), dict(leaves_with_paths(expected))
    assert set(found) == set(expected)
    for path, leaf in expected.items():
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


# Adapted layers of each model: path, inputs, outputs; a stack of two where there is a first axis of layers.
LAYERS = {
    "net": {"conv": ((3, 2, 6), (5,)), "fc": ((30,), (7,)), "emb": ((10,), (6,))},
    "llama": {
        "layers/attn/q": ((8,), (2, 6)),
        "layers/attn/o": ((2, 6), (8,)),
        "layers/mlp/down": ((12,), (8,)),
    },
}
BASES = {kind: base_of(kind)[1] for kind in LAYERS}


@st.composite
def adapters(draw):
    """(kind of model, adapted model, parameters) with factors of any rank, dtype and scale."""
    kind = draw(st.sampled_from(list(LAYERS)))
    method = draw(st.sampled_from(["lora", "rslora", "dora"]))
    dtype = draw(st.sampled_from([jnp.float32, jnp.float16, jnp.bfloat16]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers = [path for path in LAYERS[kind] if method != "dora" or path != "emb"]
    paths = draw(st.lists(st.sampled_from(layers), min_size=1, unique=True))
    ranks = {path: draw(st.integers(1, 5)) for path in paths}
    alphas = {path: draw(st.sampled_from([1.0, 2.5, 8.0, -3.0])) for path in paths}
    params = jax.tree.map(lambda leaf: leaf, BASES[kind])
    for path in paths:
        at, layer = params, path.split("/")
        for name in layer:
            at[name] = dict(at[name])
            at = at[name]
        (ins, outs), stack = LAYERS[kind][path], (2,) * path.startswith("layers")
        shapes = {"lora_a": (*stack, *ins, ranks[path]), "lora_b": (*stack, ranks[path], *outs)}
        if method == "dora":
            shapes["lora_magnitude"] = (*stack, *outs)
        at |= {name: jnp.asarray(random.normal(size=shape), dtype) for name, shape in shapes.items()}
    weight = {path: path + ("/embedding" if path == "emb" else "/kernel") for path in paths}
    model = adapt(
        model_of(kind),
        rank=ranks[paths[0]],
        alpha=alphas[paths[0]],
        where="|".join(weight.values()),
        method=method,
        rank_pattern={weight[path]: rank for path, rank in ranks.items()},
        alpha_pattern={weight[path]: alpha for path, alpha in alphas.items()},
        dropout=draw(st.sampled_from([0.0, 0.25])),
        dtype=dtype,
    )
    return kind, model, params


@given(adapters())
def test_an_adapter_comes_back_bit_for_bit(tmp_path_factory, adapter):
    kind, model, params = adapter
    tensors, config = export_peft(model, params, NAMES[kind])
    config = json.loads(json.dumps(config))
    again, found = import_peft(model.inner, BASES[kind], tensors, config, NAMES[kind])
    assert_same_bits(found, params)
    assert (again.spec.method, again.spec.dropout) == (model.spec.method, model.spec.dropout)
    assert again.spec.dtype == model.spec.dtype
    # The scales are the same: so are the weights.
    assert_same_bits(merge(again, found), merge(model, params))
    twice, config_twice = export_peft(again, found, NAMES[kind])
    assert_same_bits(twice, tensors)
    assert config_twice == config
    folder = tmp_path_factory.mktemp("adapter")
    save_peft(folder, model, params, NAMES[kind])
    assert_same_bits(load_peft(folder, model.inner, BASES[kind], NAMES[kind])[1], params)


def test_the_pattern_of_a_stack_names_the_module_once():
    model = adapt(
        model_of("llama"), rank=2, where="layers/attn/[qk]/kernel", rank_pattern={".*/k/.*": 1}, alpha=1.0
    )
    params = init_factors(model, BASES["llama"], jax.random.key(0), INPUTS["llama"])
    _, config = export_peft(model, params, NAMES["llama"])
    assert (config["rank_pattern"], config["alpha_pattern"]) == ({"k_proj": 1}, {})


def test_the_layers_of_a_stack_are_written_alike_scanned_or_not():
    model, params = adapt(model_of("llama"), rank=2, where="layers/attn/q/kernel", alpha=3.0), BASES["llama"]
    params = init_factors(model, params, jax.random.key(0), INPUTS["llama"])
    scanned, config = export_peft(model, params, NAMES["llama"])
    unrolled = adapt(model_of("llama", scan=False), rank=2, where=r"layers_\d/attn/q/kernel", alpha=3.0)
    tensors, same = export_peft(unrolled, unstack_layers(params), NAMES["llama"])
    assert_same_bits(tensors, scanned)
    assert same == config
    assert set(scanned) == {
        f"{PREFIX}model.layers.{i}.self_attn.q_proj.lora_{f}.weight" for i in range(2) for f in "AB"
    }


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {"r": 2, "lora_alpha": 2, "use_rslora": False}),  # a scale of 1
        ({"alpha": 3.0}, {"r": 2, "lora_alpha": 3}),
        ({"alpha": 0.5, "method": "dylora"}, {"r": 2, "lora_alpha": 0.5}),
        ({"alpha": 3.0, "method": "rslora"}, {"lora_alpha": 3, "use_rslora": True}),
        ({"method": "rslora"}, {"lora_alpha": 2**0.5, "use_rslora": True}),
        ({"method": "dora", "alpha": 3.0}, {"lora_alpha": 3, "use_dora": True, "use_rslora": False}),
        (
            {"method": "rac", "alpha": 3.0},
            {"use_dora": False, "use_rslora": False, "init_lora_weights": True},
        ),
        ({"init": "gaussian", "dropout": 0.5}, {"init_lora_weights": "gaussian", "lora_dropout": 0.5}),
        ({"where": "fc/kernel"}, {"target_modules": ["fc"]}),
        ({"where": "deep_fc/kernel"}, {"target_modules": ["deep.fc"]}),
        ({"rank_pattern": {"fc/kernel": 1}}, {"r": 2, "rank_pattern": {"^fc": 1}}),
        ({"rank_pattern": {"deep_fc/kernel": 1}}, {"r": 2, "rank_pattern": {r"deep\.fc": 1}}),
        ({"rank_pattern": {".*": 1}}, {"r": 1, "rank_pattern": {}}),
        ({"alpha": 3.0, "alpha_pattern": {"fc/.*": 2.0}}, {"lora_alpha": 3, "alpha_pattern": {"^fc": 2}}),
    ],
)
def test_settings_in_the_config(pairs, settings, expected):
    model, params = factored(pairs, rank=2, **settings)
    _, config = export_peft(model, params, PAIRS)
    assert {name: config[name] for name in expected} == expected
    assert set(config) == set(DEFAULTS)
    read = read_config(config)
    for module, path in (("fc", "fc"), ("deep.fc", "deep_fc")):
        if "lora_a" in params[path] or "lora_b" in params[path]:
            rank = (
                params[path]["lora_a"].shape[-1]
                if "lora_a" in params[path]
                else params[path]["lora_b"].shape[0]
            )
            assert alpha_and_rank(read, module)[1] == rank
            assert is_target(read, module)


def test_a_module_that_only_the_map_knows_is_no_target(pairs):
    """BERT's "dense" would also be the pooler of a PyTorch model whose Flax twin has none."""
    model, params = factored(pairs, rank=2, where="deep_fc/kernel")
    bare = {"deep_fc": params["deep_fc"]}
    for other, expected in (("fc", ["deep.fc"]), ("pooler", ["fc"])):
        names = PathMap((Pair("deep.fc", "deep_fc"), Pair(f"side.{other}", "side")))
        assert export_peft(model, bare, names)[1]["target_modules"] == expected


def test_axis_names_stay_around_the_weights_of_the_base():
    model = model_of("llama")
    boxed = jax.jit(model.init)(jax.random.key(0), INPUTS["llama"])["params"]
    adapted = adapt(model, rank=2, where="layers/attn/q/kernel|embed/embedding")
    params = init_factors(adapted, boxed, jax.random.key(1), INPUTS["llama"])
    tensors, config = export_peft(adapted, params, NAMES["llama"], save="lm_head/.*", tables=True)
    _, found = import_peft(model, boxed, tensors, config, NAMES["llama"])
    for path in ("embed/embedding", "lm_head/kernel", "layers/attn/q/kernel"):
        *folders, name = path.split("/")
        new, old = found, boxed
        for folder in folders:
            new, old = new[folder], old[folder]
        assert new[name].names == old[name].names
    assert_same_bits(nn.unbox(found), nn.unbox(params))


def test_a_target_whose_name_ends_like_another_keeps_its_own_rank_in_peft():
    """PEFT's own rule: the pattern "fc" also means "deep.fc", "^fc" does not."""
    assert pattern_value({"fc": 1}, "deep.fc", 2) == 1
    assert pattern_value({"^fc": 1}, "deep.fc", 2) == 2
    assert pattern_value({"^fc": 1}, "fc", 2) == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "rac", "side": "right"},
        {"method": "rac", "side": "left"},
        {"method": "rac", "cache_sketch": True},
        {"method": "asym", "alpha": 5.0},
        {"method": "lora_fa", "alpha": 5.0},
    ],
)
def test_the_half_that_is_drawn_is_written_out(pairs, settings):
    model, params = factored(pairs, rank=2, **settings)
    tensors, config = export_peft(model, params, PAIRS)
    right = "lora_b" in params["fc"]
    drawn = frozen_half(model.spec, params["fc"], Sizes((), (5,), (6,)))
    np.testing.assert_array_equal(
        tensors[f"{PREFIX}fc.lora_{'A' if right else 'B'}.weight"], np.asarray(drawn).T
    )
    plain, found = import_peft(Pairs(), pairs[0], tensors, config, PAIRS)
    assert plain.spec.method == "lora"
    for path, leaf in leaves_with_paths(merge(plain, found)):
        layer, name = path.split("/")
        np.testing.assert_allclose(leaf, merge(model, params)[layer][name], atol=1e-6, err_msg=path)


def test_pissa_becomes_lora_of_twice_the_rank_on_the_original_weights(pairs):
    shapes = jax.tree.map(np.shape, pairs[0], is_leaf=lambda leaf: hasattr(leaf, "shape"))
    random = np.random.default_rng(0)
    with jax.enable_x64(True):
        x = jnp.ones((1, 5))
        base = {
            layer: {name: jnp.asarray(random.normal(size=shape)) for name, shape in leaves.items()}
            for layer, leaves in shapes.items()
        }
        model = adapt(
            Pairs(), rank=2, alpha=3.0, method="pissa", dtype=jnp.float64, rank_pattern={"fc/.*": 1}
        )
        start = init_factors(model, base, jax.random.key(1), x)
        params = {name: trained(layer) for name, layer in start.items()}
        tensors, config = export_peft(model, params, PAIRS, initial=start)
        plain, found = import_peft(Pairs(), base, tensors, config, PAIRS)
        # residual + s B A == W0 + s' B' A'.
        for path, leaf in leaves_with_paths(merge(plain, found)):
            layer, name = path.split("/")
            np.testing.assert_allclose(leaf, merge(model, params)[layer][name], atol=1e-12, err_msg=path)
    assert (config["r"], config["lora_alpha"], config["rank_pattern"]) == (4, 6, {"^fc": 2})
    assert tensors[f"{PREFIX}deep.fc.lora_A.weight"].shape == (4, 6)


def test_rslora_of_alpha_is_lora_of_alpha_times_the_root_of_the_rank(pairs):
    model, params = factored(pairs, rank=4, alpha=3.0, method="rslora")
    tensors, config = export_peft(model, params, PAIRS)
    as_lora = config | {"use_rslora": False, "lora_alpha": 3.0 * 4**0.5}
    first, second = (merge(*import_peft(Pairs(), pairs[0], tensors, c, PAIRS)) for c in (config, as_lora))
    assert_same_bits(first, second)


def test_dora_with_rslora_has_the_scale_of_rslora(pairs):
    model, params = factored(pairs, rank=4, alpha=3.0 * 2, method="dora")
    tensors, config = export_peft(model, params, PAIRS)
    both = config | {"use_rslora": True, "lora_alpha": 3}
    assert_same_bits(merge(*import_peft(Pairs(), pairs[0], tensors, both, PAIRS)), merge(model, params))


def test_dora_with_the_lengths_of_the_sum_is_lora(pairs):
    model, params = factored(pairs, rank=2, alpha=3.0, method="lora")
    merged = merge(model, params)
    tensors, config = export_peft(model, params, PAIRS)
    for module, path in (("fc", "fc"), ("deep.fc", "deep_fc")):
        lengths = np.linalg.norm(merged[path]["kernel"], axis=0)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = lengths
    dora = merge(*import_peft(Pairs(), pairs[0], tensors, config | {"use_dora": True}, PAIRS))
    for path in merged:
        np.testing.assert_allclose(dora[path]["kernel"], merged[path]["kernel"], atol=1e-6)


def test_a_chain_past_its_first_block_belongs_to_merged_weights(pairs):
    model, params = factored(pairs, rank=2, method="rac")
    params = next_block(model, params, jax.random.key(3))
    with pytest.raises(ValueError, match="past the first block of its chain"):
        export_peft(model, params, PAIRS)
    _, config = export_peft(model, params, PAIRS, base_model="merged")
    assert config["base_model_name_or_path"] == "merged"


def test_saved_modules_and_biases_replace_those_of_the_base(pairs):
    base, _ = pairs
    model, params = factored(pairs, rank=2, where="fc/kernel")
    other = jax.tree.map(lambda leaf: leaf + 1, params)
    tensors, config = export_peft(
        model, other, PAIRS, save="deep_fc/.*", bias="lora_only", task_type="SEQ_CLS"
    )
    assert set(tensors) == {
        PREFIX + name
        for name in (
            "fc.lora_A.weight",
            "fc.lora_B.weight",
            "fc.base_layer.bias",
            "deep.fc.weight",
            "deep.fc.bias",
        )
    }
    assert (config["modules_to_save"], config["bias"], config["task_type"]) == (
        ["deep.fc"],
        "lora_only",
        "SEQ_CLS",
    )
    _, found = import_peft(Pairs(), base, tensors, config, PAIRS)
    assert_same_bits(found, other | {"fc": other["fc"] | {"kernel": base["fc"]["kernel"]}})


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"method": "pissa"}, {}, "pass initial="),
        ({}, {"initial": {}}, "initial= is for the conversion of 'pissa'"),
        ({}, {"bias": "some"}, "bias must be one of none, lora_only, all, got 'some'"),
        ({}, {"save": "fc/.*"}, "save= selects factors|fc have an adapter"),
        ({"where": "fc/kernel"}, {"save": "deep_fc/kernel"}, "deep_fc/bias are left out of modules"),
        ({"where": "fc/kernel"}, {"save": "fc/(kernel|bias)"}, "fc have an adapter: PEFT does not save both"),
        (
            {},
            {"names": PathMap((Pair("fc", "fc"),))},
            r"cannot be written: deep_fc/kernel \[6, 4\] has no name",
        ),
        (
            {},
            {"names": PathMap((Pair("{p:fc|deep_fc}", "{p}", inputs=2),))},
            "1 axes of inputs, the map says 2",
        ),
        ({}, {"names": PathMap((Pair("{i}.{p:fc|deep_fc}", "{p}_{i}"),))}, "has no name"),
    ],
)
def test_what_cannot_be_written_is_refused_by_name(pairs, settings, options, message):
    model, params = factored(pairs, rank=2, **settings)
    with pytest.raises(ValueError, match=message):
        export_peft(model, params, **{"names": PAIRS, **options})


def test_parameters_without_factors_are_refused(pairs):
    with pytest.raises(ValueError, match="nothing in params is adapted"):
        export_peft(adapt(Pairs()), pairs[0], PAIRS)


def test_nothing_is_written_where_the_export_fails(pairs, tmp_path):
    model, params = factored(pairs, rank=2)
    with pytest.raises(ValueError, match="bias must be"):
        save_peft(tmp_path / "adapter", model, params, PAIRS, bias="some")
    assert not (tmp_path / "adapter").exists()


def config_with(**settings):
    return read_config({"peft_type": "LORA", **settings})


Q = "model.layers.{}.self_attn.q_proj"


@pytest.mark.parametrize(
    ("settings", "module", "expected"),
    [
        ({"target_modules": ["q_proj"]}, Q, True),
        ({"target_modules": ["proj"]}, Q, False),  # the end of a part is no part
        ({"target_modules": ["self_attn.q_proj"]}, Q, True),
        ({"target_modules": "q_proj"}, Q, False),  # text is matched whole
        ({"target_modules": r".*\.q_proj"}, Q, True),
        ({"target_modules": ["fc"]}, "fc", True),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, Q, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, Q, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["self_attn"]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0, 1]}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0]}, Q, False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}, Q, True),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": ["h"]}, Q, False),
        ({"target_modules": ["w"], "layers_to_transform": 1}, "model.layers.1.experts.0.w", True),
        ({"target_modules": ["fc"], "layers_to_transform": 1}, "deep.fc", False),  # no number in the name
        ({"target_modules": ["fc"], "layers_to_transform": 1}, "fc", True),  # a whole name is not filtered
        ({"target_modules": "all-linear"}, Q, None),
        ({}, Q, None),
    ],
)
def test_which_modules_are_targets(settings, module, expected):
    assert is_target(config_with(**settings), module.format(1)) is expected


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ({"q_proj": 4}, 4),
        ({"q": 4}, 8),
        ({"layers.1.*": 3, "q_proj": 4}, 3),  # the first that matches wins
        ({"layers.0.*": 3, "q_proj": 4}, 4),
        ({r".*\.q_proj": 5}, 5),
        ({"^q_proj": 5}, 8),
        ({"self_attn": 5}, 8),
    ],
)
def test_the_rank_of_a_module_is_that_of_the_first_pattern_that_matches_its_end(pattern, expected):
    assert alpha_and_rank(config_with(r=8, rank_pattern=pattern), Q.format(1)) == (8, expected)
    assert alpha_and_rank(config_with(lora_alpha=8, alpha_pattern=pattern), Q.format(1)) == (expected, 8)
