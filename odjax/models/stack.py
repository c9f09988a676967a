"""A stack of equal layers: scanned or unrolled, with rematerialization by name."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.models.dense import PROJECTION
from odjax.models.splash_attention import RESIDUALS

NO_REMAT = "none"

_attention = jax.checkpoint_policies.save_only_these_names(RESIDUALS)


def _with_attention(policy: Callable[..., Any]) -> Callable[..., Any]:
    """Keeps too what splash attention needs not to run forward again: its output, and a number a query."""

    def both(primitive: Any, *args: Any, **params: Any) -> Any:
        return _attention(primitive, *args, **params) or policy(primitive, *args, **params)

    return both


# What is kept for the backward pass, from everything to nothing; the rest runs again. "projections" are
# queries, keys and values as attention takes them, its output, and what the first products of a feed-forward
# layer give: no large product runs twice, what is elementwise does. "attention" is "full" where attention is
# not "splash".
REMAT_POLICIES: dict[str, Callable[..., Any] | None] = {
    NO_REMAT: None,
    "dots": _with_attention(jax.checkpoint_policies.dots_saveable),
    "dots_no_batch": _with_attention(jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "offload": _with_attention(
        jax.checkpoint_policies.offload_dot_with_no_batch_dims("device", "pinned_host")
    ),
    "projections": jax.checkpoint_policies.save_only_these_names(RESIDUALS, PROJECTION),
    "attention": _attention,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def check_remat(remat: str) -> None:
    """Raises if `remat` is not a key of `REMAT_POLICIES`.

    Args:
        remat: name of a policy.

    Raises:
        ValueError: naming the choices.

    Example:
        >>> check_remat("all")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: remat must be one of none, dots, dots_no_batch, offload, projections, ..., got 'all'
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(f"remat must be one of {', '.join(REMAT_POLICIES)}, got {remat!r}")


def run_layers(
    make: Callable[..., nn.Module],
    x: jax.Array,
    *,
    each: Any = None,
    shared: tuple[Any, ...] = (),
    layers: int,
    scan: bool,
    remat: str,
    name: str = "layers",
) -> jax.Array:
    """Applies `layers` equal layers to `x`; call it inside a compact method.

    Scanned, the variables of all layers are stacked along a new first axis, whose logical name is "layers",
    in one subtree `name`: compilation takes the time of one layer. Unrolled, there is a subtree `name_0`,
    `name_1`, ... `stack_layers` and `unstack_layers` convert. Every collection is stacked and every key is
    split, so that what an intercepted module adds (adapters, statistics, caches) is stacked too.

    Args:
        make: makes the layer, `make(name=...)`; the layer maps `(x, *shared) -> x`, or
            `(x, slice of each, *shared) -> x` if `each` is given.
        x: the carried activation.
        each: tree of arrays whose first axis is `layers`; every layer gets its slice.
        shared: further arguments, the same for every layer.
        layers: number of layers.
        scan: whether to scan.
        remat: a key of `REMAT_POLICIES`.
        name: of the subtree.

    Returns:
        The last layer's output, like `x`.
    """

    def body(layer: nn.Module, x: jax.Array, own: Any, shared: tuple[Any, ...]) -> tuple[jax.Array, None]:
        return layer(x, *shared) if own is None else layer(x, own, *shared), None

    if remat != NO_REMAT:
        # Inside a scan the loop itself keeps the two computations apart.
        body = nn.remat(body, policy=REMAT_POLICIES[remat], prevent_cse=not scan)
    if not scan:
        for i in range(layers):
            x, _ = body(make(name=f"{name}_{i}"), x, jax.tree.map(lambda leaf, i=i: leaf[i], each), shared)
        return x
    scanned = nn.scan(
        body,
        variable_axes={True: 0},
        split_rngs={True: True},
        in_axes=(0, nn.broadcast),
        length=layers,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(make(name=name), x, each, shared)[0]


def stack_layers(params: Mapping[str, Any], name: str = "layers") -> dict[str, Any]:
    """Turns the parameters of an unrolled stack into those of a scanned one.

    Subtrees `name_0` ... `name_{n-1}` become one subtree `name` with a new first axis, at any depth of the
    tree.

    Args:
        params: tree of dicts with arrays as leaves, without boxes.
        name: of the stack.

    Returns:
        A new tree.

    Raises:
        ValueError: if the numbers are not 0..n-1.

    Example:
        >>> stack_layers({"layers_0": {"w": jnp.zeros(1)}, "layers_1": {"w": jnp.ones(1)}})
        {'layers': {'w': Array([[0.],
               [1.]], dtype=float32)}}
    """
    pattern = re.compile(re.escape(name) + r"_(\d+)")
    numbered: dict[int, Any] = {}
    out: dict[str, Any] = {}
    for key, value in params.items():
        match = pattern.fullmatch(key)
        if match:
            numbered[int(match[1])] = value
        else:
            out[key] = stack_layers(value, name) if isinstance(value, Mapping) else value
    if numbered:
        if sorted(numbered) != list(range(len(numbered))):
            raise ValueError(f"{name}_<i> must be numbered 0..{len(numbered) - 1}, got {sorted(numbered)}")
        layers = [numbered[i] for i in range(len(numbered))]
        out[name] = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
    return out


def unstack_layers(params: Mapping[str, Any], name: str = "layers") -> dict[str, Any]:
    """Turns the parameters of a scanned stack into those of an unrolled one; the inverse of `stack_layers`.

    Args:
        params: tree of dicts with arrays as leaves, without boxes.
        name: of the stack.

    Returns:
        A new tree.

    Example:
        >>> sorted(unstack_layers({"layers": {"w": jnp.zeros((2, 3))}}))
        ['layers_0', 'layers_1']
    """
    out: dict[str, Any] = {}
    for key, value in params.items():
        if key == name:
            count = jax.tree.leaves(value)[0].shape[0]
            for i in range(count):
                out[f"{name}_{i}"] = jax.tree.map(lambda leaf, i=i: leaf[i], value)
        else:
            out[key] = unstack_layers(value, name) if isinstance(value, Mapping) else value
    return out
