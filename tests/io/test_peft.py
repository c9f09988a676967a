"""Adapters that PEFT wrote, read here: the committed ones of tests/io/peft, without torch."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import leaves_with_paths
from odjax.io import load_safetensors, safetensors_metadata, save_peft
from odjax.io.peft_config import alpha_and_rank, is_target, read_config
from odjax.lowrank import ADDED, merge

from .peft_models import ADAPTERS, FOLDER, NAMES, adapted, base_of, outputs_of, parts

OUTPUTS = load_safetensors(FOLDER / "outputs.safetensors")


@pytest.mark.parametrize("kind", NAMES)
def test_the_bare_model_gives_the_outputs_of_torch(kind):
    model, params = base_of(kind)
    np.testing.assert_allclose(outputs_of(model, params, kind), OUTPUTS[kind], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_of_peft_gives_the_outputs_of_peft(name):
    kind = name.split("-")[0]
    model, params = adapted(name)
    assert np.abs(OUTPUTS[name] - OUTPUTS[kind]).max() > 1e-2
    np.testing.assert_allclose(outputs_of(model, params, kind), OUTPUTS[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama-rslora", "llama-dora", "net-lora"])
def test_merged_weights_give_the_outputs_of_peft(name):
    kind = name.split("-")[0]
    model, params = adapted(name)
    merged = outputs_of(model.inner, merge(model, params), kind)
    np.testing.assert_allclose(merged, OUTPUTS[name], atol=1e-5, rtol=0)


OPTIONS = {
    "llama-table": {"tables": True},
    "bert-classifier": {"bias": "lora_only", "save": "head/.*"},
    "bert-biases": {"bias": "all"},
    "net-lora": {"save": "head/.*"},
}


@pytest.mark.parametrize("name", sorted(set(ADAPTERS) - {"bert-lora-bias"}))
def test_what_peft_wrote_is_written_again_bit_for_bit(name, tmp_path):
    _, _, tensors, config, names = parts(name)
    save_peft(tmp_path / "again", *adapted(name), names, **OPTIONS.get(name, {}))
    again = load_safetensors(tmp_path / "again" / "adapter_model.safetensors")
    for key in set(tensors) - set(again):
        # PEFT writes the output head with the table, and the biases that BERT's heads share, twice.
        assert key.endswith(("lm_head.base_layer.weight", ".bias")), key
    assert set(again) <= set(tensors)
    for key, tensor in again.items():
        assert tensor.dtype == tensors[key].dtype, key
        np.testing.assert_array_equal(tensor, tensors[key], err_msg=key)
    assert safetensors_metadata(tmp_path / "again" / "adapter_model.safetensors") == {"format": "pt"}
    ours = read_config(json.loads((tmp_path / "again" / "adapter_config.json").read_text()))
    theirs = read_config(config)
    for key in tensors:
        module, found, _ = key.removeprefix("base_model.model.").partition(".lora_A.")
        if found:
            assert is_target(ours, module)
            assert alpha_and_rank(ours, module) == alpha_and_rank(theirs, module)


def test_a_bias_of_the_adapter_is_added_to_the_bias_of_the_base():
    _, base, tensors, _, _ = parts("bert-lora-bias")
    _, params = adapted("bert-lora-bias")
    trained = tensors["base_model.model.bert.encoder.layer.1.attention.self.key.lora_B.bias"]
    change = params["layers"]["attn"]["k"]["bias"][1] - base["layers"]["attn"]["k"]["bias"][1]
    np.testing.assert_allclose(np.ravel(change), 4 / 2 * trained, atol=1e-6)


def test_the_base_is_left_as_it_was_and_keeps_its_paths():
    _, base, *_ = parts("bert-classifier")
    before = jax.tree.map(np.array, base)
    _, params = adapted("bert-classifier")
    jax.tree.map(np.testing.assert_array_equal, base, before)
    added = {path for path, _ in leaves_with_paths(params)} - {path for path, _ in leaves_with_paths(base)}
    assert added == {f"layers/attn/{p}/lora_{f}" for p in "qv" for f in "ab"}
    assert all(re.fullmatch(ADDED, path) for path in added)


def test_an_imported_adapter_trains():
    model, params = adapted("llama-lora")
    tokens = jnp.zeros((1, 4), jnp.int32)
    grad = jax.grad(lambda p: model.apply({"params": p}, tokens).sum())(params)
    assert float(jnp.abs(grad["layers"]["attn"]["q"]["lora_b"]).max()) > 0
