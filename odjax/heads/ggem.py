"""Group generalised-mean pooling: a power mean over the tokens with one exponent for each group of channels.

Exponent 1 is the mean, a large exponent the maximum, one group is generalised-mean pooling (GeM), and as many
groups as attention heads is the choice of the paper.

    y_c = ( 1/N sum_n r_nc^p )^(1/p)              r = max(x, eps), p the exponent of c's group
    dy_c/dx_nc = 1/N (r_nc / y_c)^(p-1)           where x_nc > eps, else 0
    dy_c/dp = y_c/p sum_n w_nc log(r_nc / y_c)    w_nc = 1/N (r_nc / y_c)^p, which sum to 1

Everything is computed from the ratios to the largest token or to y, so no power overflows. What is kept for
the derivatives is x, y and p: the powers are computed again from them.

Source: Ko et al. 2022, "Group Generalized Mean Pooling for Vision Transformer", arXiv 2212.04114.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.typing import DTypeLike

from odjax.core import named, statistics_dtype
from odjax.heads.pooling import check_tokens

RECTIFIERS = ("clamp", "softplus", "shift")
Axis = str | tuple[str, ...] | None


class _Options(NamedTuple):
    """What is static of a power mean; `sign` -1 pools the negative parts."""

    eps: float
    rectify: str
    sign: int
    axis_name: Axis


def _over(axis_name: Axis, reduce: Any, value: Any) -> Any:
    return value if axis_name is None else reduce(value, axis_name)


def _tokens_kept(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The mask as [..., N, 1]."""
    return jnp.ones((*x.shape[:-1], 1), bool) if mask is None else mask[..., None]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _least(x: jax.Array, mask: jax.Array | None, axis_name: Axis) -> jax.Array:
    """The smallest entry of each sample's kept tokens, [..., N, D] to [..., 1, 1]."""
    x = jnp.where(_tokens_kept(x, mask), x, jnp.asarray(jnp.inf, x.dtype))
    return _over(axis_name, jax.lax.pmin, jnp.min(x, axis=(-2, -1), keepdims=True))


