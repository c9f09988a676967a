"""Adapting a run by the command line: start from another one, train factors, restart, merge, go on."""

import json
import pathlib
import re

import flax.linen as nn
import jax
import numpy as np
import pytest

from odjax.core import leaves_with_paths
from odjax.io import load_llama, load_safetensors, safetensors_metadata, save_safetensors
from odjax.lowrank import adapt
from odjax.models import MLP, decoder
from odjax_train import cli
from odjax_train.errors import UserError
from odjax_train.pretrained import start_from

CONFIG = '''
"""A small model, adapted."""
from pathlib import Path
import optax
from odjax.lowrank import FACTORS, adapt, restart
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text

def experiment(method: str = "rac", start: Path | None = None, steps: int = 4, every: int = 2, rate: float = 1e-2,
               width: int = 96) -> Experiment:
    """A small model, adapted.

    Args:
        method: `none` for the bare model.
    """
    model, trainable, edits = decoder("tiny", max_length=64, width=width), ".*", ()
    if method != "none":
        model, trainable = adapt(model, method=method, rank=2), FACTORS
        edits = (restart(model, every=3),) if method == "rac" else ()
    return Experiment(
        model=model, task=language_model(), data=Text(source="text:{text_file}", length=32),
        optimizer=optax.adam(rate), trainable=trainable, edits=edits, start_from=start, steps=steps, batch=8,
        eval_every=every, eval_batches=2, checkpoint_every=every, log_every=1,
    )
'''


@pytest.fixture(scope="module")
def config(tmp_path_factory, text_file):
    path = tmp_path_factory.mktemp("adapted") / "small.py"
    path.write_text(CONFIG.lstrip().replace("{text_file}", str(text_file)))
    return path


def _train(config, run, *flags):
    with jax.numpy_dtype_promotion("standard"):
        assert cli.run(["train", str(config), "--run", str(run), *flags, "--debug"]) == 0
    return run


@pytest.fixture(scope="module")
def base(config):
    return _train(config, config.parent / "base", "--method", "none", "--steps", "2", "--mesh", "2,2,2")


@pytest.fixture(scope="module")
def chain(config, base):
    return _train(config, config.parent / "chain", "--start", str(base), "--mesh", "2,2,2")


def held_out(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if line.get("kind") == "eval"}


def test_an_adapted_run_is_judged_before_its_first_step(base, chain):
    assert held_out(chain)[0] == pytest.approx(held_out(base)[2], rel=1e-5)
    assert list(held_out(chain)) == [0, 2, 4]
    edits = [
        json.loads(line) for line in (chain / "metrics.jsonl").read_text().splitlines() if '"edit"' in line
    ]
    assert [(line["step"], line["edit"]) for line in edits] == [(3, "restart")]


def test_the_merged_weights_are_those_that_the_adapted_run_computes_with(
    odjax, config, base, chain, tmp_path
):
    status, out, _ = odjax("merge", chain, "--cpu-devices", 8)
    assert status == 0
    path = chain / "merged.safetensors"
    assert re.search(r"step 4 merged: .*merged\.safetensors \(\d", out)
    tensors = load_safetensors(path)
    assert not [name for name in tensors if "lora" in name]
    assert safetensors_metadata(path)["step"] == "4"
    bare = tmp_path / "bare"
    flags = ("--method", "none", "--start", path, "--steps", 1, "--every", 1, "--rate", 0.0)
    status, out, err = odjax("train", config, "--run", bare, *flags)
    assert status == 0, err
    assert f"starting from {path}: {len(tensors)} parameters taken over" in out
    assert held_out(bare)[0] == pytest.approx(held_out(chain)[4], rel=1e-5)
    status, _, err = odjax("train", config, "--run", tmp_path / "wide", *flags, "--width", 128)
    assert status == cli.MISTAKE
    assert "has embed/embedding with shape (256, 96), this model with (256, 128)" in err


def test_merged_numbers_may_be_narrower(odjax, chain, tmp_path):
    out = tmp_path / "deep" / "half.safetensors"
    assert odjax("merge", chain, "--dtype", "bfloat16", "--out", out)[0] == 0
    full = tmp_path / "full.safetensors"
    assert odjax("merge", chain, "--out", full)[0] == 0
    wide, narrow = load_safetensors(full), load_safetensors(out)
    for name, tensor in narrow.items():
        assert tensor.dtype.name == "bfloat16"
        np.testing.assert_array_equal(tensor, wide[name].astype(tensor.dtype))


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_a_run_that_is_not_adapted_has_nothing_to_merge(odjax, base, verb):
    status, _, err = odjax(verb, base)
    assert status == cli.MISTAKE
    assert f"the run's model, a Decoder, is not adapted: there is nothing to {verb}" in err


def test_a_chain_is_not_exported_as_its_last_block(odjax, chain):
    status, _, err = odjax("export", chain)
    assert status == cli.MISTAKE
    assert "the run has merged blocks into its weights by step 4" in err


