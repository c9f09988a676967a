"""Cannistraci-Hebb training: links go by the size of weights and come by the shape of the graph alone.

CHT, CHTs (both rules soft, drawn at random) and CHTss (a density that falls besides), as transforms on the
engine `odjax.sparse.engine.dst`; their two rules are scores for any method on it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from odjax.core.selection import perturbed
from odjax.sparse.engine import dst
from odjax.sparse.link_prediction import NODE_PREDICTORS, ch_scores, sharded_ch_scores
from odjax.sparse.masks import NM, Block, Channel, pooled, unit, unpooled
from odjax.sparse.path_scores import PATH_PREDICTORS, path_scores
from odjax.sparse.percolation import percolate
from odjax.sparse.plans import Plan, matrix_of, overall_density
from odjax.sparse.removal import removal_logits
from odjax.sparse.rewiring import Layer, Score
from odjax.sparse.schedules import Schedule, cosine, cubic, sigmoid
from odjax.sparse.wiring import Wiring, restrict_wiring

Predictor = str | Callable[[jax.Array], jax.Array]
Temperature = float | tuple[float, float] | Callable[[jax.Array], jax.Array]

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
_ROWS = 512  # enough for a matrix unit; less memory, and faster on a CPU (benchmarks/sparse_regrowth.py)
_FLOOR = 1e-5  # added to every absent link's score where too few have one


def removal(
    rule: Literal["soft", "hard"] = "soft",
    *,
    alpha: float = 1.0,
    temperature: float | Callable[[jax.Array], jax.Array] = 1.0,
) -> Score:
    """Score by which links stay: sizes of weights, drawn without replacement or ranked.

    Args:
      rule: "soft" draws the links that stay with probabilities proportional to score^temperature, "hard"
        takes the largest scores.
      alpha: 1 scores by weight magnitude, 0 by relative importance, see `removal_logits`.
      temperature: a number, or a function of the update's number.

    Returns:
      A score, for `drop=` or `prune=` of `dst`.

    Raises:
      ValueError: an unknown rule; an alpha outside [0, 1].

    Source: Zhang et al. 2025, arXiv 2501.19107, section 3 (soft removal).
    """
    _one_of("removal", rule, ("soft", "hard"))
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be between 0 (relative importance) and 1 (magnitude), got {alpha!r}")

    def score(layer: Layer) -> jax.Array:
        exponent = temperature(layer.step) if callable(temperature) else temperature
        w, blocks = layer.w.astype(jnp.float32), isinstance(layer.structure, Block | Channel)
        if rule == "soft" and not blocks:
            return perturbed(layer.key, removal_logits(w, layer.mask, alpha=alpha, temperature=exponent))
        logits = removal_logits(w, layer.mask, alpha=alpha)
        if not blocks:
            return logits
        sizes = jnp.exp(logits)  # means are of scores, not of logarithms
        if rule == "hard":
            return sizes
        return _drawn(layer, sizes, lambda weights: exponent * jnp.log(jnp.maximum(weights, _SMALLEST)))

    return score


def regrowth(
    rule: Literal["soft", "top"] = "soft",
    *,
    predictor: Predictor = "CH2_L3n",
    row_block: int | None = None,
    exact: bool = True,
    axes: str | tuple[str, ...] | None = None,
    max_links: int | None = None,
) -> Score:
    """Score by which absent links come: link prediction on the graph of the links that stay.

    Where fewer links have a score than must come, "soft" adds 1e-5 to the score of every absent link, and
    "top" takes the rest at random.

    Args:
      rule: "soft" draws links without replacement with probabilities proportional to their scores, "top"
        takes the largest.
      predictor: a name of `ch_scores` (sums over nodes) or `path_scores` (over paths), or a function
        bool [*batch, n, m] -> scores of at least 0.
      row_block: of `ch_scores`: nodes whose communities are looked at together; None: 512. Layers of a stack
        come one after the other.
      exact: of `ch_scores`: the same bits on any number of devices.
      axes: mesh axes, of the mesh in force (`jax.set_mesh`), over which the work of a node-based predictor is
        divided by hand; None leaves that to the compiler.
      max_links: of `path_scores`: no layer has more; None: any number.

    Returns:
      A score, for `grow=` of `dst`.

    Raises:
      ValueError: an unknown rule or predictor; `axes` with a path-based one.

    Source: Zhang et al. 2025, arXiv 2501.19107, section 3 (soft regrowth); Zhang et al. 2024 (CHT).
    """
    _one_of("regrowth", rule, ("soft", "top"))
    if not callable(predictor):
        _one_of("predictor", predictor, (*NODE_PREDICTORS, *PATH_PREDICTORS))
        if axes is not None and predictor in PATH_PREDICTORS:
            raise ValueError(f"axes={axes!r} divides sums over nodes, and {predictor!r} sums over paths")

    def scores_of(mask: jax.Array) -> jax.Array:
        if callable(predictor):
            return predictor(mask)
        if predictor in PATH_PREDICTORS:
            return path_scores(mask, predictor, max_links=max_links or mask.shape[-2] * mask.shape[-1])
        block = row_block
        if row_block is None and (mask.ndim > 2 or max(mask.shape[-2:]) > _ROWS):
            block = _ROWS
        if axes is not None:
            return sharded_ch_scores(mask, predictor, axis=axes, row_block=block, exact=exact)
        return ch_scores(mask, predictor, row_block=block, exact=exact)

    def score(layer: Layer) -> jax.Array:
        scores = jnp.where(layer.mask, 0, scores_of(layer.mask)).astype(jnp.float32)
        if rule == "top":
            return jnp.where(scores > 0, scores, jax.random.uniform(layer.key, scores.shape) - 1)
        if isinstance(layer.structure, Block | Channel):
            size = layer.structure, layer.mask.ndim - 2
            taken = pooled(layer.mask, *size, "any")
            count = layer.count // unit(layer.structure, layer.mask.shape[-2:])
            return _drawn(layer, scores, lambda weights: jnp.log(_floored(weights, taken, count)))
        if isinstance(layer.structure, NM):
            # Every group is filled up, also one in which no link has a score.
            return perturbed(layer.key, jnp.log(jnp.where(layer.mask, 0, scores + jnp.float32(_FLOOR))))
        return perturbed(layer.key, jnp.log(_floored(scores, layer.mask, layer.count)))

    return score


def _floored(scores: jax.Array, taken: jax.Array, count: jax.Array) -> jax.Array:
    """1e-5 more for every candidate where fewer of them have a score than must come."""
    found = jnp.sum(scores > 0, axis=tuple(range(count.ndim, scores.ndim)), dtype=jnp.int32)
    few = (found < count).reshape(count.shape + (1,) * (scores.ndim - count.ndim))
    return jnp.where(few & ~taken, scores + jnp.float32(_FLOOR), jnp.where(taken, 0, scores))


def _drawn(layer: Layer, scores: jax.Array, logits: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """Noisy logits of the pooled scores of blocks or channels: one draw for each, seen by all its links."""
    batch = layer.mask.ndim - 2
    noisy = perturbed(layer.key, logits(pooled(scores, layer.structure, batch, layer.structure.pool)))
    return unpooled(noisy, layer.structure, layer.mask.shape, batch)


def _one_of(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def _temperatures(given: Any) -> tuple[float, float]:
    if len(given) != 2 or not all(isinstance(t, int | float) and t >= 0 for t in given):
        raise ValueError(f"temperature must be two numbers of at least 0, or one, got {given!r}")
    return given[0], given[1]


def _needs_end(what: str, end: int | None) -> int:
    if end is None:
        raise ValueError(
            f"{what} changes until the last change of links: pass end, such as 3/4 of the training"
        )
    return end


def chts(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int | None,
    interval: int = 100,
    zeta: float | Schedule = 0.3,
    adaptive_zeta: bool = True,
    predictor: Predictor = "CH2_L3n",
    removal_rule: Literal["soft", "hard"] = "soft",
    alpha: float = 1.0,
    temperature: Temperature = (1.0, 9.0),
    regrowth_rule: Literal["soft", "top"] = "soft",
    wiring: Wiring | None = None,
    row_block: int | None = None,
    exact: bool = True,
    axes: str | tuple[str, ...] | None = None,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """CHTs: links that stay are drawn by the size of their weights, new ones by Cannistraci-Hebb scores.

    No gradient of an absent link is looked at. In the paper: zeta 0.3 (MLP, translation) or 0.1 (LLaMA), an
    interval of an epoch (MLP) or 100 updates, temperature 1 to 9 (1 to 3 for MLPs), `end` at three quarters
    of the training, a learning rate that is warmed up again after each change (`schedules.rewarm`).

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has; `per_head` of a plan makes every attention
        head a graph of its own.
      key: a typed key.
      end: the last update that may change links; None: no limit (then pass a fixed zeta and temperature).
      interval: updates between two changes.
      zeta: share of links that is replaced; a number or a schedule.
      adaptive_zeta: a number zeta falls to 0 at `end` as half a cosine; False keeps it.
      predictor: scores of absent links: CH2_L3n, CH3_L3n, CH3.1_L3n (over nodes), CH2_L3p, CH3_L3p, CH3.1_L3p
        (over paths), or a function of the masks.
      removal_rule: "soft" or "hard", see `removal`.
      alpha: 1 removes by weight magnitude, 0 by relative importance.
      temperature: exponent of the soft removal, delta / (1 - delta) of the paper: a number, a pair (at update
        0, at `end`) with a straight line between, or a schedule.
      regrowth_rule: "soft" or "top", see `regrowth`.
      wiring: which layers meet in which neurons (`wiring_of(model)`): links of dead neurons go, too. None: no
        percolation. Leaves with N:M, blocks or channels count as dense here.
      row_block: see `regrowth`.
      exact: see `regrowth`.
      axes: see `regrowth`.
      **options: of `dst`: `masks` (such as `drawn(partial(brf_mask, r=0.25))`), `start`, `skip_step`,
        `init_new="history"`, `early_stop`, `by_edit`, and `density`, such as `ems(...)`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `dst`, `removal` and `regrowth`; no `end` where something falls until it; a wiring that
        does not fit the plan.

    Source: Zhang et al., NeurIPS 2025, arXiv 2501.19107.

    Example:
      >>> from odjax.sparse import links, uniform
      >>> params = {"kernel": jnp.ones((16, 16))}
      >>> optimizer = chts(optax.sgd(0.1), uniform(params, 0.75), key=jax.random.key(0), end=3, interval=2)
      >>> state = optimizer.init(params)
      >>> for _ in range(2):
      ...     updates, state = optimizer.update(params, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> int(links(state.masks["kernel"]))
      64
    """
    for path, leaf in plan.items():
        try:
            matrix_of(leaf)
        except ValueError as error:
            raise ValueError(f"{path!r}: {error}") from None
    if isinstance(zeta, int | float) and not 0 <= zeta <= 1:
        raise ValueError(f"zeta must be between 0 and 1, got {zeta!r}")
    if adaptive_zeta and not callable(zeta):
        zeta = cosine(zeta, _needs_end("adaptive_zeta=True", end))
    if isinstance(temperature, tuple | list):
        first, last = _temperatures(temperature)
        temperature = optax.linear_schedule(first, last, _needs_end(f"temperature={temperature}", end))
    if wiring is not None:
        if "percolate" in options:
            raise ValueError("wiring= is percolation already: leave out percolate=")
        ends = {end.path for junction in wiring for end in (*junction.inputs, *junction.outputs)}
        if not ends & set(plan):
            some = ", ".join(map(repr, [*sorted(ends)[:2], "..."]))
            raise ValueError(
                f"the wiring ({some}) names no leaf of the plan ({next(iter(plan))!r}, ...): take "
                "wiring_of(model) of the model whose parameters these are"
            )
        free = [path for path, leaf in plan.items() if leaf.structure is None]
        restricted = restrict_wiring(wiring, dict.fromkeys(free, True))
        options["percolate"] = functools.partial(percolate, wiring=restricted) if restricted else None
    bound = None if "density" in options else max((leaf.links for leaf in plan.values()), default=None)
    return dst(
        inner,
        plan,
        key=key,
        drop=removal(removal_rule, alpha=alpha, temperature=temperature),
        grow=regrowth(
            regrowth_rule, predictor=predictor, row_block=row_block, exact=exact, axes=axes, max_links=bound
        ),
        zeta=zeta,
        interval=interval,
        end=end,
        **options,
    )


def chtss(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    end: int,
    density: float = 0.5,
    decay: Literal["sigmoid", "cubic"] | Schedule = "sigmoid",
    decay_start: int = 0,
    decay_end: int | None = None,
    k: float = 6.0,
    prune_alpha: float = 0.0,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """CHTss: CHTs whose density falls to the plan's, each time pruned by relative importance first.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has at the end.
      key: a typed key.
      end: the last update that may change links; it goes to the plan whatever the decay says.
      density: at the start.
      decay: law of the density, or a schedule of its own. For equal cost "sigmoid" takes half as many updates
        as "cubic".
      decay_start: the update up to which the density stays.
      decay_end: the update from which it is the plan's; None: `end`.
      k: steepness of the sigmoid.
      prune_alpha: by what links are pruned: 0 is relative importance, 1 the magnitude.
      **options: of `chts` and `dst`; `across=True` prunes by the scores of all layers together.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `chts`; a decay that ends after `end`, a density below the plan's.

    Source: Zhang et al., NeurIPS 2025, arXiv 2501.19107, section 3 (sigmoid gradual density decay).

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> plan = uniform(params, 0.75)
      >>> optimizer = chtss(optax.adam(1e-3), plan, key=jax.random.key(0), end=750, decay_end=400)
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    planned = overall_density(plan)
    if not callable(decay):
        _one_of("decay", decay, ("sigmoid", "cubic"))
        stop = end if decay_end is None else decay_end
        if stop > end:
            raise ValueError(f"decay_end={stop} is after the last change of links, end={end}")
        if density < planned:
            raise ValueError(f"density={density} at the start is below the plan's {planned:g}")
        if decay == "sigmoid":
            decay = sigmoid(density, planned, decay_start, stop, k)
        else:
            decay = cubic(density, planned, decay_start, stop)
    return chts(
        inner,
        plan,
        key=key,
        end=end,
        density=decay,
        prune=removal("hard", alpha=prune_alpha),
        **options,
    )


def cht(
    inner: optax.GradientTransformation,
    plan: Plan,
    *,
    key: jax.Array,
    zeta: float | Schedule = 0.3,
    interval: int = 100,
    end: int | None = None,
    predictor: Predictor = "CH3_L3p",
    early_stop: float | None = 0.9,
    **options: Any,
) -> optax.GradientTransformationExtraArgs:
    """CHT: the smallest weights go and the links with the largest scores come, until a layer settles.

    Args:
      inner: the optimizer.
      plan: which leaves are sparse and how many links each has.
      key: a typed key.
      zeta: share of links that is replaced, fixed.
      interval: updates between two changes; an epoch in the paper.
      end: the last update that may change links.
      predictor: scores of absent links, as in `chts`.
      early_stop: a layer is left alone once more than this share of its new links had just been removed.
      **options: of `chts` and `dst`.

    Returns:
      A transform with state `DstState`.

    Raises:
      ValueError: as `chts`.

    Source: Zhang et al., ICLR 2024, "Epitopological learning and Cannistraci-Hebb network shape intelligence
      brain-inspired theory for ultra-sparse advantage in deep learning".

    Example:
      >>> from odjax.sparse.plans import uniform
      >>> params = {"kernel": jnp.ones((16, 8))}
      >>> optimizer = cht(optax.sgd(0.1), uniform(params, 0.75), key=jax.random.key(0))
      >>> jax.eval_shape(optimizer.init, params).masks["kernel"].shape
      (1, 8)
    """
    fixed: dict[str, Any] = {
        "adaptive_zeta": False,
        "removal_rule": "hard",
        "temperature": 1.0,
        "regrowth_rule": "top",
    }
    return chts(
        inner,
        plan,
        key=key,
        end=end,
        interval=interval,
        zeta=zeta,
        predictor=predictor,
        early_stop=early_stop,
        **(fixed | options),
    )
