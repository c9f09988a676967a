"""Adapters by interception: a Linen module in, a Linen module out.

The calls of `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed` inside a model are
intercepted; the factors are parameters in the scope of the module they belong to. So the parameters of the
bare model keep their paths (a checkpoint of it is a part of the tree), `nn.scan`, `nn.remat` and axis names
work as for any parameter, and the update is applied to activations, y = x W + s (x A) B: nothing of the size
of a weight is made in a step.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import Where, select
from odjax.lowrank.intercept import interceptor
from odjax.lowrank.layers import ADAPTABLE
from odjax.lowrank.methods import LowRank
from odjax.lowrank.switch import On, check_on


def adapt(
    model: nn.Module,
    *,
    rank: int = 8,
    where: Where = r"(.*/)?kernel",
    method: str = "lora",
    alpha: float | None = None,
    side: str = "auto",
    law: str | Callable[..., Any] | None = None,
    sketch_scale: str | float | None = None,
    init: str = "kaiming",
    dropout: float = 0.0,
    rank_pattern: Mapping[str, int] | None = None,
    alpha_pattern: Mapping[str, float] | None = None,
    cache_sketch: bool = False,
    clip_rank: bool = False,
    train_all: bool = False,
    dtype: DTypeLike = jnp.float32,
    precondition: bool = False,
) -> Adapted:
    """Adapts a Linen model with low-rank factors.

    The result has the methods and attributes of the model. Its parameters are those of the model, under the
    same paths, and `lora_*` beside each adapted weight. Train what `odjax.lowrank.FACTORS` selects: split the
    parameters with `odjax.core.partition` and differentiate that part alone. Weights that are not adapted
    may be trained too.

    Rank-dropping (`dylora`) and dropout are on while there is a "dropout" key.

    Args:
      model: the model; not bound to variables.
      rank: of the update of each adapted matrix.
      where: which weights are adapted, by their path in the model ("layers/attn/(q|v)/kernel",
        "embed/embedding"), or a predicate `(path, weight) -> bool`; in a scanned stack the weight is that of
        one layer.
      method: one of `odjax.lowrank.methods.METHODS`.
      alpha: the update is scaled by alpha / rank (`rslora`: alpha / sqrt(rank)); None for a scale of 1.
      side: which side the frozen half of `rac` and `asym` is on: "right" (inputs), "left" (outputs), "auto".
      law: of that half: a name of `odjax.lowrank.LAWS` or a function.
      sketch_scale: of that half: "unit_rms", "orthonormal" or a number.
      init: of A where both factors are trained: "kaiming" or "gaussian".
      dropout: probability of dropping an input of the adapter.
      rank_pattern: pattern of a weight's path -> rank; the first that matches wins.
      alpha_pattern: pattern of a weight's path -> alpha; the first that matches wins.
      cache_sketch: keep the frozen half as an array (rank numbers more a row) instead of drawing it in every
        step; the laws "coordinate" and "cyclic" have no array to keep.
      clip_rank: cut a rank down to the smaller dimension of a matrix instead of refusing it.
      train_all: `dylora` only: train all of the drawn rank instead of its last row and column.
      dtype: of the factors.
      precondition: methods with a frozen half Q only: multiply the gradient of the trained half by
        s^-2 (Q^T Q)^+. SGD with rate gamma is then projected gradient descent with rate gamma for every law
        and scale, up to the length of a block; it is what PEFT's LoRA-FA optimizer does, which adds 1e-8 to
        the diagonal where this takes the pseudo-inverse. The gradient that `jax.grad` gives is then that
        preconditioned one.

    Returns:
      The adapted model.

    Raises:
      ValueError: a setting that is not possible; at `init`, when `where` selects nothing, when a rank is
        above the smaller dimension of a weight, or when a selected layer cannot be adapted.
      TypeError: a model that is no Linen module, or a setting of the wrong type.

    Source: Hu et al. 2021, "LoRA", equation 3; Malinovsky et al. 2024, "RAC-LoRA", algorithm 1; see
    `odjax.lowrank.methods` for the others.

    Example:
      >>> model = adapt(nn.Dense(4), rank=2, method="rac")
      >>> params = model.init(jax.random.key(0), jnp.ones((1, 8)))["params"]
      >>> sorted(params)
      ['bias', 'kernel', 'lora_a', 'lora_sketch']
      >>> params["lora_a"].shape
      (8, 2)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"adapt takes a flax.linen module, got {type(model).__name__}: for other parameters use "
            "odjax.lowrank.parameter_adapter"
        )
    if isinstance(model, Adapted):
        raise ValueError("the model is adapted already: merge it first, or adapt model.inner")
    spec = LowRank(
        method=method,
        rank=rank,
        alpha=alpha,
        where=where,
        side=side,
        law=law,
        sketch_scale=sketch_scale,
        init=init,
        dropout=dropout,
        rank_pattern=tuple((rank_pattern or {}).items()),
        alpha_pattern=tuple((alpha_pattern or {}).items()),
        cache_sketch=cache_sketch,
        clip_rank=clip_rank,
        train_all=train_all,
        dtype=dtype,
        precondition=precondition,
    )
    return Adapted(model, spec)


