"""The low-rank methods as data: what each one trains, how it starts, and how its factors are scaled.

Every method is W + s A B with A [in, rank] and B [rank, out] (Flax orientation), s = alpha / rank, and
differs in which of the two is trained, in how they start, and in what happens every so many steps.

| method    | trained       | start                        | after that                                    |
|-----------|---------------|------------------------------|-----------------------------------------------|
| `lora`    | A, B          | A random, B = 0              |                                               |
| `rslora`  | A, B          | as `lora`                    | s = alpha / sqrt(rank)                        |
| `rac`     | one of A, B   | that one 0, the other drawn  | merged and drawn again (`restart`)            |
| `asym`    | one of A, B   | that one 0, orthonormal other|                                               |
| `lora_fa` | B             | B = 0, A normal              |                                               |
| `cola`    | A, B          | as `lora`                    | merged and drawn again (`restart`)            |
| `relora`  | A, B          | as `lora`                    | the same, most moments pruned (`restart`)     |
| `dora`    | A, B, lengths | as `lora`, lengths of W      | columns of the sum are rescaled to the lengths|
| `pissa`   | A, B          | principal part of W          | W is the rest                                 |
| `dylora`  | A, B          | as `lora`                    | a rank is drawn at every step                 |

ReLoRA's code may also train the scale, s = tanh(t) with one number t a layer. It is left out: B is trained
without bounds and takes up any scale, and a leaf more would be in every merge, restart and exchanged file.

Sources: LoRA, Hu et al. 2021; rsLoRA, Kalajdzievski 2023; RAC-LoRA, Malinovsky et al. 2024; asymmetric LoRA,
Zhu et al. 2024; LoRA-FA, Zhang et al. 2023; COLA, Xia et al. 2024; ReLoRA, Lialin et al. 2023; DoRA, Liu et
al. 2024; PiSSA, Meng et al. 2024; DyLoRA, Valipour et al. 2022.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import Where
from odjax.lowrank.sketches import COORDINATES, SIDES, check_law, check_scale, fixed_side

METHODS = ("lora", "rslora", "rac", "asym", "lora_fa", "cola", "relora", "dora", "pissa", "dylora")
SKETCHED = ("rac", "asym", "lora_fa")
CHAINS = ("rac", "cola", "relora")
INITS = ("kaiming", "gaussian")

FACTORS = r"(.*/)?lora_(a|b|magnitude)"
"""`where` of everything that a low-rank method trains; the random halves and the weights are not in it."""

ADDED = r"(.*/)?lora_(a|b|magnitude|sketch|frozen)"
"""`where` of every leaf that `adapt` adds to the parameters of a model."""


@dataclass(frozen=True)
class LowRank:
    """A low-rank method with its settings. See `odjax.lowrank.adapt`, whose arguments these are.

    Attributes:
      method: one of `METHODS`.
      rank: of the update of each adapted matrix.
      alpha: the update is scaled by alpha / rank (`rslora`: alpha / sqrt(rank)); None for a scale of 1.
      where: which leaves are adapted; a path is that of the weight, "layers/attn/q/kernel".
      side: which side the frozen half is on, for `rac` and `asym`: "right" freezes A (input side), "left" B
        (output side), "auto" the one whose dimension is smaller.
      law: of the frozen half, see `odjax.lowrank.sketches`; None for that of the method.
      sketch_scale: of the frozen half, see `odjax.lowrank.sketches`; None for that of the method.
      init: of A where both are trained, "kaiming" (uniform) or "gaussian" (deviation 1 / rank).
      dropout: of the adapter's input, while there is a "dropout" key.
      rank_pattern: pairs (pattern of a path, rank); the first that matches wins over `rank`.
      alpha_pattern: pairs (pattern of a path, alpha); the first that matches wins over `alpha`.
      cache_sketch: keep the frozen half as an array instead of drawing it again in every step.
      clip_rank: cut a rank down to the smaller dimension of a matrix instead of refusing it.
      train_all: `dylora` only: train all of the drawn rank, not only its last row and column.
      dtype: of the factors.
      precondition: multiply the gradient of the trained half by s^-2 (Q^T Q)^+, Q the frozen half.

    Raises:
      ValueError: at construction, naming the argument, what came and what was needed.
      TypeError: a number of the wrong type.
    """

    method: str = "lora"
    rank: int = 8
    alpha: float | None = None
    where: Where = r"(.*/)?kernel"
    side: str = "auto"
    law: str | Callable[..., Any] | None = None
    sketch_scale: str | float | None = None
    init: str = "kaiming"
    dropout: float = 0.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_pattern: tuple[tuple[str, float], ...] = ()
    cache_sketch: bool = False
    clip_rank: bool = False
    train_all: bool = False
    dtype: DTypeLike = jnp.float32
    precondition: bool = False

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("method", self.method, METHODS),
            ("init", self.init, INITS),
        ):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
        if self.side not in SIDES:
            raise ValueError(
                f"side must be one of {', '.join(SIDES)}, got {self.side!r}: factors keep their shapes, so a "
                "side that is drawn for each block needs the gradient view, odjax.rac_lora"
            )
        if self.law is not None:
            check_law(self.law)
        if self.sketch_scale is not None:
            check_scale(self.sketch_scale)
        if self.method not in SKETCHED:
            for name in ("law", "sketch_scale"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"method {self.method!r} trains both factors and draws no sketch: drop {name}=, or "
                        f"choose one of {', '.join(SKETCHED)}"
                    )
        for name in ("precondition", "cache_sketch"):
            if getattr(self, name) and self.method not in SKETCHED:
                raise ValueError(
                    f"method {self.method!r} has no frozen half: drop {name}=, or choose one of "
                    f"{', '.join(SKETCHED)}"
                )
        if self.cache_sketch and self.law in COORDINATES:
            raise ValueError(
                f"law={self.law!r} draws rank indices, there is no array to keep: drop cache_sketch="
            )
        if self.method == "lora_fa" and self.side == "left":
            raise ValueError("lora_fa freezes A, which is side='right': choose method='asym' for side='left'")
        alphas = (self.alpha, *(alpha for _, alpha in self.alpha_pattern))
        if self.method == "pissa" and any(alpha is not None and alpha <= 0 for alpha in alphas):
            raise ValueError(
                "pissa takes the root of S / s: alpha must be positive, or None for a scale of 1"
            )
        if self.precondition and 0.0 in alphas:
            raise ValueError(
                "precondition divides by the scale: alpha must not be 0, pass None for a scale of 1"
            )
        _check_rank("rank", self.rank)
        _check_alpha("alpha", self.alpha)
        for pattern, rank in self.rank_pattern:
            _check_rank(f"rank_pattern[{pattern!r}]", rank)
        for pattern, alpha in self.alpha_pattern:
            _check_alpha(f"alpha_pattern[{pattern!r}]", alpha)
        for pattern, _ in (*self.rank_pattern, *self.alpha_pattern):
            _check_pattern(pattern)
        if not callable(self.where):
            if not isinstance(self.where, str):
                raise TypeError(f"where must be a regular expression or a predicate, got {self.where!r}")
            _check_pattern(self.where)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype of the factors must be a real floating one, got {self.dtype}")


def _check_rank(name: str, rank: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"{name} must be an int, got {rank!r}")
    if rank < 1:
        raise ValueError(f"{name} must be at least 1, got {rank}: to leave a leaf alone, narrow where=")


def _check_alpha(name: str, alpha: Any) -> None:
    if alpha is not None and not math.isfinite(alpha):
        raise ValueError(f"{name} must be a finite number, or None for a scale of 1, got {alpha}")


def _check_pattern(pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error.msg}") from None


def _first(pairs: tuple[tuple[str, Any], ...], path: str, default: Any) -> Any:
    return next((value for pattern, value in pairs if re.fullmatch(pattern, path)), default)


def rank_of(spec: LowRank, path: str, inputs: int, outputs: int) -> int:
    """The rank of the update of one matrix.

    Args:
      spec: the method.
      path: of the weight.
      inputs: its input dimension, all input axes together.
      outputs: its output dimension, all output axes together.

    Returns:
      The rank.

    Raises:
      ValueError: the rank is above the smaller dimension, where the method needs that many directions.

    Example:
      >>> rank_of(LowRank(rank=8, rank_pattern=((".*/q/kernel", 2),)), "attn/q/kernel", 16, 16)
      2
    """
    rank = _first(spec.rank_pattern, path, spec.rank)
    limit = min(inputs, outputs)
    if rank > limit and spec.clip_rank:
        return limit
    if rank > limit and spec.method in (*SKETCHED, "pissa"):
        raise ValueError(
            f"rank {rank} is above the smaller dimension of {path!r} [{inputs}, {outputs}]: lower it with "
            f"rank_pattern={{{path!r}: {limit}}}, or pass clip_rank=True"
        )
    return rank


def scale_of(spec: LowRank, path: str, rank: int) -> float:
    """The scale s of an update: alpha / rank, or alpha / sqrt(rank) for `rslora`; 1 without an alpha.

    Args:
      spec: the method.
      path: of the weight.
      rank: of its update.

    Returns:
      The scale.

    Example:
      >>> scale_of(LowRank(alpha=16.0), "attn/q/kernel", 8)
      2.0
    """
    alpha = _first(spec.alpha_pattern, path, spec.alpha)
    if alpha is None:
        return 1.0
    return alpha / math.sqrt(rank) if spec.method == "rslora" else alpha / rank


def side_of(spec: LowRank, inputs: int, outputs: int) -> str | None:
    """The side of the frozen half: "right" for A, "left" for B, None where both are trained.

    Args:
      spec: the method.
      inputs: input dimension of the matrix.
      outputs: output dimension of the matrix.

    Returns:
      The side. "auto" is, for `rac`, that of the smaller dimension d, as progress a step is rank / d; "right"
      otherwise.

    Example:
      >>> side_of(LowRank(method="rac"), 64, 16)
      'left'
    """
    if spec.method not in SKETCHED:
        return None
    if spec.side == "auto" and spec.method != "rac":
        return "right"
    return fixed_side(spec.side, inputs, outputs)


def sketch_of(spec: LowRank) -> tuple[Any, Any]:
    """Law and scale of the frozen half: the settings, or what the paper of the method uses.

    Args:
      spec: the method.

    Returns:
      (law, scale) as in `odjax.lowrank.sketches.sketch`.

    Example:
      >>> sketch_of(LowRank(method="rac"))
      ('orthonormal', 'unit_rms')
    """
    law, scale = {
        "rac": ("orthonormal", "unit_rms"),
        "asym": ("orthonormal", "orthonormal"),
        "lora_fa": ("gaussian", "orthonormal"),
    }[spec.method]
    return spec.law or law, scale if spec.sketch_scale is None else spec.sketch_scale
