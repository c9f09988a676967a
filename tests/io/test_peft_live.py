"""Adapters exchanged with the PEFT that is installed, both ways; skipped without torch, transformers and peft."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import fold_path, map_with_path
from odjax.io import load_peft, load_safetensors, save_peft
from odjax.io.peft_config import alpha_and_rank, is_target, read_config
from odjax.lowrank import FACTORS, adapt, init_factors

from .peft_models import ADAPTERS, FOLDER, INPUTS, NAMES, UNROLLED, base_of, outputs_of

MISSING = [
    name for name in ("torch", "transformers", "peft", "safetensors") if not importlib.util.find_spec(name)
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}"),
]

LINEAR = r"layers(_\d)?/attn/(q|k|o)/kernel|layers(_\d)?/mlp/down/kernel"
OURS = {
    "llama-lora": {"where": LINEAR, "alpha": 3.0, "rank_pattern": {".*/q/kernel": 3}},
    "llama-one": {"where": "layers_1/attn/q/kernel"},
    "llama-rslora": {"where": LINEAR, "method": "rslora", "alpha": 3.0, "alpha_pattern": {".*/o/.*": 5.0}},
    "llama-unscaled": {"where": LINEAR, "method": "rslora", "alpha_pattern": {".*/o/.*": 5.0}},
    "llama-rac": {"where": LINEAR, "method": "rac", "alpha": 4.0},
    "llama-dora": {"where": LINEAR, "method": "dora", "alpha": 3.0},
    "llama-pissa": {"where": LINEAR, "method": "pissa", "alpha": 3.0, "rank_pattern": {".*/q/kernel": 1}},
    "llama-dylora": {"where": LINEAR, "method": "dylora", "alpha": 3.0},
    "llama-table": {"where": "embed/embedding|lm_head/kernel", "alpha": 3.0},
    "bert-asym": {"where": r"layers/attn/[qv]/kernel", "method": "asym"},
    "bert-cola": {"where": r"layers/.*/kernel", "method": "cola", "alpha": 1.0},
    "net-lora": {"where": r"emb/embedding|(conv|fc)/kernel", "alpha": 3.0, "init": "gaussian"},
    "net-dora-conv": {"where": "(conv|mix)/kernel", "method": "dora", "alpha": 3.0},
    "net-lora_fa": {"where": "(conv|fc)/kernel", "method": "lora_fa", "alpha": 3.0},
    "net-conv1d": {"where": "mix/kernel", "alpha": 3.0},
    "net-mixed": {"where": "(fc|mix)/kernel", "alpha": 3.0},
    "net-dora": {"where": "(fc|mix)/kernel", "method": "dora"},
    "net-bf16": {"where": "fc/kernel", "alpha": 3.0, "dtype": jnp.bfloat16},
}
OPTIONS = {"bert-asym": {"save": "head/.*", "task_type": "SEQ_CLS", "bias": "lora_only"}}


MODULES = [
    "fc",
    "deep.fc",
    "lm_head",
    *(
        f"model.layers.{i}.{name}"
        for i in (0, 1, 10)
        for name in ("self_attn.q_proj", "mlp.experts.1.up_proj")
    ),
    "bert.encoder.layer.1.attention.output.dense",
    "bert.pooler.dense",
]
TARGETS = [
    ["q_proj"],
    ["fc", "up_proj"],
    ["dense", "lm_head"],
    ["model.layers.1.self_attn.q_proj"],
    r".*\.(q_proj|dense)",
]
RULES = [
    {"target_modules": targets, "rank_pattern": pattern, "alpha_pattern": pattern, **more}
    for targets in TARGETS
    for pattern in ({}, {"fc": 3, ".*": 5}, {"^fc": 3, r"layers\.1.*": 4}, {"q_proj": 2, "output.dense": 6})
    for more in (
        {},
        {"exclude_modules": ["pooler.dense", "fc"]},
        {"exclude_modules": r".*\.1\..*"},
        {"modules_to_save": ["lm_head", "experts"]},
        {"layers_to_transform": [1, 10]},
        {"layers_to_transform": 0, "layers_pattern": "layers"},
        {"layers_to_transform": [1], "layers_pattern": ["layer", "experts"]},
    )
    if isinstance(targets, list) or "layers_to_transform" not in more  # PEFT refuses these
]


def script(command, folder):
    file = pathlib.Path(__file__).with_name("peft_reference.py")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(file), command, str(folder)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def exchange(tmp_path_factory):
    """(folder with what PEFT wrote and computed, our outputs by the name of our adapter)."""
    folder = tmp_path_factory.mktemp("peft")
    script("make", folder)
    ours = {}
    for name, settings in OURS.items():
        kind = name.split("-")[0]
        model, base = base_of(kind, scan=name != "llama-one", folder=folder)
        model = adapt(model, rank=2, **settings)
        start = init_factors(model, base, jax.random.key(1), INPUTS[kind])
        params = map_with_path(lambda path, leaf, name=name: moved(path, leaf, name), start)
        options = OPTIONS.get(name, {}) | ({"initial": start} if name == "llama-pissa" else {})
        save_peft(folder / "ours" / name, model, params, NAMES[kind], **options)
        ours[name] = outputs_of(model, params, kind)
    (folder / "rules.json").write_text(json.dumps({"settings": RULES, "modules": MODULES}))
    script("serve", folder)
    return folder, ours


def moved(path, leaf, name):
    """A trained factor, and what is saved beside the factors."""
    saved = name in OPTIONS and re.fullmatch(r"head/.*|.*[qv]/bias", path)
    if not re.fullmatch(FACTORS, path) and not saved:
        return leaf
    noise = jax.random.normal(fold_path(jax.random.key(2), path), leaf.shape, leaf.dtype)
    return leaf + noise * jnp.asarray(0.3, leaf.dtype)


@pytest.mark.parametrize("name", ADAPTERS)
def test_what_the_installed_peft_writes_gives_its_outputs_here(exchange, name):
    folder, _ = exchange
    kind = name.split("-")[0]
    model, base = base_of(kind, scan=name not in UNROLLED, folder=folder)
    model, params = load_peft(folder / name, model, base, NAMES[kind])
    expected = load_safetensors(folder / "outputs.safetensors")[name]
    np.testing.assert_allclose(outputs_of(model, params, kind), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_installed_peft_writes_the_names_and_shapes_of_the_committed_adapters(exchange, name):
    file = pathlib.Path(name) / "adapter_model.safetensors"
    now, committed = (load_safetensors(folder / file) for folder in (exchange[0], FOLDER))
    assert {key: tensor.shape for key, tensor in now.items()} == {
        key: tensor.shape for key, tensor in committed.items()
    }


@pytest.mark.parametrize("name", OURS)
def test_what_is_written_here_gives_the_same_outputs_in_peft(exchange, name):
    folder, ours = exchange
    theirs = load_safetensors(folder / "ours.safetensors")[name]
    base = load_safetensors(folder / "outputs.safetensors")[name.split("-")[0]]
    assert np.abs(theirs - base).max() > 1e-2
    np.testing.assert_allclose(theirs, ours[name], atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", OURS)
def test_peft_reads_every_tensor_that_is_written_here_and_writes_it_again(exchange, name):
    folder, _ = exchange
    ours, again = (
        load_safetensors(folder / place / name / "adapter_model.safetensors") for place in ("ours", "again")
    )
    assert set(ours) <= set(again)
    assert all(key.endswith(".base_layer.weight") for key in set(again) - set(ours))
    for key, tensor in ours.items():
        np.testing.assert_array_equal(tensor, again[key].astype(tensor.dtype), err_msg=key)


def test_targets_ranks_and_alphas_are_those_of_the_rules_of_peft(exchange):
    answers = json.loads((exchange[0] / "answers.json").read_text())
    seen = set()
    for settings, row in zip(RULES, answers, strict=True):
        config = read_config({"peft_type": "LORA", **settings})
        for module, (target, rank, alpha) in zip(MODULES, row, strict=True):
            assert is_target(config, module) is target, (settings, module)
            assert alpha_and_rank(config, module) == (alpha, rank), (settings, module)
            seen.add((target, rank))
    assert {target for target, _ in seen} == {True, False}
