"""Residual networks of the CIFAR family from a file of tensors with PyTorch's names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from odjax.io.model_names import RESNET
from odjax.io.path_map import to_params
from odjax.io.safetensors import load_safetensors
from odjax.models.resnet import STAGES, ResNet

PARALLEL = "module."
"""What the names of a model start with that was saved inside `torch.nn.DataParallel`."""


def load_resnet(
    path: str | Path, *, key: jax.Array | None = None, **overrides: Any
) -> tuple[ResNet, dict[str, Any]]:
    """A residual network with its weights; depth, widths, shortcuts and classes follow from the tensors.

    A checkpoint of PyTorch becomes such a file by `load_torch_checkpoint` and `save_safetensors`.

    Args:
        path: of a `.safetensors` file with the names of `odjax.io.RESNET` ("layer1.0.conv1.weight"), each
            after "module." or not. `num_batches_tracked` is left out.
        key: for what the file does not have, the parameters of a `pool=`; None is key 0.
        **overrides: attributes of `odjax.models.ResNet`. `classes=` other than the file's gives a new head of
            zeros, None none; `param_dtype=` converts the weights.

    Returns:
        The model, and {"params": ..., "batch_stats": ...} as numpy arrays, the parameters in the dtype of the
        file and the statistics in float32: on no device yet.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the tensors are not those of such a network; all that do not fit are named.

    Example:
        >>> model, variables = load_resnet("resnet20.safetensors")  # doctest: +SKIP
        >>> maps = model.apply(variables, images, method="features")  # doctest: +SKIP
        >>> load_resnet("no-such-file")
        Traceback (most recent call last):
        FileNotFoundError: [Errno 2] No such file or directory: 'no-such-file'
    """
    tensors: dict[str, np.ndarray] = load_safetensors(path)
    if tensors and all(name.startswith(PARALLEL) for name in tensors):
        tensors = {name.removeprefix(PARALLEL): tensor for name, tensor in tensors.items()}
    settings = _settings(Path(path), tensors)
    model = ResNet(**{**settings, **overrides})
    new_head = model.classes is not None and model.classes != settings["classes"]
    if model.classes != settings["classes"]:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("linear.")}
    example = jnp.zeros((1, 8, 8, model.channels))
    like = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), example))
    keep = rf"params/({'head|' if new_head else ''}pool)/.*"
    found = to_params(tensors, RESNET, like, keep=keep)
    if not all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found)):
        start = nn.unbox(jax.jit(model.init)(jax.random.key(0) if key is None else key, example))
        found = jax.tree.map(
            lambda leaf, new: leaf if isinstance(leaf, np.ndarray) else np.asarray(new), found, start
        )
    return model, jax.tree.map(lambda leaf, shape: leaf.astype(shape.dtype, copy=False), found, like)


def _settings(path: Path, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What the names and shapes of the tensors say of the network."""
    blocks = {
        (int(match[1]), int(match[2]))
        for match in map(re.compile(r"layer(\d+)\.(\d+)\.").match, tensors)
        if match
    }
    count = len({block for stage, block in blocks if stage == 1})
    stem = tensors.get("conv1.weight")
    even = {(stage + 1, block) for stage in range(STAGES) for block in range(count)}
    if stem is None or stem.ndim != 4 or not count or blocks != even:
        raise ValueError(
            f"{path} is no residual network of the CIFAR family: needed are conv1.weight and "
            f"layer{{1..{STAGES}}}.{{0..n-1}}, it has the tensors {', '.join(list(tensors)[:4]) or 'none'}"
        )
    head = tensors.get("linear.weight")
    return {
        "depth": 2 * STAGES * count + 2,
        "classes": None if head is None else head.shape[0],
        "channels": stem.shape[1],
        "width": stem.shape[0],
        "shortcut": "projection" if any(".shortcut." in name for name in tensors) else "pad",
        "param_dtype": stem.dtype,
    }
