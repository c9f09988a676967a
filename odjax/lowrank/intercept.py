"""What an intercepted layer of an adapted model does: find or make its factors, add their update."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.core import fold_path
from odjax.lowrank.coordinates import gathered, scattered
from odjax.lowrank.factors import (
    LEAVES,
    Recipe,
    Sizes,
    both,
    column_norms,
    frozen_half,
    frozen_sketch,
    preconditioned,
    recipes,
    truncated,
)
from odjax.lowrank.layers import (
    ADAPTABLE,
    REFUSED,
    Product,
    axis_names,
    conv_sizes,
    product_of,
    product_sizes,
    spread_bias,
    variable_of,
)
from odjax.lowrank.methods import LowRank, scale_of, sketch_of
from odjax.lowrank.sketches import COORDINATES, Coordinates
from odjax.lowrank.switch import On, added

Half = jax.Array | Coordinates


def interceptor(
    spec: LowRank, depth: int, draw: jax.Array | None, seen: dict[str, bool], on: On = True
) -> Callable[..., Any]:
    """The interceptor of one call of the model; it notes in `seen` which weights there were.

    Switched off it makes the factors that are missing, and leaves every output as it is.
    """
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
            if on is False:
                _made(spec, path, module, weight, *args, **kwargs)
                return result
            return _adapted(spec, path, module, weight, result, draw, on, name, *args, **kwargs)
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
    on: On,
    name: str,
    x: jax.Array,
    *rest: Any,
    **kwargs: Any,
) -> jax.Array:
    """The output of a layer with its update."""
    dtype = module.dtype or y.dtype
    if isinstance(module, nn.Embed):
        return _looked_up(spec, path, module, weight, y, draw, on, x, attend=name == "attend")
    product, sizes, leaves = _made(spec, path, module, weight, x, *rest, **kwargs)
    a, b, scale = _live(spec, path, module, leaves, sizes, draw, gathers=product is not None)
    if spec.dropout and module.has_rng("dropout"):
        keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - spec.dropout, x.shape)
        x = jnp.where(keep, x / (1 - spec.dropout), jnp.zeros_like(x))
    x = x.astype(dtype)
    if product is None:
        product = Product("...i", "", "i", "o", "...o")  # from the window on, as in a dense layer
        kernel = a.astype(dtype)
        narrow = module.clone(features=kernel.shape[-1], use_bias=False, parent=None, name=None)
        hidden = narrow.apply({"params": {"kernel": kernel}}, x)
        hidden_letters = "...r"
    else:
        hidden, hidden_letters = _down(x, a, product, sizes, module, dtype)
    update = _times(_up(hidden, hidden_letters, b, product, sizes, module, dtype, y.dtype), scale, y.dtype)
    if spec.method != "dora":
        return added(path, on, y, update)
    bias = variable_of(module, "bias").astype(y.dtype) if module.use_bias else None
    # The length is a constant to the gradient (Liu et al. 2024, section 4.3).
    frozen = jax.lax.stop_gradient((weight, a, b))
    ratio = leaves["lora_magnitude"] / column_norms(frozen[0], sizes, *frozen[1:], scale)
    letters = product.batch + product.free

    def stretched(z: jax.Array, by: jax.Array) -> jax.Array:
        return jnp.einsum(f"{product.outputs},{letters}->{product.outputs}", z, by.astype(z.dtype))

    bare = y if bias is None else y - spread_bias(bias, product, y)
    return added(path, on, y, stretched(bare, ratio - 1), stretched(update, ratio))


def _made(
    spec: LowRank,
    path: str,
    module: nn.Module,
    weight: jax.Array,
    x: jax.Array,
    *rest: Any,
    **kwargs: Any,
) -> tuple[Product | None, Sizes, dict[str, jax.Array]]:
    """The product of a layer (None: a convolution), its sizes, and the leaves beside its weight."""
    if isinstance(module, nn.Embed):
        return None, Sizes((), *((n,) for n in weight.shape)), {}
    product = None if isinstance(module, nn.Conv) else product_of(path, module, x, *rest, **kwargs)
    sizes = conv_sizes(path, module, weight) if product is None else product_sizes(product, weight)
    return product, sizes, _declare(spec, path, module, sizes, weight)


def _looked_up(
    spec: LowRank,
    path: str,
    module: nn.Embed,
    weight: jax.Array,
    y: jax.Array,
    draw: jax.Array | None,
    on: On,
    x: jax.Array,
    *,
    attend: bool,
) -> jax.Array:
    """The rows of an embedding, or the logits of its transpose, with the update."""
    if spec.method == "dora":
        raise ValueError(
            f"{path!r} belongs to an embedding: method='dora' adapts linear layers, exclude it with where="
        )
    dtype = module.dtype or y.dtype
    sizes = Sizes((), *((n,) for n in weight.shape))
    leaves = {leaf: variable_of(module, leaf) for leaf in LEAVES if module.has_variable("params", leaf)}
    a, b, scale = _live(spec, path, module, leaves, sizes, draw, gathers=True)
    rows, columns = Product("...i", "", "i", "o", "...o"), Product("...o", "", "o", "i", "...i")
    if attend:
        turned = Sizes((), sizes.outputs, sizes.inputs)
        a, b = (half if isinstance(half, Coordinates) else half.T for half in (b, a))
        hidden, letters = _down(x.astype(dtype), a, columns, turned, module, dtype)
        update = _up(hidden, letters, b, columns, turned, module, dtype, y.dtype)
        if on is not True and y.ndim == 2 and y.shape[0] % on.shape[0] == 0:
            # A head that is a table sees the tokens of all examples as one axis.
            on = jnp.repeat(on, y.shape[0] // on.shape[0])
    else:
        if isinstance(a, Coordinates):
            hit = jnp.expand_dims(x, -1) == a.index[(None,) * x.ndim]
            hidden = hit.astype(dtype) * jnp.asarray(a.size, dtype)
        else:
            a = a.astype(dtype)
            hidden = jnp.take(a, x, axis=0) if module.num_embeddings > 1 else a[0][(None,) * x.ndim]
        update = _up(hidden, "...r", b, rows, sizes, module, dtype, y.dtype)
    return added(path, on, y, _times(update, scale, y.dtype))


def _down(
    x: jax.Array, a: Half, product: Product, sizes: Sizes, module: nn.Module, dtype: DTypeLike
) -> tuple[jax.Array, str]:
    """x A, and its letters."""
    rank_letter = next(c for c in "rstuvwxyzabcdefghijklmnopq" if c not in "".join(product))
    letters = "".join(c for c in product.inputs if c in product.outputs + ".") + rank_letter
    if isinstance(a, Coordinates):
        return gathered(x, a, product, sizes), letters
    if _multiplies_matrices(module, product):
        tokens, rank = x.shape[: x.ndim - len(sizes.inputs)], a.shape[-1]
        rows = x.reshape(math.prod(tokens), math.prod(sizes.inputs))
        hidden = jnp.matmul(rows, a.astype(dtype).reshape(rows.shape[1], rank), precision=module.precision)
        return hidden.reshape(*tokens, rank), letters
    equation = f"{product.inputs},{product.batch}{product.contracted}{rank_letter}->{letters}"
    return jnp.einsum(equation, x, a.astype(dtype), precision=getattr(module, "precision", None)), letters


def _up(
    hidden: jax.Array,
    letters: str,
    b: Half,
    product: Product,
    sizes: Sizes,
    module: nn.Module,
    dtype: DTypeLike,
    out: DTypeLike,
) -> jax.Array:
    """The update of the output: what `_down` gave, times B."""
    if isinstance(b, Coordinates):
        spread = scattered(hidden.astype(out), b, sizes.outputs)
        return jnp.einsum(f"{letters[:-1]}{product.free}->{product.outputs}", spread)
    if _multiplies_matrices(module, product):
        tokens, rank = hidden.shape[:-1], hidden.shape[-1]
        update = jnp.matmul(
            hidden.reshape(math.prod(tokens), rank),
            b.astype(dtype).reshape(rank, math.prod(sizes.outputs)),
            precision=module.precision,
            preferred_element_type=out,
        )
        return update.reshape(*tokens, *sizes.outputs)
    return jnp.einsum(
        f"{letters},{product.batch}{letters[-1]}{product.free}->{product.outputs}",
        hidden,
        b.astype(dtype),
        precision=getattr(module, "precision", None),
        preferred_element_type=out,
    )


def _multiplies_matrices(module: nn.Module, product: Product) -> bool:
    """Whether a layer brings its own `dot_general`, as those of `odjax.models`, whose tokens are one axis.

    The gradients of its factors are then products that contract one axis, which on a CPU spares transposed
    copies of the activations. Elsewhere the axes stay, as they may be sharded apart.
    """
    tokens = product.inputs.removesuffix(product.contracted)
    return (
        getattr(module, "dot_general_cls", None) is not None
        and not product.batch
        and product.inputs == tokens + product.contracted
        and product.outputs == tokens + product.free
    )


def _times(update: jax.Array, scale: float | jax.Array, dtype: DTypeLike) -> jax.Array:
    return update.astype(dtype) * (scale.astype(dtype) if isinstance(scale, jax.Array) else scale)


def _live(
    spec: LowRank,
    path: str,
    module: nn.Module,
    leaves: Mapping[str, jax.Array],
    sizes: Sizes,
    draw: jax.Array | None,
    *,
    gathers: bool,
) -> tuple[Half, Half, float | jax.Array]:
    """A, B and the scale of this step; a half that selects coordinates as such where the layer gathers."""
    leaves = preconditioned(spec, path, leaves, sizes)
    if "lora_sketch" in leaves and sketch_of(spec)[0] in COORDINATES and not sizes.batch:
        right = "lora_b" in leaves
        if gathers or not right:
            made, z = frozen_sketch(spec, leaves, sizes), leaves["lora_b" if right else "lora_a"]
            scale = scale_of(spec, path, made.index.shape[-1])
            return (made, z, scale) if right else (z, made, scale)
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
