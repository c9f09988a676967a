"""Cannistraci-Hebb scores of absent links, path based: a sum over paths of length three, as matrix products.

Source: Zhang et al. 2024, "Epitopological learning and Cannistraci-Hebb network shape intelligence
brain-inspired theory for ultra-sparse advantage in deep learning", ICLR (CH3-L3p); Zhang et al. 2025, arXiv
2501.19107. The closed form is ours.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from odjax.sparse.link_prediction import NodeWeight, check_mask, node_weights, over_layers, shared_links

PATH_PREDICTORS: dict[str, NodeWeight] = {
    "CH3_L3p": lambda i, e: (1 + e) ** -0.5,
    "CH2_L3p": lambda i, e: ((1 + i) / (1 + e)) ** 0.5,
    "CH3.1_L3p": lambda i, e: (1 / (1 + i) + e) ** -0.5,
}
"""g(i, e) of an inner node: the weight of a path is the product over its two inner nodes."""


def path_scores(
    mask: jax.Array,
    predictor: str = "CH3_L3p",
    *,
    max_links: int,
    chunk: int = 512,
    precision: jax.lax.PrecisionLike = None,
) -> jax.Array:
    """Scores of the absent links, a sum over the paths of length three that join their ends.

    A path u - a - b - v counts g(a) g(b), where i and e of the inner nodes are those of `ch_scores`. With
    P[u, b] = g of the input b and Q[v, a] = g of the output a, S[u, v] = sum over links (b, v) of P[u, b]
    times (A (A[b] * Q[v]))[u]: for a chunk of links at a time one matrix product. 2 n m operations for every
    link there is, and n^2 + m^2 floats.

    | predictor   | g(i, e)                        |
    |-------------|--------------------------------|
    | `CH3_L3p`   | 1 / sqrt(1 + e)                |
    | `CH2_L3p`   | sqrt((1 + i) / (1 + e))        |
    | `CH3.1_L3p` | 1 / sqrt(1 / (1 + i) + e)      |

    Args:
      mask: bool [..., n, m]; leading axes are layers of their own, one after the other.
      predictor: a key of `PATH_PREDICTORS`.
      max_links: no layer has more links than this. The bound costs memory for a list of indices; work is
        done for the links that there are.
      chunk: links at a time.
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      float32 [..., n, m], positive exactly where the link is absent and a path of length three joins its
      ends, 0 elsewhere. A traced layer of more than `max_links` links is all NaN, which a selection
      takes last.

    Raises:
      TypeError: a mask that is not bool.
      ValueError: fewer than two axes, an unknown predictor, a bound or chunk below 1, and, outside of `jit`,
        a layer with more links than the bound.

    Source: Zhang et al. 2024 and 2025; the batched closed form is ours.

    Example:
      >>> path_scores(jnp.array([[True, True, False], [False, True, True]]), max_links=4)
      Array([[0., 0., 1.],
             [1., 0., 0.]], dtype=float32)
    """
    mask = check_mask(mask)
    if predictor not in PATH_PREDICTORS:
        hint = "; for a sum over nodes use ch_scores" if str(predictor).endswith("L3n") else ""
        raise ValueError(f"predictor must be one of {', '.join(PATH_PREDICTORS)}, got {predictor!r}{hint}")
    for name, value in (("max_links", max_links), ("chunk", chunk)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if not isinstance(mask, jax.core.Tracer) and mask.size:
        with jax.ensure_compile_time_eval():
            most = int(jnp.max(jnp.sum(mask, axis=(-2, -1), dtype=jnp.int32)))
        if most > max_links:
            raise ValueError(
                f"a layer of mask {list(mask.shape)} has {most} links: type max_links={most} or more"
            )
    return _scores(mask, predictor, min(max_links, math.prod(mask.shape[-2:])), chunk, precision)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _scores(
    mask: jax.Array, predictor: str, max_links: int, chunk: int, precision: jax.lax.PrecisionLike
) -> jax.Array:
    def one(mask: jax.Array) -> jax.Array:
        return _one_layer(
            mask, PATH_PREDICTORS[predictor], max_links, min(chunk, max(max_links, 1)), precision
        )

    return over_layers(one, mask, sequential=True)


def _one_layer(
    mask: jax.Array, weight: NodeWeight, max_links: int, chunk: int, precision: jax.lax.PrecisionLike
) -> jax.Array:
    a = mask.astype(jnp.float32)
    inputs = node_weights(shared_links(a, a), jnp.sum(a, axis=1), weight).T  # P[u, b] at [b, u]
    outputs = node_weights(shared_links(a.T, a.T), jnp.sum(a, axis=0), weight)  # Q[v, a]
    links = jnp.sum(mask, dtype=jnp.int32)
    # What is beyond the links points outside: reads give 0, writes are dropped.
    size = -(-max_links // chunk) * chunk
    ends = jnp.nonzero(mask, size=size, fill_value=mask.shape)

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        b, v = (jax.lax.dynamic_slice_in_dim(end, i * chunk, chunk) for end in ends)
        rows, scale = (x.at[at].get(mode="fill", fill_value=0) for x, at in ((a, b), (outputs, v)))
        through = jnp.matmul(rows * scale, a.T, precision=precision, preferred_element_type=jnp.float32)
        first = inputs.at[b].get(mode="fill", fill_value=0)
        return total.at[v].add(through * first, mode="drop")

    chunks = (links + chunk - 1) // chunk
    total = jax.lax.fori_loop(
        0, jnp.minimum(chunks, size // chunk), add, jnp.zeros(mask.shape[::-1], jnp.float32)
    )
    scores = jnp.where(mask, 0, total.T)
    return jnp.where(links <= max_links, scores, jnp.nan)
