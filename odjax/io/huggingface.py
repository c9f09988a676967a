"""Models from folders in the layout of Hugging Face: `config.json` beside safetensors.

A folder is what `save_pretrained` writes or a download holds. What a configuration asks for and our model
does not have is an error that names the key; every tensor must have a place and every parameter a tensor.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.io.model_names import (
    BERT,
    BERT_CLASSIFIER,
    DINOV2,
    DINOV2_SWIGLU,
    VIT,
    VIT_CLASSIFIER,
    with_head,
)
from odjax.io.path_map import LLAMA, PathMap, to_params
from odjax.io.safetensors import load_shards
from odjax.models.bert import Bert
from odjax.models.decoder import Decoder
from odjax.models.rotary import RotaryScaling
from odjax.models.vit import ViT

Config = Mapping[str, Any]

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
"""`hidden_act` -> a key of `odjax.models.feedforward.ACTIVATIONS`."""


def load_bert(
    folder: str | Path, *, pooling: str | None = None, **overrides: Any
) -> tuple[Bert, dict[str, Any]]:
    """A BERT encoder with its weights: BertModel, a classifier, a sentence encoder such as all-MiniLM-L6-v2.

    The heads of pretraining (`cls.*`) are left out, and the pooler where another pooling is used.

    Args:
        folder: with `config.json` and safetensors, in one file or in shards with an index.
        pooling: of `odjax.models.bert.Bert`; None: that of `1_Pooling/config.json` for a sentence encoder,
            else "pooler" if there are weights of one, else "cls".
        **overrides: attributes of the model. `classes=` other than the checkpoint's gives a new head of
            zeros, None none; `param_dtype=` converts the weights.

    Returns:
        The model, and its parameters as numpy arrays, in the dtype of the file: on no device yet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something the model does not have, or tensors that do not fit it; all are named.

    Example:
        >>> model, params = load_bert("all-MiniLM-L6-v2")  # doctest: +SKIP
        >>> y = model.apply({"params": params}, tokens, mask, method="embed_sentences")  # doctest: +SKIP
        >>> load_bert("no-such-folder")
        Traceback (most recent call last):
        FileNotFoundError: no-such-folder has no config.json: give a folder in the layout of Hugging Face
    """
    folder = Path(folder)
    config = _config(folder, "bert")
    _refuse(config, "is_decoder", False, "the model is an encoder")
    _refuse(config, "add_cross_attention", False, "the model is an encoder")
    _refuse(config, "position_embedding_type", "absolute", "positions are learned")
    tensors = {_new_name(name): tensor for name, tensor in _tensors(folder).items()}
    inner = "bert." if any(name.startswith("bert.") for name in tensors) else ""
    pooler = f"{inner}pooler.dense.weight" in tensors
    pooling = pooling or _pooling(folder) or ("pooler" if pooler else "cls")
    if pooling != "pooler":
        tensors = _without(tensors, f"{inner}pooler.")
    settings = {
        "vocab": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "mlp_width": config["intermediate_size"],
        "max_length": config["max_position_embeddings"],
        "token_types": config.get("type_vocab_size", 2),
        "pooling": pooling,
        "activation": _activation(config),
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "norm_eps": config.get("layer_norm_eps", 1e-12),
    }
    names = BERT_CLASSIFIER if inner else BERT
    return _built(Bert, settings, overrides, tensors, names, jnp.zeros((1, 1), jnp.int32))


def load_llama(folder: str | Path, **overrides: Any) -> tuple[Decoder, dict[str, Any]]:
    """A decoder with its weights: Llama 1 to 3.2, and Mistral and Qwen3, which have the same tensors.

    Args:
        folder: with `config.json` and safetensors, in one file or in shards with an index.
        **overrides: attributes of `odjax.models.Decoder`; `param_dtype=` converts the weights.

    Returns:
        The model, and its parameters as numpy arrays, in the dtype of the file: on no device yet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something the model does not have (biases, other kinds of rotary scaling, a sliding window
            below `max_length`), or tensors that do not fit it; all are named.

    Example:
        >>> model, params = load_llama("Llama-3.2-1B", dtype=jnp.bfloat16)  # doctest: +SKIP
        >>> logits = model.apply({"params": params}, tokens)  # doctest: +SKIP
        >>> load_llama("no-such-folder")
        Traceback (most recent call last):
        FileNotFoundError: no-such-folder has no config.json: give a folder in the layout of Hugging Face
    """
    folder = Path(folder)
    config = _config(folder, "llama", "mistral", "qwen3")
    for key in ("attention_bias", "mlp_bias"):
        _refuse(config, key, False, "the decoder has no biases")
    _refuse(config, "hidden_act", "silu", "the decoder's feed-forward layer is SwiGLU")
    length = overrides.get("max_length", config["max_position_embeddings"])
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < length:
        raise ValueError(
            f"config.json: sliding_window {window}, and the decoder sees all tokens: pass "
            f"max_length={window}, as up to there the window changes nothing"
        )
    if window is None and set(config.get("layer_types") or ()) - {"full_attention"}:
        raise ValueError(
            f"config.json: layer_types {sorted(set(config['layer_types']))}, the decoder has "
            "full_attention alone"
        )
    theta, scaling = _rotary(config)
    tied = bool(config.get("tie_word_embeddings", False))
    tensors = _tensors(folder)
    settings = {
        "vocab": config["vocab_size"],
        "layers": config["num_hidden_layers"],
        "width": config["hidden_size"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": config.get("head_dim"),
        "mlp_width": config["intermediate_size"],
        "max_length": length,
        "rope_theta": theta,
        "rope_scaling": scaling,
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "qk_norm": config["model_type"] == "qwen3",
        "tied": tied,
    }
    if tied:
        tensors = _without(tensors, "lm_head.")
    return _built(Decoder, settings, overrides, tensors, LLAMA, jnp.zeros((1, 1), jnp.int32))


def load_vit(folder: str | Path, **overrides: Any) -> tuple[ViT, dict[str, Any]]:
    """A Vision Transformer with its weights: ViT, or DINOv2 with registers or without, GELU or SwiGLU.

    Images are [B, height, width, channels]. ViT's pooler and DINOv2's mask token are left out. Positions
    reach other sizes of image as in `transformers` ("bicubic", with registers "bicubic_antialias"); DINOv2's
    own code scales by a slightly different factor ("bicubic_offset").

    Args:
        folder: with `config.json` and safetensors, in one file or in shards with an index.
        **overrides: attributes of `odjax.models.ViT`. `classes=` other than the checkpoint's gives a new head
            of zeros, None none; `param_dtype=` converts the weights.

    Returns:
        The model, and its parameters as numpy arrays, in the dtype of the file: on no device yet.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: something the model does not have, or tensors that do not fit it; all are named.

    Example:
        >>> model, params = load_vit("dinov2-small")  # doctest: +SKIP
        >>> tokens = model.apply({"params": params}, images, method="features")  # doctest: +SKIP
        >>> load_vit("no-such-folder")
        Traceback (most recent call last):
        FileNotFoundError: no-such-folder has no config.json: give a folder in the layout of Hugging Face
    """
    folder = Path(folder)
    config = _config(folder, "vit", "dinov2", "dinov2_with_registers")
    _refuse(config, "qkv_bias", True, "the projections have biases")
    kind, width = config["model_type"], config["hidden_size"]
    tensors = _tensors(folder)
    head = "classifier.weight" in tensors
    settings = {
        "image": _pair(config["image_size"]),
        "patch": _square(config["patch_size"]),
        "channels": config.get("num_channels", 3),
        "layers": config["num_hidden_layers"],
        "width": width,
        "heads": config["num_attention_heads"],
        "dropout": config.get("hidden_dropout_prob", 0.0),
        "norm_eps": config["layer_norm_eps"],
        "interpolation": "bicubic_antialias" if kind == "dinov2_with_registers" else "bicubic",
    }
    if kind == "vit":
        settings |= {"mlp_width": config["intermediate_size"], "activation": _activation(config)}
        names = VIT_CLASSIFIER if head else VIT
    else:
        swiglu = config.get("use_swiglu_ffn", False)
        mlp_width = int(width * config.get("mlp_ratio", 4))
        settings |= {
            "mlp_width": (int(mlp_width * 2 / 3) + 7) // 8 * 8 if swiglu else mlp_width,
            "activation": "swiglu" if swiglu else _activation(config),
            "registers": config.get("num_register_tokens", 4) if kind == "dinov2_with_registers" else 0,
            "layer_scale": float(config.get("layerscale_value", 1.0)),
            "drop_path": config.get("drop_path_rate", 0.0),
            "pool": "cls+mean" if head else "cls",
        }
        tensors = _split_gates(tensors)
        names = DINOV2_SWIGLU if swiglu else DINOV2
        names = with_head(names, f"{kind}.") if head else names
    image = jnp.zeros((1, *settings["image"], settings["channels"]))
    return _built(ViT, settings, overrides, tensors, names, image)


def _built(
    model_class: type[nn.Module],
    settings: dict[str, Any],
    overrides: Mapping[str, Any],
    tensors: dict[str, np.ndarray],
    names: PathMap,
    example: jax.Array,
) -> tuple[Any, dict[str, Any]]:
    """The model of the settings, and its parameters from the tensors."""
    settings["param_dtype"] = max(tensors.values(), key=lambda tensor: tensor.size).dtype
    if "classifier.weight" in tensors:
        settings["classes"] = tensors["classifier.weight"].shape[0]
    model = model_class(**{**settings, **overrides})
    wanted = getattr(model, "classes", None)
    new_head = wanted is not None and wanted != settings.get("classes")
    if wanted != settings.get("classes"):
        tensors = _without(tensors, "classifier.")
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example)["params"])
    params = to_params(tensors, names, like, keep=r"head/.*" if new_head else None)
    # A new head is the only leaf without a tensor, and it begins at zero.
    return model, jax.tree.map(
        lambda leaf, shape: (
            np.asarray(leaf).astype(shape.dtype, copy=False)
            if isinstance(leaf, np.ndarray)
            else np.zeros(shape.shape, shape.dtype)
        ),
        params,
        like,
    )


def _config(folder: Path, *kinds: str) -> Config:
    """The content of `config.json`, of one of those model types and not quantized."""
    path = folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no config.json: give a folder in the layout of Hugging Face")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    kind = config.get("model_type")
    if kind not in kinds:
        raise ValueError(f"{path}: model_type must be one of {', '.join(kinds)}, got {kind!r}")
    if config.get("quantization_config"):
        raise ValueError(f"{path}: the weights are quantized: give the folder of the original ones")
    return config


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    try:
        return load_shards(folder)
    except FileNotFoundError as error:
        if (folder / "pytorch_model.bin").is_file():
            raise FileNotFoundError(
                f"{folder} has pytorch_model.bin, which can run code when it is read: save it as "
                "safetensors first"
            ) from None
        raise error


def _refuse(config: Config, key: str, allowed: Any, why: str) -> None:
    if config.get(key, allowed) != allowed:
        raise ValueError(f"config.json: {key} is {config[key]!r}, only {allowed!r} can be loaded ({why})")


def _activation(config: Config) -> str:
    name = config.get("hidden_act", "gelu")
    if name not in ACTIVATIONS:
        raise ValueError(f"config.json: hidden_act must be one of {', '.join(ACTIVATIONS)}, got {name!r}")
    return ACTIVATIONS[name]


def _rotary(config: Config) -> tuple[float, RotaryScaling | None]:
    """Base and scaling: both in `rope_parameters`, or in `rope_theta` and `rope_scaling` in older files."""
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = float(given.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = given.get("rope_type") or given.get("type") or "default"
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json: partial_rotary_factor is not 1: the decoder rotates whole heads")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"config.json: rope_type must be 'default' or 'llama3', got {kind!r}")
    return theta, RotaryScaling(
        float(given["factor"]),
        float(given["low_freq_factor"]),
        float(given["high_freq_factor"]),
        int(given["original_max_position_embeddings"]),
    )


def _pooling(folder: Path) -> str | None:
    """How a sentence encoder pools, or None where the folder is none."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        return None
    modules = folder / "modules.json"
    kinds = (
        [m["type"].rsplit(".", 1)[-1] for m in json.loads(modules.read_text())] if modules.is_file() else []
    )
    if set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise ValueError(
            f"{modules} has the modules {', '.join(kinds)}; only Transformer, Pooling and Normalize can be "
            "loaded: pass pooling= for the encoder alone"
        )
    config = json.loads(path.read_text())
    on = [key for key, value in config.items() if key.startswith("pooling_mode_") and value]
    modes = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
    found = modes.get(on[0]) if len(on) == 1 else config.get("pooling_mode")
    if found not in ("mean", "cls"):
        raise ValueError(f"{path}: pooling {found or on} must be the mean or the first token; pass pooling=")
    return found


def _new_name(name: str) -> str:
    """The names that LayerNorm had in TensorFlow are in the oldest checkpoints."""
    for old, new in ((".LayerNorm.gamma", ".LayerNorm.weight"), (".LayerNorm.beta", ".LayerNorm.bias")):
        if name.endswith(old):
            return name.removesuffix(old) + new
    return name


def _split_gates(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Cuts `weights_in` of SwiGLU, the gate above the other matrix, in two."""
    out: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        if ".mlp.weights_in." in name:
            gate, up = np.split(tensor, 2)
            out[name.replace("weights_in", "gate_proj")] = gate
            out[name.replace("weights_in", "up_proj")] = up
        else:
            out[name] = tensor
    return out


def _without(tensors: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _square(size: int | Sequence[int]) -> int:
    height, width = _pair(size)
    if height != width:
        raise ValueError(f"config.json: patch_size {height}x{width} must be square")
    return height
