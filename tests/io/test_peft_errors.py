"""Adapters that are damaged, or do not fit the model, are refused by name."""

import re

import numpy as np
import pytest

from odjax.io import export_peft, import_peft, load_peft, save_peft
from odjax.lowrank import adapt

from .peft_models import adapted, base_of, parts


def renamed(tensors, old, new):
    return {key.replace(old, new): tensor for key, tensor in tensors.items()}


def without(tensors, pattern):
    kept = {key: tensor for key, tensor in tensors.items() if not re.search(pattern, key)}
    assert len(kept) < len(tensors)
    return kept


def with_shape(tensors, pattern, change):
    hits = [key for key in tensors if re.search(pattern, key)]
    assert hits
    return {**tensors, hits[0]: change(tensors[hits[0]])}


# name of an adapter, change of the tensors, change of the config, message.
BAD = {
    "A without B": ("llama-lora", lambda t: without(t, r"0.*q_proj.lora_B"), {}, "layers.0.self_attn.q_proj lacks lora_B.weight"),
    "B without A": ("net-lora", lambda t: without(t, "embedding_A"), {}, "emb lacks lora_embedding_A"),
    "rank": ("llama-lora", None, {"r": 4}, "q_proj.lora_A.weight has rank 3, the config says 4"),
    "rank of a pattern": ("llama-rslora", None, {"rank_pattern": {"q_proj": 2}}, "down_proj.lora_A.weight has rank 3, the config says 4"),
    "rank of B": ("llama-lora", lambda t: with_shape(t, "lora_B", lambda x: x[:, :2]), {}, r"\[\d+, 2\] does not fit .* needs \[\d+, 3\]"),
    "turned": ("llama-lora", lambda t: with_shape(t, r"v_proj.lora_B", lambda x: x.T), {}, r"v_proj.lora_B.weight \[3, 6\] does not fit layers/attn/v/kernel \[8, 1, 6\], which needs \[6, 3\]"),
    "window": ("net-lora", lambda t: with_shape(t, r"conv.lora_A", lambda x: np.swapaxes(x, 2, 3)), {}, r"conv.lora_A.weight \[2, 6, 2, 3\] does not fit conv/kernel"),
    "unknown modules": ("llama-lora", lambda t: renamed(t, "layers.1.self_attn", "layers.1.attention"), {}, r"layers.1.attention.q_proj \(lora_A.weight, lora_B.weight\) has no place; .*layers.1.attention.v_proj"),
    "more layers": ("llama-lora", lambda t: renamed(t, "layers.1", "layers.5"), {}, "layers.5.self_attn.q_proj is beyond the 2 layers"),
    "other tensors": ("llama-lora", lambda t: t | {"base_model.model.visual.weight": np.zeros(2)}, {}, r"visual.weight \[2\] has no place"),
    "foreign names": ("llama-lora", lambda t: renamed(t, "base_model.model.", ""), {}, "start with 'base_model.model.', these do not: model.layers.0"),
    "saved head": ("net-lora", lambda t: with_shape(t, "head.weight", lambda x: x.T), {}, r"head.weight \[4, 3\] does not fit head/kernel \[4, 3\]"),
    "other adapters": ("llama-lora", None, {"peft_type": "LOHA"}, "peft_type must be 'LORA', got 'LOHA'"),
    "no magnitudes": ("llama-dora", lambda t: without(t, "magnitude"), {}, "lacks lora_magnitude_vector"),
    "magnitudes": ("llama-dora", None, {"use_dora": False}, "has lora_magnitude_vector that the config does not announce"),
    "lora_bias": ("bert-lora-bias", None, {"lora_bias": False}, "has lora_B.bias that the config does not announce"),
    "DoRA of a table": ("llama-table", lambda t: {**t, **{k.replace("lora_embedding_A", "lora_magnitude_vector"): np.zeros(8, np.float32) for k in t if "embedding_A" in k}}, {"use_dora": True}, "embed_tokens is an embedding, DoRA adapts linear layers and convolutions"),
    "unknown setting": ("llama-lora", None, {"layer_replication": [[0, 2]]}, "no counterpart: {'layer_replication'"),
    "zero rank": ("llama-lora", None, {"r": 0}, "r must be a whole number from 1, got 0"),
    "rank is no number": ("llama-lora", None, {"rank_pattern": {"q_proj": 2.0}}, r"rank_pattern\['q_proj'\] must be a whole number"),
    "infinite alpha": ("llama-lora", None, {"lora_alpha": float("inf")}, "lora_alpha must be a finite number, got inf"),
    "alpha of a pattern": ("llama-lora", None, {"alpha_pattern": {"q": "8"}}, r"alpha_pattern\['q'\] must be a finite number"),
    "bias": ("llama-lora", None, {"bias": "some"}, "bias must be"),
    "dora and bias": ("llama-dora", None, {"lora_bias": True}, "exclude each other"),
    "targets without tensors": ("llama-lora", None, {"target_modules": ["q_proj", "v_proj", "k_proj"]}, "layers.0.self_attn.k_proj is a target of the config, but has no adapter"),
    "tensors without targets": ("llama-lora", None, {"target_modules": ["q_proj"]}, "layers.1.self_attn.v_proj has an adapter, but is no target"),
    "excluded": ("llama-lora", None, {"exclude_modules": r".*layers\.1.*"}, "layers.1.self_attn.q_proj has an adapter, but is no target"),
    "nothing": ("llama-lora", lambda t: {}, {"target_modules": None}, "there is no lora_A"),
    "integers": ("llama-lora", lambda t: with_shape(t, "lora_A", lambda x: x.astype(np.int32)), {}, "is int32, factors are real floating"),
    "layers that differ": ("llama-lora", lambda t: with_shape(t, "1.*q_proj.lora_A", lambda x: x.astype(np.float16)), {}, "ranks, alphas and dtypes .*: use the unrolled model"),
    "alphas that differ": ("llama-lora", None, {"alpha_pattern": {"layers.1.self_attn.q_proj": 9}}, "layers/attn/q/kernel is a scanned stack with ranks, alphas"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_a_bad_adapter_is_refused_by_name(case):
    name, change, settings, message = BAD[case]
    model, base, tensors, config, names = parts(name)
    with pytest.raises(ValueError, match=message):
        import_peft(model, base, change(tensors) if change else tensors, config | settings, names)


def test_an_adapter_in_some_layers_of_a_scanned_stack_says_how_to_read_it():
    _, _, tensors, config, names = parts("llama-layers")
    model, base = base_of("llama", scan=True)
    with pytest.raises(
        ValueError, match=r"no adapter in layers \[0\]: use the unrolled model .*unstack_layers"
    ):
        import_peft(model, base, tensors, config, names)


def test_a_float64_adapter_asks_for_float64():
    model, base, tensors, config, names = parts("net-lora")
    wide = {key: tensor.astype(np.float64) for key, tensor in tensors.items()}
    with pytest.raises(ValueError, match="enable_x64"):
        import_peft(model, base, wide, config, names)


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"])
def test_adapters_whose_base_was_changed_are_read_with_a_warning(start):
    model, base, tensors, config, names = parts("net-lora")
    with pytest.warns(UserWarning, match="path_initial_model_for_weight_conversion"):
        import_peft(model, base, tensors, config | {"init_lora_weights": start}, names)


def test_a_folder_without_an_adapter_says_what_is_missing(tmp_path):
    model, base, *_, names = parts("net-lora")
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_peft(tmp_path, model, base, names)
    (tmp_path / "adapter_config.json").write_text("{")
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="only adapter_model.bin, .* save it again with PEFT"):
        load_peft(tmp_path, model, base, names)
    save_peft(tmp_path, *adapted("net-lora"), names)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match="adapter_config.json is not JSON"):
        load_peft(tmp_path, model, base, names)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match="must be an object of settings, got list"):
        load_peft(tmp_path, model, base, names)


def test_an_adapted_model_is_not_adapted_twice():
    _, base, tensors, config, names = parts("net-lora")
    with pytest.raises(ValueError, match="adapted already"):
        import_peft(adapted("net-lora")[0], base, tensors, config, names)


def test_the_table_of_a_tied_head_is_refused_both_ways():
    """PEFT adapts the lookup of a table alone, `adapt` both of its uses."""
    model, base, tensors, config, names = parts("llama-table")
    tied = model.clone(tied=True)
    base = {name: leaf for name, leaf in base.items() if name != "lm_head"}
    tensors = {key: tensor for key, tensor in tensors.items() if "lm_head" not in key}
    config["target_modules"] = ["embed_tokens"]
    with pytest.raises(ValueError, match="also the output head .*PEFT adapts its lookup alone"):
        import_peft(tied, base, tensors, config, names)
    two = adapted("llama-table")[1]
    one = {name: leaf for name, leaf in two.items() if name != "lm_head"}
    with pytest.raises(ValueError, match="also the output head"):
        export_peft(adapt(tied, rank=2, where="embed/embedding"), one, names)