def test_an_exported_adapter_is_the_one_that_was_trained(odjax, chain, tmp_path):
    before = tmp_path / "before"
    status, out, err = odjax("export", chain, "--step", 2, "--out", before, "--base", "mine")
    assert status == 0, err
    assert out == f"step 2 exported: {before}\n"
    assert json.loads((before / "adapter_config.json").read_text())["base_model_name_or_path"] == "mine"
    merged, torch = tmp_path / "merged.safetensors", tmp_path / "torch.safetensors"
    assert odjax("merge", chain, "--step", 2, "--out", merged)[0] == 0
    assert odjax("merge", chain, "--step", 2, "--out", torch, "--names", "torch")[0] == 0
    weights, named = load_safetensors(merged), load_safetensors(torch)
    factors = load_safetensors(before / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    np.testing.assert_array_equal(named[f"{name}.weight"], weights["layers/mlp/down/kernel"][1].T)
    first = load_safetensors(_merged_start(odjax, chain, tmp_path))["layers/mlp/down/kernel"][1].T
    a, b = (factors[f"base_model.model.{name}.lora_{half}.weight"] for half in "AB")
    np.testing.assert_allclose(first + b @ a, named[f"{name}.weight"], rtol=1e-5, atol=1e-6)


def _merged_start(odjax, chain, folder):
    """The weights that the chain began with; the base run is not adapted and cannot be merged."""
    start = json.loads((chain / "run.json").read_text())["arguments"]["start"]
    params, _ = start_from(pathlib.Path(start), _parameters(), decoder("tiny", max_length=64))
    path = folder / "start.safetensors"
    save_safetensors(path, dict(leaves_with_paths(params)))
    return path


def _parameters():
    model = decoder("tiny", max_length=64)
    return nn.unbox(model.init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"])


@pytest.mark.parametrize("scan", [True, False])
def test_a_model_starts_from_a_folder_of_hugging_face(scan):
    folder = pathlib.Path(__file__).parents[1] / "io" / "huggingface" / "llama3"
    bare, weights = load_llama(folder, scan=scan, max_length=16)
    model = adapt(bare, rank=1)
    like = nn.unbox(model.init(jax.random.key(0), jax.numpy.zeros((1, 4), int))["params"])
    params, text = start_from(folder, like, model)
    found = dict(leaves_with_paths(params))
    for path, leaf in leaves_with_paths(weights):
        np.testing.assert_array_equal(found[path], leaf)
    assert text.startswith(f"starting from {folder}: ")
    with pytest.raises(UserError, match="is of another model: rope_theta 10.0 here, 50.0 there"):
        start_from(folder, like, bare.clone(rope_theta=10.0))
    with pytest.raises(UserError, match="a MLP cannot be loaded from there, only Decoder, Bert, ViT"):
        start_from(folder, like, MLP((3, 2)))


def test_ranks_are_served_by_dylora_alone(odjax, chain):
    status, _, err = odjax("merge", chain, "--rank", 1)
    assert status == cli.MISTAKE
    assert "the method is 'rac'" in err


def test_factors_do_not_fit_into_a_bare_model(odjax, config, chain, tmp_path):
    status, _, err = odjax("train", config, "--run", tmp_path / "x", "--method", "none", "--start", chain)
    assert status == cli.MISTAKE
    assert "that this model does not have; odjax merge puts factors into the weights" in err


def test_a_damaged_file_is_not_started_from(odjax, config, tmp_path):
    path = tmp_path / "broken.safetensors"
    save_safetensors(path, {"w": np.zeros(3, np.float32)})
    path.write_bytes(path.read_bytes()[:-4])
    status, _, err = odjax("train", config, "--run", tmp_path / "x", "--start", path)
    assert status == cli.MISTAKE
    assert f"{path} cannot be read: " in err
    status, _, err = odjax("train", config, "--run", tmp_path / "y", "--start", tmp_path / "none.safetensors")
    assert status == cli.MISTAKE
    assert "none.safetensors cannot be read" in err


@pytest.mark.parametrize("method", ["pissa", "dora"])
def test_factors_that_start_from_the_weights_start_from_those_taken_over(tmp_path, method):
    model = adapt(nn.Dense(6), method=method, rank=2)
    x = jax.random.normal(jax.random.key(0), (3, 5))
    weights = {
        "kernel": np.random.default_rng(0).normal(size=(5, 6)).astype(np.float32),
        "bias": np.ones(6, "f"),
    }
    path = tmp_path / "weights.safetensors"
    save_safetensors(path, weights)
    params, text = start_from(path, model.init(jax.random.key(1), x)["params"], model)
    assert text == f"starting from {path}: 2 parameters taken over, {len(params) - 2} new ones"
    expected = np.asarray(x) @ weights["kernel"] + weights["bias"]
    np.testing.assert_allclose(model.apply({"params": params}, x), expected, rtol=1e-4, atol=1e-5)
    if method == "pissa":
        assert not np.allclose(params["kernel"], weights["kernel"])
    else:
        lengths = np.linalg.norm(weights["kernel"], axis=0)
        np.testing.assert_allclose(params["lora_magnitude"], lengths, rtol=1e-5)
