"""What a Linen layer computes, as a product of input and weight: which axes are summed, which are free."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.lowrank.sizes import Sizes

ADAPTABLE = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.Embed)
REFUSED = (nn.ConvTranspose, nn.ConvLocal)


class Product(NamedTuple):
    """A layer as an einsum `inputs,kernel->outputs`, the kernel by kind of letter."""

    inputs: str
    batch: str
    contracted: str
    free: str
    outputs: str


def axis_names(module: nn.Module) -> tuple[str | None, ...] | None:
    """The logical axis names of a module's weight, from its initializer.

    Args:
      module: a layer, bound to its scope.

    Returns:
      One name an axis, or None where the initializer gives none.
    """
    if isinstance(module, nn.Embed):
        init, shape = module.embedding_init, (module.num_embeddings, module.features)
    else:
        init, shape = module.kernel_init, variable_of(module, "kernel").shape
    try:
        box = jax.eval_shape(lambda key: init(key, shape, jnp.float32), jax.random.key(0))
    except (TypeError, ValueError):
        return None  # an initializer for a flattened kernel only: no names to inherit
    names = getattr(box, "names", None)
    return tuple(names) if names is not None and len(names) == len(shape) else None


def conv_sizes(path: str, module: nn.Conv, weight: jax.Array) -> Sizes:
    """The kinds of the axes of a convolution's kernel: window and channels are inputs, features outputs.

    Args:
      path: of the kernel.
      module: the convolution.
      weight: its kernel [window..., channels, features].

    Returns:
      The sizes.

    Raises:
      ValueError: a grouped or masked convolution.
    """
    if module.feature_group_count != 1:
        raise ValueError(
            f"{path!r} belongs to a convolution of {module.feature_group_count} groups, whose kernel is no "
            "single matrix: exclude it with where="
        )
    if module.mask is not None:
        raise ValueError(f"{path!r} belongs to a masked convolution: exclude it with where=")
    return Sizes((), weight.shape[:-1], weight.shape[-1:])


def product_sizes(product: Product, weight: jax.Array) -> Sizes:
    """The kinds of the axes of a linear layer's kernel.

    Args:
      product: the layer.
      weight: its kernel.

    Returns:
      The sizes.
    """
    n, i = len(product.batch), len(product.contracted)
    return Sizes(weight.shape[:n], weight.shape[n : n + i], weight.shape[n + i :])


def product_of(path: str, module: nn.Module, x: jax.Array, einsum_str: str | None = None) -> Product:
    """A linear layer as an einsum.

    Args:
      path: of the kernel.
      module: an `nn.Dense`, `nn.DenseGeneral` or `nn.Einsum`.
      x: its input.
      einsum_str: the equation, where an `nn.Einsum` is given it in the call.

    Returns:
      The product.

    Raises:
      ValueError: an equation whose kernel is not laid out [batch..., inputs..., outputs...].
    """
    if isinstance(module, nn.Dense):
        return Product("...i", "", "i", "o", "...o")
    if isinstance(module, nn.Einsum):
        return _einsum_product(path, (einsum_str or module.einsum_str).replace(" ", ""))
    features = module.features if isinstance(module.features, tuple | list) else (module.features,)
    axis = module.axis if isinstance(module.axis, tuple | list) else (module.axis,)
    letters = "abcdefghijklmnopqrstuvwxyz"
    own, new = letters[: x.ndim], letters[x.ndim : x.ndim + len(features)]
    contracted = sorted(i % x.ndim for i in axis)  # Flax orders the axes
    batch = sorted(i % x.ndim for i in module.batch_dims)
    rest = [i for i in range(x.ndim) if i not in contracted and i not in batch]
    names = ["".join(own[i] for i in part) for part in (batch, contracted, rest)]
    return Product(own, names[0], names[1], new, names[0] + names[2] + new)


def _einsum_product(path: str, equation: str) -> Product:
    operands, outputs = equation.split("->")
    inputs, kernel = operands.split(",")
    if "." in kernel or len(set(kernel)) < len(kernel):
        raise ValueError(
            f"the kernel of {path!r} in {equation!r} has an ellipsis or a letter twice: exclude it "
            "with where="
        )
    batch = "".join(c for c in kernel if c in inputs and c in outputs)
    contracted = "".join(c for c in kernel if c in inputs and c not in outputs)
    free = "".join(c for c in kernel if c not in inputs and c in outputs)
    if batch + contracted + free != kernel or not contracted or not free:
        raise ValueError(
            f"the kernel {kernel!r} of {path!r} in {equation!r} is not laid out "
            "[batch..., inputs..., outputs...] with an input and an output: write its letters in "
            "that order, or exclude it with where="
        )
    return Product(inputs, batch, contracted, free, outputs)


def spread_bias(bias: jax.Array, product: Product, y: jax.Array) -> jax.Array:
    """A bias in the layout of a layer's output.

    Args:
      bias: [batch..., outputs...], in the order of the output's axes for an einsum.
      product: the layer.
      y: its output.

    Returns:
      Shaped like `y`.
    """
    letters = "".join(c for c in product.outputs if c in product.batch + product.free)
    if product.batch and not product.outputs.startswith(product.batch):
        letters = product.batch + product.free
    return jnp.einsum(f"{product.outputs},{letters}->{product.outputs}", jnp.ones_like(y), bias)


def variable_of(module: nn.Module, name: str) -> Any:
    """A parameter of a bound module, without axis names.

    Args:
      module: bound to its scope.
      name: of the parameter.

    Returns:
      The array.
    """
    return nn.unbox(module.get_variable("params", name))