@_least.defjvp
def _least_jvp(axis_name: Axis, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    """Equal entries share the derivative; `pmin` has none of its own."""
    x, mask = primals
    least = _least(x, mask, axis_name)
    smallest = (x == least) & _tokens_kept(x, mask)
    count = jnp.sum(smallest.astype(x.dtype), axis=(-2, -1), keepdims=True)
    moved = jnp.sum(jnp.where(smallest, tangents[0], 0), axis=(-2, -1), keepdims=True)
    count, moved = _over(axis_name, jax.lax.psum, (count, moved))
    return least, moved / jnp.maximum(count, 1)


def _rectified(x: jax.Array, mask: jax.Array | None, options: _Options) -> jax.Array:
    """The numbers of which eps is the least that is pooled."""
    if options.rectify == "softplus":
        return jax.nn.softplus(x)
    if options.rectify == "shift":
        return x - _least(x, mask, options.axis_name)
    return x if options.sign > 0 else -x


def _wide(x: jax.Array, mask: jax.Array | None) -> jax.Array:
    """The tokens in the dtype of the computation, zero where the mask is False."""
    x = x.astype(statistics_dtype(x))
    return x if mask is None else jnp.where(mask[..., None], x, 0)


def _log_ratio(r: jax.Array, y: jax.Array) -> jax.Array:
    """log(r / y) of r [..., N, D] and y [..., D], finite where the ratio is too small for the dtype."""
    return jnp.log(jnp.maximum(r / y[..., None, :], jnp.finfo(r.dtype).tiny))


def _count(x: jax.Array, mask: jax.Array | None, axis_name: Axis) -> jax.Array:
    """Tokens of each sample as [..., 1]."""
    count = jnp.sum(_tokens_kept(x, mask).astype(x.dtype), axis=-2)
    return _over(axis_name, jax.lax.psum, count)


def _channels(p: jax.Array, rank: int) -> jax.Array:
    return jnp.expand_dims(p, tuple(range(rank - 1)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(3,))
def _power_mean(x: jax.Array, p: jax.Array, mask: jax.Array | None, options: _Options) -> jax.Array:
    """The pooled [..., D] of x [..., N, D] and one exponent a channel p [D], in the dtype of p."""
    x, eps = _wide(x, mask), jnp.asarray(options.eps, p.dtype)
    kept = _tokens_kept(x, mask)
    r = jnp.where(kept, jnp.maximum(_rectified(x, mask, options), eps), eps)
    largest = _over(options.axis_name, jax.lax.pmax, jnp.max(r, axis=-2))
    # Powers minus 1 keep the digits of small exponents, which dividing the logarithm by p would lose.
    less = jnp.expm1(_channels(p, x.ndim) * _log_ratio(r, largest))
    sums = tuple(jnp.sum(jnp.where(kept, terms, 0), axis=-2) for terms in (less, less + 1))
    less, powers = _over(options.axis_name, jax.lax.psum, sums)
    count = _count(x, mask, options.axis_name)
    some, count = count > 0, jnp.maximum(count, 1)
    log_mean = jnp.where(less > -count / 2, jnp.log1p(less / count), jnp.log(powers / count))
    return jnp.where(some, largest * jnp.exp(log_mean / _channels(p, x.ndim - 1)), 0)


@functools.partial(_power_mean.defjvp, symbolic_zeros=True)
def _power_mean_jvp(options: _Options, primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    x, p, mask = primals
    y = _power_mean(x, p, mask, options)
    moved = [None if isinstance(t, SymbolicZero) else t for t in tangents[:2]]

    # With everything below computed again, only x, p and y live until the backward pass.
    @jax.checkpoint
    def tangent(x: jax.Array, p: jax.Array, y: jax.Array, dx: Any, dp: Any) -> jax.Array:
        wide, eps = _wide(x, mask), jnp.asarray(options.eps, p.dtype)
        kept = _tokens_kept(x, mask)
        if dx is None:
            r, dr = _rectified(wide, mask, options), None
        else:
            rectify = functools.partial(_rectified, mask=mask, options=options)
            r, dr = jax.jvp(rectify, (wide,), (_wide(dx, mask),))
        above = kept & (r > eps)
        r = jnp.where(above, r, eps)
        count = jnp.maximum(_count(wide, mask, options.axis_name), 1)
        log_ratio, exponent = _log_ratio(r, jnp.where(y > 0, y, 1)), _channels(p, x.ndim)
        total = 0
        if dr is not None:
            slope = jnp.where(above, jnp.exp((exponent - 1) * log_ratio), 0)
            total = jnp.sum(slope * dr, axis=-2)
        if dp is not None:
            weighted = jnp.where(kept, jnp.exp(exponent * log_ratio) * log_ratio, 0)
            slope = y / _channels(p, x.ndim - 1) * jnp.sum(weighted, axis=-2)
            total = total + slope * _channels(dp, x.ndim - 1)
        return _over(options.axis_name, jax.lax.psum, total) / count

    return y, tangent(x, p, y, *moved)


def _check(width: int, groups: int, eps: float, rectify: str, signed: bool) -> None:
    if width % groups:
        raise ValueError(
            f"{width} channels are not a multiple of {groups} groups: "
            "take as many groups as attention heads, or another divisor"
        )
    if not eps >= np.finfo(np.float32).tiny:
        raise ValueError(f"eps must be positive (and not below 1.2e-38), got {eps}: take eps=1e-6")
    if rectify not in RECTIFIERS:
        raise ValueError(f"rectify must be one of {', '.join(RECTIFIERS)}, got {rectify!r}")
    if signed and rectify != "clamp":
        raise ValueError(
            f"signed=True pools both signs and needs rectify='clamp', got rectify={rectify!r}: leave one out"
        )


def _pooled(
    x: jax.Array,
    p: jax.Array,
    mask: jax.Array | None,
    eps: float,
    rectify: str,
    signed: bool,
    axis_name: Axis,
) -> jax.Array:
    """`ggem_pool` in float32, or float64 for float64."""
    check_tokens(x, mask)
    if p.ndim != 1 or not p.size or not jnp.issubdtype(p.dtype, jnp.floating):
        raise ValueError(
            f"p must be floating point [groups], got {p.dtype} of shape {tuple(p.shape)}: "
            "write jnp.full((groups,), 3.0)"
        )
    _check(x.shape[-1], p.size, eps, rectify, signed)
    known = not isinstance(p, jax.core.Tracer) and getattr(p, "is_fully_addressable", True)
    if known and not np.all(np.asarray(p) > 0):
        raise ValueError(f"exponents must be positive, got p = {p}: keep them at 0.01 or more")
    p = p.astype(statistics_dtype(x))
    p = jnp.reshape(jnp.broadcast_to(p[:, None], (p.size, x.shape[-1] // p.size)), (-1,))
    y = _power_mean(x, p, mask, _Options(eps, rectify, 1, axis_name))
    if signed:
        y = y - _power_mean(x, p, mask, _Options(eps, rectify, -1, axis_name))
    return y


def ggem_pool(
    x: jax.Array,
    p: jax.Array,
    *,
    mask: jax.Array | None = None,
    eps: float = 1e-6,
    rectify: str = "clamp",
    signed: bool = False,
    axis_name: Axis = None,
) -> jax.Array:
    """Power mean over the tokens, with one exponent for each group of neighbouring channels.

    Differentiable in both modes and more than once. The reverse mode keeps x, p and the result, no array of
    powers.

    | case                                 | result                                                      |
    |--------------------------------------|-------------------------------------------------------------|
    | entries below eps                    | count as eps, with zero gradient                            |
    | a sample without a token in the mask | an error for a concrete mask; traced: zeros, zero gradients |
    | what lies at masked tokens, NaN too  | ignored, with zero gradient                                 |
    | NaN or infinity elsewhere            | NaN                                                         |

    Args:
      x: tokens [..., N, D] floating point, class token left out.
      p: exponents [G], positive, G a divisor of D; group g is the channels g D/G to (g + 1) D/G.
      mask: bool [..., N], True at tokens; None: all are.
      eps: the least that an entry counts, and what replaces smaller ones.
      rectify: what is done about negative entries before that. "clamp": nothing, they count as eps;
        "softplus": log(1 + exp(x)); "shift": the smallest entry of the sample is subtracted, differentiably
        (it is not added again: a LayerNorm behind the pooling would remove it).
      signed: pools positive and negative parts each and subtracts: an odd function of x.
      axis_name: inside `jax.shard_map`, the mesh axis or axes over which the tokens are sharded: one maximum
        and one pair of sums [..., D] go over it, and one sum in each derivative.

    Returns:
      [..., D] in the dtype of x; computed in float32, or float64 for float64.

    Raises:
      ValueError: no tokens, channels that the groups do not divide, exponents or eps that are not positive, a
        mask of another shape or without a token, an unknown `rectify`.
      TypeError: tokens that are not floating point, a mask that is not bool.

    Source: Ko et al. 2022, arXiv 2212.04114, section 3 (the power mean of groups). `rectify` and `signed` are
    not in the paper.

    Example:
      >>> x = jnp.array([[1.0, 1.0], [3.0, 3.0]])
      >>> ggem_pool(x, jnp.array([1.0, 200.0])).round(2)
      Array([2.  , 2.99], dtype=float32)
    """
    return _pooled(x, p, mask, eps, rectify, signed, axis_name).astype(x.dtype)


@jax.custom_jvp
def _at_least(p: jax.Array, p_min: float) -> jax.Array:
    """The larger of both, with the derivative of the identity in p."""
    return jnp.maximum(p, jnp.asarray(p_min, p.dtype))


@_at_least.defjvp
def _at_least_jvp(primals: tuple, tangents: tuple) -> tuple[jax.Array, jax.Array]:
    return _at_least(*primals), tangents[0]


class GGeM(nn.Module):
    """Group generalised-mean pooling with trained exponents, a pooling of `odjax.heads.pooling`.

    Parameters: `p` [num_groups], the exponents themselves; none without `learnable`. An exponent below
    `p_min` counts as `p_min`; its gradient is that at `p_min`, not zero (straight-through), so a loss that
    asks for larger exponents again gets them. Give `p` no weight decay, and a learning rate of its own where
    it moves too little or too much: `where=r"(.*/)?p"` selects it.

    Attributes:
      num_groups: exponents, a divisor of the channels; as many as attention heads in the paper, 1 for GeM.
      p_init: where they start; 1 is the mean.
      p_min: the least exponent.
      learnable: whether exponents are parameters; otherwise all are `p_init`.
      eps: see `ggem_pool`.
      rectify: see `ggem_pool`.
      signed: see `ggem_pool`.
      dtype: of the result; the computation is float32.
      param_dtype: of the exponents.

    Raises:
      ValueError: at construction, for numbers out of range; when called, like `ggem_pool`.
      TypeError: when called, like `ggem_pool`.

    Source: Ko et al. 2022, arXiv 2212.04114, section 3. The paper's start of p is not known here; 3 is the
    custom of image retrieval.

    Example:
      >>> pool = GGeM(num_groups=2, p_init=1.0)
      >>> pool.init_with_output(jax.random.key(0), jnp.array([[[1.0, 0.0], [3.0, 2.0]]]))[0].round(3)
      Array([[2., 1.]], dtype=float32)
    """

    num_groups: int
    p_init: float = 3.0
    p_min: float = 1e-2
    learnable: bool = True
    eps: float = 1e-6
    rectify: str = "clamp"
    signed: bool = False
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_groups < 1:
            raise ValueError(f"num_groups must be at least 1, got {self.num_groups}: 1 is GeM")
        if not self.p_min > 0:
            raise ValueError(f"p_min must be positive, got {self.p_min}: take p_min=0.01")
        if not self.p_init >= self.p_min:
            raise ValueError(
                f"p_init must be positive and at least p_min {self.p_min}, got {self.p_init}: "
                "p_init=1.0 starts as the mean"
            )
        _check(self.num_groups, self.num_groups, self.eps, self.rectify, self.signed)

    @nn.compact
    def __call__(
        self, tokens: jax.Array, *, cls: jax.Array | None = None, mask: jax.Array | None = None
    ) -> jax.Array:
        """Pools tokens.

        Args:
          tokens: [..., N, D] floating point.
          cls: not used.
          mask: bool [..., N], True at tokens; None: all are.

        Returns:
          [..., D] in `dtype`.
        """
        del cls
        if self.learnable:
            init = named(nn.initializers.constant(self.p_init), None)
            p = _at_least(self.param("p", init, (self.num_groups,), self.param_dtype), self.p_min)
        else:
            p = jnp.full((self.num_groups,), self.p_init, self.param_dtype)
        return _pooled(tokens, p, mask, self.eps, self.rectify, self.signed, None).astype(self.dtype)
