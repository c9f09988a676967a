"""Adapters by interception: a Linen module in, a Linen module out.

The calls of `nn.Dense`, `nn.DenseGeneral`, `nn.Einsum`, `nn.Conv` and `nn.Embed` inside a model are
intercepted; the factors are parameters in the scope of the module they belong to. So the parameters of the
bare model keep their paths (a checkpoint of it is a part of the tree), `nn.scan`, `nn.remat` and axis names
work as for any parameter, and the update is applied to activations, y = x W + s (x A) B: nothing of the size
of a weight is made in a step.
"""

from __future__ import annotations

import inspect
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import Where, fold_path, select
from odjax.lowrank.factors import LEAVES, Recipe, Sizes, both, column_norms, frozen_half, recipes, truncated
from odjax.lowrank.layers import (
    ADAPTABLE,
    REFUSED,
    axis_names,
    conv_sizes,
    product_of,
    product_sizes,
    spread_bias,
    variable_of,
)
from odjax.lowrank.methods import LowRank, scale_of


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
        step.
      clip_rank: cut a rank down to the smaller dimension of a matrix instead of refusing it.
      train_all: `dylora` only: train all of the drawn rank instead of its last row and column.
      dtype: of the factors.

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
    )
    return Adapted(model, spec)


class Adapted(nn.Module):
    """A model with low-rank factors, made by `adapt`. It has the methods and attributes of the model.

    Attributes:
      inner: the model.
      spec: the method and its settings.
    """

    inner: nn.Module
    spec: LowRank

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

    def run(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """Calls a method of the model with its layers adapted.

        Args:
          method: name of the method.
          *args: of the method.
          **kwargs: of the method.

        Returns:
          What the method returns.

        Raises:
          ValueError: while parameters are made, when `where` selects no weight.
        """
        draw = None
        if self.spec.method == "dylora" and self.has_rng("dropout"):
            draw = jax.random.uniform(self.make_rng("dropout"))
        seen: dict[str, bool] = {}
        with nn.intercept_methods(_interceptor(self.spec, len(self.path), draw, seen)):
            result = getattr(self.inner, method)(*args, **kwargs)
        if method == "__call__" and self.is_mutable_collection("params"):
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


def _interceptor(
    spec: LowRank, depth: int, draw: jax.Array | None, seen: dict[str, bool]
) -> Callable[..., Any]:
    """The interceptor of one call of the model; it notes in `seen` which weights there were."""
    busy = False  # a convolution of the adapter is no layer to adapt

    def intercept(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
        nonlocal busy
        module, name = context.module, context.method_name
        table = isinstance(module, nn.Embed)
        known = isinstance(module, ADAPTABLE)
        expected = ("setup", "__call__", "attend") if table else ("__call__",)
        if busy or not (known or isinstance(module, REFUSED)) or name not in expected:
            return call(*args, **kwargs)
        result = call(*args, **kwargs)
        leaf = "embedding" if table else "kernel"
        path = "/".join((*module.path[depth:], leaf))
        weight = variable_of(module, leaf)
        hit = _selected(spec, path, weight)
        seen[path] = seen.get(path, False) or hit
        if not hit:
            return result
        if not known:
            raise ValueError(
                f"{path!r} belongs to a {type(module).__name__}, which cannot be adapted: "
                "exclude it with where="
            )
        busy = True
        try:
            if name == "setup":
                _declare(spec, path, module, Sizes((), *((n,) for n in weight.shape)), weight)
                return result
            return _adapted(spec, path, module, weight, result, draw, name, *args, **kwargs)
        finally:
            busy = False

    return intercept


def _selected(spec: LowRank, path: str, weight: jax.Array) -> bool:
    if callable(spec.where):
        return bool(spec.where(path, weight))
    return re.fullmatch(spec.where, path) is not None


def _adapted(
    spec: LowRank,
    path: str,
    module: nn.Module,
    weight: jax.Array,
    y: jax.Array,
    draw: jax.Array | None,
    name: str,
    x: jax.Array,
    *rest: Any,
    **kwargs: Any,
) -> jax.Array:
    """The output of a layer with its update."""
    dtype = module.dtype or y.dtype
    precision = getattr(module, "precision", None)
    if isinstance(module, nn.Embed) and spec.method == "dora":
        raise ValueError(
            f"{path!r} belongs to an embedding: method='dora' adapts linear layers, exclude it with where="
        )
    if isinstance(module, nn.Embed):
        sizes = Sizes((), *((n,) for n in weight.shape))
        leaves = {leaf: variable_of(module, leaf) for leaf in LEAVES if module.has_variable("params", leaf)}
        a, b, scale = _live(spec, path, module, leaves, sizes, draw)
        a, b = a.astype(dtype), b.astype(dtype)
        if name == "attend":
            hidden = jnp.einsum("...o,ro->...r", x.astype(dtype), b)
            return y + _times(jnp.einsum("...r,ir->...i", hidden, a), scale, y.dtype)
        hidden = jnp.take(a, x, axis=0) if module.num_embeddings > 1 else a[0][(None,) * x.ndim]
        return y + _times(jnp.einsum("...r,ro->...o", hidden, b), scale, y.dtype)

    product = None if isinstance(module, nn.Conv) else product_of(path, module, x, *rest, **kwargs)
    sizes = conv_sizes(path, spec, module, weight) if product is None else product_sizes(product, weight)
    leaves = _declare(spec, path, module, sizes, weight)
    a, b, scale = _live(spec, path, module, leaves, sizes, draw)
    if spec.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - spec.dropout, x.shape)
        x = jnp.where(keep, x / (1 - spec.dropout), jnp.zeros_like(x))
    x, a_cast, b_cast = x.astype(dtype), a.astype(dtype), b.astype(dtype)
    if product is None:
        narrow = module.clone(features=a.shape[-1], use_bias=False, parent=None, name=None)
        hidden = narrow.apply({"params": {"kernel": a_cast}}, x)
        return y + _times(jnp.einsum("...r,ro->...o", hidden, b_cast, precision=precision), scale, y.dtype)
    rank_letter = next(c for c in "rstuvwxyzabcdefghijklmnopq" if c not in "".join(product))
    hidden_letters = "".join(c for c in product.inputs if c in product.outputs + ".") + rank_letter
    hidden = jnp.einsum(
        f"{product.inputs},{product.batch}{product.contracted}{rank_letter}->{hidden_letters}",
        x,
        a_cast,
        precision=precision,
    )
    update = jnp.einsum(
        f"{hidden_letters},{product.batch}{rank_letter}{product.free}->{product.outputs}",
        hidden,
        b_cast,
        precision=precision,
        preferred_element_type=y.dtype,
    )
    update = _times(update, scale, y.dtype)
    if spec.method != "dora":
        return y + update
    bias = variable_of(module, "bias").astype(y.dtype) if module.use_bias else None
    # The length is a constant to the gradient (Liu et al. 2024, section 4.3).
    frozen = jax.lax.stop_gradient((weight, a, b))
    ratio = leaves["lora_magnitude"] / column_norms(frozen[0], sizes, *frozen[1:], scale)
    letters = product.batch + product.free

    def stretched(z: jax.Array, by: jax.Array) -> jax.Array:
        return jnp.einsum(f"{product.outputs},{letters}->{product.outputs}", z, by.astype(z.dtype))

    bare = y if bias is None else y - spread_bias(bias, product, y)
    return y + stretched(bare, ratio - 1) + stretched(update, ratio)


def _times(update: jax.Array, scale: float | jax.Array, dtype: DTypeLike) -> jax.Array:
    return update.astype(dtype) * (scale.astype(dtype) if isinstance(scale, jax.Array) else scale)


def _live(
    spec: LowRank,
    path: str,
    module: nn.Module,
    leaves: Mapping[str, jax.Array],
    sizes: Sizes,
    draw: jax.Array | None,
) -> tuple[jax.Array, jax.Array, float | jax.Array]:
    """A, B and the scale of this step."""
    a, b = both(spec, leaves, sizes)
    if "lora_sketch" in leaves:
        # What is drawn in the step is laid out like the weight that it belongs to.
        names = axis_names(module)
        if names is not None:
            n, i = len(sizes.batch), len(sizes.inputs)
            a = nn.with_logical_constraint(a, (*names[: n + i], None))
            b = nn.with_logical_constraint(b, (*names[:n], None, *names[n + i :]))
    rank = a.shape[-1]
    scale = scale_of(spec, path, rank)
    if draw is None:
        return a, b, scale
    keep = jnp.floor(draw * rank).astype(jnp.int32) + 1
    return *truncated(a, b, keep, len(sizes.batch), train_all=spec.train_all), scale * rank / keep.astype(
        jnp.float32
    )


def _declare(
    spec: LowRank, path: str, module: nn.Module, sizes: Sizes, weight: jax.Array
) -> dict[str, jax.Array]:
    """Makes, or finds, the leaves beside a weight."""
    made = recipes(spec, path, sizes, weight, table=isinstance(module, nn.Embed))
    names = key = None
    if any(not module.has_variable("params", name) for name in made) and module.is_mutable_collection(
        "params"
    ):
        names, key = axis_names(module), _key(module)

    def held(name: str, recipe: Recipe) -> jax.Array:
        def init() -> Any:
            value = recipe.init(fold_path(key, name))
            if names is None:
                return value
            axes = tuple(None if axis is None else names[axis] for axis in recipe.axes)
            return nn.LogicallyPartitioned(value, axes, rules=())

        if key is None and not module.has_variable("params", name):
            raise ValueError(
                f"the parameters have no {name!r} beside {path!r}: add the factors with "
                "odjax.lowrank.init_factors(model, params, key, *inputs)"
            )
        return module.variable("params", name, init).value

    leaves = {name: held(name, recipe) for name, recipe in made.items()}
    if spec.cache_sketch and "lora_sketch" in leaves:
        right = "lora_b" in leaves
        axes = (*range(len(sizes.batch) + len(sizes.inputs)), None)
        if not right:
            outputs = range(len(sizes.batch) + len(sizes.inputs), sum(len(part) for part in sizes))
            axes = (*range(len(sizes.batch)), None, *outputs)
        recipe = Recipe(lambda key: frozen_half(spec, leaves, sizes).astype(spec.dtype), axes)
        leaves["lora_frozen"] = held("lora_frozen", recipe)
    return leaves


class _Key(nn.Module):
    """A key of its own for a scope."""

    def __call__(self) -> jax.Array:
        return self.make_rng("params")


def _key(module: nn.Module) -> jax.Array:
    """A key for what is added to a module, which leaves the keys of its own parameters as they are."""
    if isinstance(module, nn.Embed):
        return module.make_rng("params")
    return _Key(parent=module, name="lora_key")()
