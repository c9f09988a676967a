"""DP-SGD on records: per-example gradients clipped by jax-privacy, noise and normalizer from the plan.

M. Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133, Algorithm 1.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from odjax.core.dtypes import statistics_dtype
from odjax.core.keys import check_key
from odjax.privacy.clipping import check_relation
from odjax.privacy.forecast import PrivacyForecast
from odjax.privacy.noise import gaussian_noise
from odjax.privacy.plan import PrivacyPlan


class PerExample(NamedTuple):
    """What the examples of a batch had; 0 for padding. It is no release: nothing of it has noise.

    Attributes:
      losses: float32 [B].
      norms: float32 [B], of the gradients before the clip.
    """

    losses: jax.Array
    norms: jax.Array


@dataclass(frozen=True)
class _Clipped:
    """jax-privacy's function with the sensitivity that it declares, under our names of the relations."""

    function: Any

    def sensitivity(self, relation: str) -> float:
        import dp_accounting

        return self.function.sensitivity(dp_accounting.NeighboringRelation[check_relation(relation).upper()])


def _package() -> Any:
    try:
        import jax_privacy
    except ImportError as error:
        raise ValueError(
            "private_gradient needs the package jax-privacy: pip install 'odjax[privacy]'"
        ) from error
    return jax_privacy


def private_gradient(
    loss: Callable[[Any, Any], jax.Array],
    plan: PrivacyPlan | PrivacyForecast,
    *,
    microbatch: int | None = None,
) -> Callable[[Any, Any, jax.Array, jax.Array], tuple[Any, PerExample]]:
    """A gradient for any optimizer, private for every record: (sum of clipped gradients + noise) / (q N).

    Gradients are taken and clipped example by example by `jax_privacy.clipped_grad`, which also declares the
    sensitivity that the noise is sized by. NaN and inf in a gradient count as 0. The norms, the clip and the
    sum are float32 whatever the parameters are (float64 for float64 parameters), and so is the noise.

    Args:
      loss: `loss(params, example) -> scalar`, of one example without a batch axis. It must not look at other
        examples: no batch statistics.
      plan: of the run, with a clip that has a `norm`, such as `Clip`. Its sample of every step is the batch.
      microbatch: examples whose gradients are there at once; it must divide the places of the batch. None:
        all.

    Returns:
      `gradient(params, batch, mask, key) -> (gradient, PerExample)` with the examples of `plan.sample` as a
      tree of [B, ...] (padding may hold anything), mask bool [B], and a typed key of this step. The gradient
      is like params.

    Raises:
      TypeError: the clip has no norm; when it is called, a mask that is not bool or a legacy key.
      ValueError: jax-privacy is missing, or microbatch is no whole number of at least 1; when it is called, a
        batch, mask and microbatch that do not fit.

    Source: M. Abadi et al., Deep Learning with Differential Privacy, CCS 2016, arXiv 1607.00133, Algorithm 1.

    Example:
      >>> import optax
      >>> from odjax.privacy import privacy_plan
      >>> plan = privacy_plan(population=100, cohort=2, clip=1.0, rounds=10, delta=1e-3,
      ...                     noise_multiplier=0.5, unit="record")
      >>> gradient = private_gradient(lambda w, x: jnp.sum((w - x) ** 2), plan)
      >>> batch, mask = jnp.ones((4, 3)), jnp.array([True, True, False, False])
      >>> grads, aux = jax.jit(gradient)(jnp.zeros(3), batch, mask, jax.random.key(0))
      >>> grads.shape, aux.losses
      ((3,), Array([3., 3., 0., 0.], dtype=float32))
    """
    package = _package()
    norm = getattr(plan.clip, "norm", None)
    if norm is None:
        raise TypeError(f"private_gradient needs a clip with a norm, such as Clip(1.0), got {plan.clip!r}")
    if microbatch is not None and (not isinstance(microbatch, int) or microbatch < 1):
        raise ValueError(f"microbatch must be a whole number of at least 1, or None, got {microbatch!r}")

    def gradient(params: Any, batch: Any, mask: jax.Array, key: jax.Array) -> tuple[Any, PerExample]:
        check_key(key)
        _check_batch(batch, mask, microbatch)
        wide = jnp.dtype(jnp.float32)
        if any(statistics_dtype(leaf) == jnp.float64 for leaf in jax.tree.leaves(params)):
            wide = jnp.dtype(jnp.float64)
        clipped = package.clipped_grad(
            loss,
            l2_clip_norm=float(norm),
            normalize_by=plan.normalizer,
            keep_batch_dim=False,
            return_values=True,
            return_grad_norms=True,
            pre_clipping_transform=lambda g: jax.tree.map(lambda x: x.astype(wide), g),
            microbatch_size=microbatch,
        )
        # The package relies on jax's own promotion, and on a name that newer releases of optax warn of.
        with jax.numpy_dtype_promotion("standard"), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optax.global_norm is deprecated", DeprecationWarning)
            mean, aux = clipped(params, batch, is_padding_example=~mask)
        noisy = gaussian_noise(_Clipped(clipped), plan.noise_multiplier, key, mean, relation=plan.relation)
        noisy = jax.tree.map(lambda g, p: g.astype(p.dtype), noisy, params)
        losses, norms = (jnp.where(mask, x.astype(jnp.float32), 0) for x in (aux.values, aux.grad_norms))
        return noisy, PerExample(losses, norms)

    return gradient


def _check_batch(batch: Any, mask: jax.Array, microbatch: int | None) -> None:
    if getattr(mask, "dtype", None) != jnp.bool_ or mask.ndim != 1:
        raise TypeError(f"mask must be bool [B], True for examples, as plan.sample gives it, got {mask!r}")
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(batch)}
    if sizes != {mask.shape}:
        raise ValueError(
            f"every leaf of the batch must have the {len(mask)} places of the mask as its first axis, got "
            f"{sorted(sizes)}"
        )
    if microbatch is not None and len(mask) % microbatch:
        raise ValueError(f"microbatch={microbatch} must divide the {len(mask)} places of the batch")
