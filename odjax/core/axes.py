"""Logical axis names of parameters."""

from __future__ import annotations

from collections.abc import Callable

import flax.linen as nn


def named(init: nn.initializers.Initializer, *names: str | None) -> Callable[..., nn.LogicallyPartitioned]:
    """An initializer whose result carries logical axis names.

    The box holds the names only (`rules=()`): `nn.DenseGeneral` initializes a flattened kernel, and a box
    which applied the names of the full shape to it would raise under a mesh.

    Args:
      init: an initializer `(key, shape, dtype) -> array`.
      *names: one of `odjax.models.PARAMETER_AXES`, or None, for each axis of the full shape.

    Returns:
      The initializer to give to a Flax module or to `self.param`.

    Example:
      >>> import jax
      >>> dense = nn.Dense(8, kernel_init=named(nn.initializers.lecun_normal(), "embed", "mlp"))
      >>> variables = dense.init(jax.random.key(0), jax.numpy.ones((1, 4)))
      >>> nn.get_partition_spec(variables)["params"]["kernel"]
      P('embed', 'mlp')
    """
    return nn.with_logical_partitioning(init, names, rules=())
