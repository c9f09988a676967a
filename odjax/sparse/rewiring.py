"""The change of links: what is dropped, what percolates away, what grows.

What differs between methods is plugged in. A score is a function of one `Layer` to an array of its shape; the
largest scores stay, and grow. A random rule draws within the score: the k largest of log-weights plus Gumbel
noise are a draw without replacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from odjax.core.keys import fold_path, fold_step
from odjax.sparse.mask_trees import Masks
from odjax.sparse.masks import NM, Structure, add_links, links, top_links, unit
from odjax.sparse.plans import LeafPlan, Plan, overall_density, target_links
from odjax.sparse.removal import keep_count
from odjax.sparse.schedules import Schedule


class Layer(NamedTuple):
    """What a score sees of a sparse leaf: its graphs, [*batch, inputs, outputs] (see `LeafPlan.graphs`).

    Attributes:
      key: a typed key of its own.
      w: float32 (float64 for float64 leaves), the weights, 0 where there is no link.
      mask: bool, the links; for `grow` those that stay.
      gradient: of the loss for all weights, the absent ones too, in the dtype of w; None where an `Edit`
        changes links, which has no gradients.
      step: int32 [], the number of the update.
      count: int32 [*batch] or [], how many will be taken: links that stay for `drop` and `prune`, new ones
        for `grow`.
      structure: N:M, blocks, channels or None. Blocks and channels are chosen by the mean (or maximum) of
        the scores of their links, so that a random rule draws one number for each (`pooled`, `unpooled`).
    """

    key: jax.Array
    w: jax.Array
    mask: jax.Array
    gradient: jax.Array | None
    step: jax.Array
    count: jax.Array
    structure: Structure = None


Score = Callable[[Layer], jax.Array]


@dataclass(frozen=True)
class Rewiring:
    """How links change; the arguments of `odjax.sparse.engine.dst` that say so.

    Attributes:
      plan: path -> `LeafPlan`.
      drop: score of the links that are there.
      grow: score of the absent ones, or None.
      prune: score by which the density goes down before the drop, or None.
      zeta: share of links that is replaced.
      density: of all sparse leaves together, or None for the plan's.
      last: number of the last change, at which the plan's density is reached; None where there is none.
      across: whether pruning compares the scores of all leaves.
      percolate: {path: bool mask} -> the same with fewer links, or None.
      early_stop: overlap of dropped and regrown links above which a layer is left alone, or None.
    """

    plan: Plan
    drop: Score
    grow: Score | None = None
    prune: Score | None = None
    zeta: float | jax.Array | Schedule = 0.3
    density: float | jax.Array | Schedule | None = None
    last: int | None = None
    across: bool = False
    percolate: Callable[[Masks], Masks] | None = None
    early_stop: float | None = None

    def target(self, leaf: LeafPlan, step: int | jax.Array) -> int | jax.Array:
        """Links of each slice of a leaf after update `step`, where leaves are pruned by themselves."""
        if self.density is None:
            return leaf.links
        wanted = self.density(step) if callable(self.density) else self.density
        count = target_links(leaf, wanted, overall_density(self.plan))
        return count if self.last is None else jnp.where(step >= self.last, jnp.int32(leaf.links), count)

    def __call__(
        self, old: Masks, w: Masks, gradients: Masks | None, step: jax.Array, key: jax.Array, before: Masks
    ) -> tuple[Masks, Masks]:
        """Masks after a change of links.

        Args:
          old: {path: bool mask}.
          w: {path: weights}, 0 where there is no link.
          gradients: {path: gradient for all weights}, or None.
          step: the number of the update.
          key: a typed key.
          before: {path: float32 [*batch]}, the overlaps of the change before.

        Returns:
          ({path: bool mask}, {path: float32 [*batch]}): the masks, and the share of the grown links that had
          just been dropped.
        """
        layers = {}
        for path, leaf in self.plan.items():
            own = fold_path(fold_step(key, step), path)
            slope = None if gradients is None else leaf.graphs(gradients[path])
            here, weights = leaf.graphs(old[path]), leaf.graphs(w[path])
            layers[path] = Layer(own, weights, here, slope, step, jnp.int32(0), leaf.structure)
        goal = {path: self.target(leaf, step) for path, leaf in self.plan.items()}
        if self.across:
            layers = self._pruned_across(layers, goal)
            goal = {path: _links(self.plan[path], layer.mask) for path, layer in layers.items()}
        kept = {}
        for path, leaf in self.plan.items():
            stays = self._dropped(path, leaf, layers[path], goal[path])
            if self.early_stop is not None:
                stays = jnp.where(_wide(self._stopped(before[path]), stays), layers[path].mask, stays)
            kept[path] = leaf.leaf(stays)
        if self.percolate is not None:
            kept = self.percolate(kept)
        if self.grow is None:
            return kept, before
        new, overlaps = {}, {}
        done: jax.Array | None = None
        for path, leaf in self.plan.items():
            layer, stays = layers[path], leaf.graphs(kept[path])
            if done is not None:
                # One leaf after the other: scores and communities take the memory of one.
                stays, _ = jax.lax.optimization_barrier((stays, done))
            live = jnp.where(stays, layer.w, jnp.zeros_like(layer.w))
            layer = layer._replace(w=live, mask=stays, count=goal[path] - _links(leaf, stays))
            scores = _scored(self.grow, path, layer, 1)
            grown = add_links(stays, scores, goal[path], leaf.structure, batch_dims=leaf.batch_dims)
            was = layers[path].mask
            both, fresh = _links(leaf, grown & was & ~stays), _links(leaf, grown & ~stays)
            overlap = both.astype(jnp.float32) / jnp.maximum(fresh, 1).astype(jnp.float32)
            if self.early_stop is not None:
                stopped = self._stopped(before[path])
                grown = jnp.where(_wide(stopped, grown), leaf.graphs(old[path]), grown)
                overlap = jnp.where(stopped, before[path], overlap)
            new[path], overlaps[path], done = leaf.leaf(grown), overlap, grown
        return new, overlaps

    def _stopped(self, overlap: jax.Array) -> jax.Array:
        return overlap > jnp.float32(self.early_stop)

    def _pruned_across(self, layers: dict[str, Layer], goal: dict[str, jax.Array]) -> dict[str, Layer]:
        """All leaves down to the links of all targets together, by the scores of all."""
        total = jnp.zeros([], jnp.uint32)
        flat, there = [], []
        for path, layer in layers.items():
            per_slice = jnp.asarray(goal[path]).astype(jnp.uint32)
            total += jnp.sum(jnp.broadcast_to(per_slice, self.plan[path].batch_shape), dtype=jnp.uint32)
            scores = _scored(self.prune or self.drop, path, layer, 2)
            flat.append(jnp.ravel(scores))
            there.append(jnp.ravel(layer.mask))
        chosen = top_links(jnp.concatenate(flat), total, eligible=jnp.concatenate(there))
        pruned, begin = {}, 0
        for path, layer in layers.items():
            part = jax.lax.dynamic_slice_in_dim(chosen, begin, layer.mask.size)
            pruned[path] = layer._replace(mask=part.reshape(layer.mask.shape))
            begin += layer.mask.size
        return pruned

    def _dropped(self, path: str, leaf: LeafPlan, layer: Layer, goal: int | jax.Array) -> jax.Array:
        """The links that stay."""
        batch, structure, now = leaf.batch_dims, leaf.structure, goal
        if self.density is not None:
            now = jnp.minimum(_links(leaf, layer.mask), goal)
            if self.prune is not None and not self.across:
                scores = _scored(self.prune, path, layer._replace(count=now), 2)
                mask = top_links(scores, now, structure, eligible=layer.mask, batch_dims=batch)
                layer = layer._replace(mask=mask)
        share = self.zeta(layer.step) if callable(self.zeta) else self.zeta
        dropped = 0 if self.grow is None else now - keep_count(now, share)
        # A group of N:M may have fewer links until it is filled up.
        drops = None if isinstance(structure, NM) else structure
        size = unit(drops, leaf.slice_shape)
        keep = now - dropped // size * size
        scores = _scored(self.drop, path, layer._replace(count=jnp.asarray(keep, jnp.int32)), 0)
        if isinstance(structure, NM) and self.density is not None and self.prune is None:
            mask = top_links(scores, now, structure, eligible=layer.mask, batch_dims=batch)
            layer = layer._replace(mask=mask)
        return top_links(scores, keep, drops, eligible=layer.mask, batch_dims=batch)


def _scored(score: Score, path: str, layer: Layer, phase: int) -> jax.Array:
    scores = score(layer._replace(key=jax.random.fold_in(layer.key, phase)))
    if scores.shape != layer.mask.shape:
        raise ValueError(f"a score of {path!r} has shape {scores.shape}, the layer {layer.mask.shape}")
    return scores


def _links(leaf: LeafPlan, mask: jax.Array) -> jax.Array:
    return links(mask, batch_dims=leaf.batch_dims)


def _wide(per_slice: jax.Array, like: jax.Array) -> jax.Array:
    return per_slice.reshape(per_slice.shape + (1,) * (like.ndim - per_slice.ndim))
