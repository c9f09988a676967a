"""Initial topologies: which links of a layer [n_in, n_out] are there before training starts.

Every mask has an exact number of links. Receptive fields and small worlds are laid on a ring: neuron j of
the side whose degrees are controlled has its centre opposite to it on the other side, so that the fields
of all neurons tile that side evenly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.keys import check_key, fold_path
from odjax.core.selection import gumbel_top_k_mask, top_k_mask
from odjax.sparse.correlation import feature_correlation
from odjax.sparse.mask_trees import Initial
from odjax.sparse.plans import LeafPlan, Plan, matrix_of

Degrees = Literal["fixed", "poisson", "uniform"]
Side = Literal["out", "in"]

_AT_ONCE = 1 << 22
"""Places of a stack that are drawn at a time, so that memory does not grow with the number of layers."""


def link_count(density: float, n_in: int, n_out: int) -> int:
    """The number of links of a layer of a given density, rounded to the nearest integer.

    A density of `links / (n_in * n_out)` gives back exactly `links`.

    Args:
      density: share of the links that are there, in (0, 1].
      n_in: input neurons.
      n_out: output neurons.

    Returns:
      The number of links.

    Raises:
      ValueError: a density outside (0, 1], a side without neurons.

    Example:
      >>> link_count(0.05, 784, 100)
      3920
    """
    for name, n in (("n_in", n_in), ("n_out", n_out)):
        if n < 1:
            raise ValueError(f"{name} must be at least 1, got {n}: a layer needs neurons on both sides")
    if not 0 < density <= 1:
        raise ValueError(
            f"density must be in (0, 1], got {density}: it is the share of links kept, 1 - sparsity"
        )
    return round(density * n_in * n_out)


def _check_degrees(links: int, nodes: int, side: str, density: float) -> None:
    if links < nodes:
        raise ValueError(
            f"density {density} gives {links} links to {nodes} {side} neurons, so some would get none: use a "
            f"density of at least 1 / (neurons of the other side), degree_side= the other side, or er_mask"
        )


def _checked_batch(batch: Sequence[int]) -> tuple[int, ...]:
    if any(size < 1 for size in batch):
        raise ValueError(
            f"batch must hold sizes of at least 1, got {tuple(batch)}: () is one layer, (12,) twelve"
        )
    return tuple(batch)


def _for_each_slice(
    one: Callable[[jax.Array], jax.Array], key: jax.Array, batch: tuple[int, ...]
) -> jax.Array:
    if not batch:
        return one(key)
    count = math.prod(batch)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(count, dtype=jnp.uint32))
    size = max(1, math.prod(jax.eval_shape(one, key).shape))
    masks = jax.lax.map(one, keys, batch_size=max(1, min(count, _AT_ONCE // size)))
    return masks.reshape(*batch, *masks.shape[1:])


def _ring_distance(nodes: int, partners: int) -> tuple[jax.Array, int]:
    """int32[nodes, partners], the distances on the ring of partners, in units of 1 / scale; and the scale.

    The centre of node j is (j + 1/2) partners / nodes - 1/2: a fraction, hence the units.
    """
    unit = math.gcd(2 * nodes, partners - nodes, 2 * partners)
    scale = 2 * nodes // unit
    around = partners * scale
    if around >= 1 << 31:
        raise ValueError(
            f"a layer of {nodes} x {partners} is too large for exact ring distances: "
            "make the two widths multiples of a power of two, or use er_mask"
        )
    centres = ((partners - nodes) + 2 * np.arange(nodes, dtype=np.int64) * partners) // unit % around
    whole = jnp.asarray((centres // scale)[:, None], jnp.int32)
    rest = jnp.asarray((centres % scale)[:, None], jnp.int32)
    ahead = (jax.lax.broadcasted_iota(jnp.int32, (nodes, partners), 1) - whole) % partners
    ahead = ahead * scale - rest
    return jnp.minimum(jnp.abs(ahead), around - ahead), scale


def _even_degrees(links: int, nodes: int) -> np.ndarray:
    """Floor or ceil of the mean, spread evenly, with sum `links`."""
    cuts = [links * j // nodes for j in range(nodes + 1)]
    return np.diff(np.asarray(cuts, np.int64)).astype(np.int32)


def _uniform_degrees(links: int, nodes: int, partners: int) -> np.ndarray:
    """The quantiles of a uniform law about the mean k, as wide as 1..2k-1 and 1..partners allow.

    With half width h they are x_j = k - h + h (2j + 1) / nodes, whose sum over i < j is
    j (k - h) + h j^2 / nodes; the differences of its floors are integers with the exact total.
    """
    half = min(links - nodes, partners * nodes - links)  # h * nodes
    cuts = [(j * nodes * (links - half) + half * j * j) // nodes**2 for j in range(nodes + 1)]
    return np.diff(np.asarray(cuts, np.int64)).astype(np.int32)


def _degrees(key: jax.Array, kind: Degrees, links: int, nodes: int, partners: int) -> jax.Array:
    if kind == "fixed":
        return jnp.asarray(_even_degrees(links, nodes))
    if kind == "uniform":
        return jax.random.permutation(key, jnp.asarray(_uniform_degrees(links, nodes, partners)))
    # One link each; the others fall on the places that are left, all equally likely.
    places = _uniformly(key, (nodes, partners - 1), jnp.int32(links - nodes), None)
    return 1 + jnp.sum(places, axis=1, dtype=jnp.int32)


def _uniformly(
    key: jax.Array, shape: tuple[int, ...], links: int | jax.Array, eligible: jax.Array | None
) -> jax.Array:
    return top_k_mask(jax.random.bits(key, shape, jnp.uint32), links, eligible=eligible)


@partial(jax.jit, static_argnums=range(1, 7))
def _receptive_fields(
    key: jax.Array, nodes: int, partners: int, links: int, r: float, degrees: Degrees, batch: tuple[int, ...]
) -> jax.Array:
    distance, scale = _ring_distance(nodes, partners)

    def one(key: jax.Array) -> jax.Array:
        for_degrees, for_links = jax.random.split(key)
        k = _degrees(for_degrees, degrees, links, nodes, partners)
        if r == 0:
            return top_k_mask(distance, k, largest=False, batch_dims=1)
        exponent = min((1 - r) / r, 1e30)
        log_weights = -exponent * jnp.log1p(distance.astype(jnp.float32) / scale)
        return gumbel_top_k_mask(for_links, log_weights, k, batch_dims=1)

    return _for_each_slice(one, key, batch)


@partial(jax.jit, static_argnums=range(1, 6))
def _small_world(
    key: jax.Array, nodes: int, partners: int, links: int, beta: float, batch: tuple[int, ...]
) -> jax.Array:
    distance, _ = _ring_distance(nodes, partners)
    degrees = jnp.asarray(_even_degrees(links, nodes))
    lattice = top_k_mask(distance, degrees, largest=False, batch_dims=1)

    def one(key: jax.Array) -> jax.Array:
        for_dropping, for_links = jax.random.split(key)
        kept = lattice & ~jax.random.bernoulli(for_dropping, beta, lattice.shape)
        moved = links - jnp.sum(kept, dtype=jnp.int32)
        return kept | _uniformly(for_links, kept.shape, moved, ~kept)

    return _for_each_slice(one, key, batch)


@partial(jax.jit, static_argnums=range(1, 4))
def _random(key: jax.Array, shape: tuple[int, ...], links: int, batch: tuple[int, ...]) -> jax.Array:
    return _for_each_slice(lambda key: _uniformly(key, shape, links, None), key, batch)


def brf_mask(
    key: jax.Array,
    n_in: int,
    n_out: int,
    density: float,
    r: float,
    *,
    degrees: Degrees = "fixed",
    degree_side: Side = "out",
    batch: Sequence[int] = (),
) -> jax.Array:
    """Bipartite receptive field: every neuron draws its links near its own place on the other side.

    Output neuron j draws k_j inputs without replacement, input i with probability proportional to
    (1 + d_ij)^(-(1 - r) / r). d_ij is the distance, on the ring of inputs, between i and the centre
    (j + 1/2) n_in / n_out - 1/2.

    | case                   | result                                                                   |
    |------------------------|--------------------------------------------------------------------------|
    | r = 0                  | the k_j nearest inputs; of two equally near ones the lower               |
    | r = 1                  | all inputs are equally likely                                            |
    | degrees = "fixed"      | k_j is the floor or the ceil of the mean, evenly spread                  |
    | degrees = "poisson"    | one link each, the others at random places: nearly Poisson when sparse   |
    | degrees = "uniform"    | evenly distributed over 1 to 2k - 1 (narrower above half density)        |

    The mask does not depend on how it is sharded. The published code has its centres at i * floor(n_out /
    n_in), which leaves a part of the larger side without links; these centres do not.

    Args:
      key: a typed key.
      n_in: input neurons.
      n_out: output neurons.
      density: share of the links, in (0, 1]; the mask has `link_count(density, n_in, n_out)` of them.
      r: spread, in [0, 1].
      degrees: law of the degrees k_j, see the table.
      degree_side: whose degrees are controlled; "in" swaps the roles of inputs and outputs.
      batch: sizes of stacked layers. Slice i (in row-major order) is the mask of `fold_in(key, i)`.

    Returns:
      bool[*batch, n_in, n_out].

    Raises:
      TypeError: a legacy key.
      ValueError: a density outside (0, 1] or so low that a neuron would get no link, r outside [0, 1], an
        unknown law or side.

    Source:
      Zhang et al., Brain network science modelling of sparse neural networks enables Transformers and LLMs
      to perform as fully connected, NeurIPS 2025, arXiv 2501.19107.

    Example:
      >>> mask = brf_mask(jax.random.key(0), 6, 3, 1 / 3, 0.0)
      >>> mask.astype(int).T
      Array([[1, 1, 0, 0, 0, 0],
             [0, 0, 1, 1, 0, 0],
             [0, 0, 0, 0, 1, 1]], dtype=int32)
    """
    check_key(key)
    links = link_count(density, n_in, n_out)
    if not 0 <= r <= 1:
        raise ValueError(f"r must be in [0, 1] (0: the nearest, 1: uniform), got {r}")
    if degrees not in ("fixed", "poisson", "uniform"):
        raise ValueError(f"degrees must be 'fixed', 'poisson' or 'uniform', got {degrees!r}")
    if degree_side not in ("out", "in"):
        raise ValueError(f"degree_side must be 'out' or 'in', got {degree_side!r}")
    nodes, partners = (n_out, n_in) if degree_side == "out" else (n_in, n_out)
    _check_degrees(links, nodes, degree_side + "put", density)
    fields = _receptive_fields(key, nodes, partners, links, float(r), degrees, _checked_batch(batch))
    return jnp.swapaxes(fields, -1, -2) if degree_side == "out" else fields


def bsw_mask(
    key: jax.Array, n_in: int, n_out: int, density: float, beta: float = 0.25, *, batch: Sequence[int] = ()
) -> jax.Array:
    """Bipartite small world: a ring lattice in which every link moves with probability beta.

    Each neuron of the larger side (the outputs, when they are equal) takes its nearest neurons on the other
    side, with degrees and centres as in `brf_mask` with r = 0. Every link is dropped with probability beta,
    and as many are drawn uniformly from the places that then have no link. beta = 0 is the lattice, beta = 1
    an Erdos-Renyi graph.

    Args:
      key: a typed key.
      n_in: input neurons.
      n_out: output neurons.
      density: share of the links, in (0, 1]; the mask has `link_count(density, n_in, n_out)` of them.
      beta: probability of moving, in [0, 1].
      batch: sizes of stacked layers. Slice i (in row-major order) is the mask of `fold_in(key, i)`.

    Returns:
      bool[*batch, n_in, n_out].

    Raises:
      TypeError: a legacy key.
      ValueError: a density outside (0, 1] or so low that a neuron would get no link, beta outside [0, 1].

    Source:
      Zhang et al., NeurIPS 2025, arXiv 2501.19107; after D. J. Watts and S. H. Strogatz, Collective dynamics
      of small-world networks, Nature 393, 1998.

    Example:
      >>> int(bsw_mask(jax.random.key(0), 20, 30, 0.1).sum())
      60
    """
    check_key(key)
    links = link_count(density, n_in, n_out)
    if not 0 <= beta <= 1:
        raise ValueError(f"beta must be in [0, 1] (the probability that a link moves), got {beta}")
    by_outputs = n_out >= n_in
    nodes, partners = (n_out, n_in) if by_outputs else (n_in, n_out)
    _check_degrees(links, nodes, "output" if by_outputs else "input", density)
    fields = _small_world(key, nodes, partners, links, float(beta), _checked_batch(batch))
    return jnp.swapaxes(fields, -1, -2) if by_outputs else fields


def er_mask(key: jax.Array, shape: Sequence[int], links: int, *, batch: Sequence[int] = ()) -> jax.Array:
    """Erdos-Renyi: an exact number of links, every set of places equally likely.

    Args:
      key: a typed key.
      shape: of one layer, any rank.
      links: how many, from 0 to the number of places.
      batch: sizes of stacked layers. Slice i (in row-major order) is the mask of `fold_in(key, i)`.

    Returns:
      bool[*batch, *shape].

    Raises:
      TypeError: a legacy key, a number of links that is no integer.
      ValueError: more links than places, or fewer than 0.

    Example:
      >>> er_mask(jax.random.key(0), (8, 4), 5, batch=(3,)).sum(axis=(1, 2))
      Array([5, 5, 5], dtype=int32)
    """
    check_key(key)
    shape = tuple(shape)
    if not isinstance(links, int | np.integer):
        raise TypeError(f"links must be an integer, got {links!r}: link_count turns a density into one")
    if not 0 <= links <= math.prod(shape):
        raise ValueError(f"links must be from 0 to {math.prod(shape)} for a layer {shape}, got {links}")
    return _random(key, shape, int(links), _checked_batch(batch))


def csti_mask(features: jax.Array, shape: tuple[int, int], density: float) -> jax.Array:
    """Correlated sparse topology: links join the features that are most correlated over the training data.

    R is the correlation between input features with a diagonal of 0, repeated like tiles to fill the layer
    (as often as the layer is wider than the features). The places of the largest |R| get the links, of
    equals those that come first in row-major order; places of correlation 0 last. The same matrix serves
    every hidden layer.

    Args:
      features: [samples, n], the raw inputs, one row a sample.
      shape: (n_in, n_out) of the layer, both multiples of n.
      density: share of the links, in (0, 1]; the mask has `link_count(density, n_in, n_out)` of them.

    Returns:
      bool[n_in, n_out].

    Raises:
      TypeError: features that are not real numbers.
      ValueError: features of another rank, a shape that tiles do not fill, a density outside (0, 1].

    Source:
      Zhang et al., Epitopological learning and Cannistraci-Hebb network shape intelligence brain-inspired
      theory for ultra-sparse advantage in deep learning, ICLR 2024.

    Example:
      >>> x = jnp.array([[0.0, 3.0, 1.0], [1.0, 2.0, 1.0], [2.0, 1.0, 0.9]])
      >>> csti_mask(x, (3, 6), 4 / 18).astype(int)
      Array([[0, 1, 0, 0, 1, 0],
             [1, 0, 0, 1, 0, 0],
             [0, 0, 0, 0, 0, 0]], dtype=int32)
    """
    if len(shape) != 2:
        raise ValueError(f"shape must be (n_in, n_out), got {tuple(shape)}: make the mask of one layer")
    links = link_count(density, *shape)
    r = feature_correlation(features)
    n = r.shape[0]
    if shape[0] % n or shape[1] % n:
        raise ValueError(
            f"shape must be multiples of the {n} features to be filled with tiles, got {tuple(shape)}: widen "
            "the layer, or take brf_mask"
        )
    return top_k_mask(jnp.tile(jnp.abs(r), (shape[0] // n, shape[1] // n)), links)


def drawn(draw: Callable[..., jax.Array]) -> Initial:
    """A topology as the links at the start of a method, its `masks=`, whatever the density is then.

    Args:
      draw: `(key, n_in, n_out, density, batch=...) -> bool[*batch, n_in, n_out]`, such as
        `functools.partial(brf_mask, r=0.25)` or `bsw_mask`.

    Returns:
      `(key, leaf plan, links of a slice) -> bool mask of the leaf's shape`.

    Raises:
      ValueError: when called: a leaf with a structure, which these topologies do not have; one whose inputs
        and outputs are not known; and what `draw` raises.

    Example:
      >>> mask = drawn(bsw_mask)(jax.random.key(0), LeafPlan((8, 6), 12), 24)
      >>> int(mask.sum())
      24
    """

    def initial(key: jax.Array, leaf: LeafPlan, count: int) -> jax.Array:
        if leaf.structure is not None:
            raise ValueError(f"a leaf of shape {leaf.shape} has {leaf.structure}: a topology has none")
        n_in, n_out = matrix_of(leaf)
        return leaf.leaf(draw(key, n_in, n_out, count / leaf.size, batch=leaf.batch_shape))

    return initial


def plan_masks(key: jax.Array, plan: Plan, draw: Callable[..., jax.Array]) -> dict[str, jax.Array]:
    """A topology for every leaf of a plan, with exactly the links that are planned.

    Args:
      key: a typed key; a leaf's own key depends on its path alone.
      plan: path -> `LeafPlan`, as of `odjax.sparse.plans.uniform`. Its batch axes are layers of a stack.
      draw: as for `drawn`.

    Returns:
      {path: bool mask of the leaf's shape}.

    Raises:
      TypeError: a legacy key.
      ValueError: a leaf with a structure, which these topologies do not have; one whose inputs and
        outputs are not known; and what `draw` raises.

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> plan = uniform({"kernel": jnp.zeros((8, 6))}, 0.75)
      >>> masks = plan_masks(jax.random.key(0), plan, partial(brf_mask, r=0.25))
      >>> int(masks["kernel"].sum()), plan["kernel"].links
      (12, 12)
    """
    check_key(key)
    initial, masks = drawn(draw), {}
    for path, leaf in plan.items():
        try:
            masks[path] = initial(fold_path(key, path), leaf, leaf.links)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    return masks