class Adapted(nn.Module):
    """A model with low-rank factors, made by `adapt`. It has the methods and attributes of the model.

    Every method takes `on=` beside its own arguments, which takes the place of the attribute in that call.

    Attributes:
      inner: the model.
      spec: the method and its settings.
      on: whether the factors are applied: True, False (the model alone is traced), or one value an example,
        see `odjax.lowrank.switched`.
    """

    inner: nn.Module
    spec: LowRank
    on: On = True

    def setup(self) -> None:
        """Gives the model the scope of this module, so that its parameters keep their paths."""
        nn.share_scope(self, self.inner)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the model.

        Args:
          *args: of the model.
          **kwargs: of the model.

        Returns:
          What the model returns.
        """
        return self.run("__call__", *args, **kwargs)

    def run(self, method: str, *args: Any, on: On | None = None, **kwargs: Any) -> Any:
        """Calls a method of the model with its layers adapted.

        Args:
          method: name of the method.
          *args: of the method.
          on: like the attribute; None for that.
          **kwargs: of the method.

        Returns:
          What the method returns.

        Raises:
          ValueError: while parameters are made, when `where` selects no weight; an `on` that is not one value
            an example.
          TypeError: an `on` that is neither bool nor floating point.
        """
        on = check_on(self.on if on is None else on)
        growing = self.is_mutable_collection("params")
        if on is False and not growing:
            return getattr(self.inner, method)(*args, **kwargs)
        draw = None
        if self.spec.method == "dylora" and on is not False and self.has_rng("dropout"):
            draw = jax.random.uniform(self.make_rng("dropout"))
        seen: dict[str, bool] = {}
        with nn.intercept_methods(interceptor(self.spec, len(self.path), draw, seen, on)):
            result = getattr(self.inner, method)(*args, **kwargs)
        if method == "__call__" and growing:
            _check_selected(self.spec, seen)
        return result

    def __getattr__(self, name: str) -> Any:
        """What the model has and this class has not: its methods, adapted, and its attributes."""
        inner = self.__dict__.get("inner")
        if not name.startswith("_") and inner is not None:
            if inspect.isfunction(getattr(type(inner), name, None)):
                return types.MethodType(_delegate(name), self)
            if hasattr(inner, name):
                return getattr(inner, name)
        return super().__getattr__(name)


def switched(model: Adapted, on: On) -> Adapted:
    """An adapted model whose factors are applied, not applied, or applied to some examples.

    The parameters are the same. A call may also say it: `model.apply(variables, x, on=on)`; this is for code
    that calls the model itself, such as `odjax.models.generate.generate`.

    | on            | an adapted layer gives                                           |
    |---------------|------------------------------------------------------------------|
    | True          | y + update                                                       |
    | False         | y; no factor is in the program                                   |
    | bool [B]      | y + update for examples that are True, y for those that are not  |
    | floating [B]  | y + on * update                                                  |

    The first axis of what an adapted layer gives must be the examples: a table of positions, which is looked
    up once for all of them, cannot be switched one by one.

    Args:
      model: what `odjax.lowrank.adapt` returned.
      on: Python's bool is static; an array [B] may be traced.

    Returns:
      The model with that switch. While parameters are made, the factors are made too, whatever it says.

    Raises:
      TypeError: another model, or an `on` that is neither bool nor floating point.
      ValueError: an array that is not one value an example; when called, one of another length than the
        batch.

    Source: Elesedy et al. 2024, "LoRA-Guard", section 3: the generating and the guarding path.

    Example:
      >>> model = adapt(nn.Dense(1, use_bias=False), rank=1)
      >>> params = {"kernel": jnp.ones((2, 1)), "lora_a": jnp.ones((2, 1)), "lora_b": jnp.ones((1, 1))}
      >>> on = jnp.array([True, False])
      >>> switched(model, on).apply({"params": params}, jnp.ones((2, 2)))
      Array([[4.],
             [2.]], dtype=float32)
    """
    if not isinstance(model, Adapted):
        raise TypeError(
            f"switched takes the model that odjax.lowrank.adapt returned, got {type(model).__name__}"
        )
    return model.clone(on=check_on(on))


def _delegate(name: str) -> Callable[..., Any]:
    def call(self: Adapted, *args: Any, **kwargs: Any) -> Any:
        return self.run(name, *args, **kwargs)

    return call


def _check_selected(spec: LowRank, seen: dict[str, bool]) -> None:
    if not seen:
        raise ValueError(
            "the model calls no layer that can be adapted: "
            + ", ".join(f"nn.{layer.__name__}" for layer in ADAPTABLE)
        )
    if not any(seen.values()):
        select(dict.fromkeys(seen, 0.0), spec.where if isinstance(spec.where, str) else lambda *_: False)
    chosen = {path: 0.0 for path, hit in seen.items() if hit}
    for pattern, _ in (*spec.rank_pattern, *spec.alpha_pattern):
        select(chosen, pattern)
