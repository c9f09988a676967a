"""Class codes: one fixed vector a class, spread as far as they go.

| kind          | classes K in d dimensions | inner products of unit vectors                               |
|---------------|---------------------------|--------------------------------------------------------------|
| `simplex`     | K <= d + 1                | -1 / (K - 1): the best there is                              |
| `orthonormal` | K <= d                    | 0                                                            |
| `orthoplex`   | K <= 2 d                  | 0 and -1: the best worst one for d + 2 <= K                  |
| `hadamard`    | any, d a power of two     | 0 in a block of d, about sqrt(2 ln(K^2 / d) / d) at most     |
| `sphere`      | any                       | random directions: about sqrt(4 ln K / d) at most            |
| `gaussian`    | any                       | the same, and entries N(0, 1 / d), so that lengths vary too  |
| `optimized`   | small                     | descent on the largest ones                                  |

No code goes below the bound of Welch, sqrt((K - d) / (d (K - 1))) for the largest |cosine|.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from odjax.core import check_key
from odjax.heads.checks import whole_number
from odjax.heads.hadamard import hadamard_columns, is_power_of_two

KINDS = ("simplex", "orthonormal", "orthoplex", "hadamard", "sphere", "gaussian", "optimized")
# Those whose first columns do not depend on how many follow.
EXTENSIBLE = ("orthonormal", "orthoplex", "hadamard", "sphere", "gaussian")
_DRAWN = ("sphere", "gaussian", "optimized")


@dataclasses.dataclass(frozen=True)
class ClassCode:
    """A code by what it is made from, instead of by its numbers: hashable, and the same wherever it is made.

    Attributes:
      num_classes: K, at least 2.
      dim: d, of the features.
      kind: one of `KINDS`, or "auto": "simplex" for K <= d + 1, "orthoplex" for K <= 2 d, then "hadamard"
        where d is a power of two and its random signs are enough to tell the blocks apart, else "sphere".
      seed: of what is random; None: the unrotated form of "simplex", "orthonormal" and "orthoplex", or
        "hadamard" without signs (K <= d).

    Raises:
      TypeError: a number that is not a whole one.
      ValueError: K below 2, or a kind that K, d or the seed do not fit.

    Example:
      >>> ClassCode(10, 64).kind, ClassCode(100, 64).kind, ClassCode(1000, 64).kind
      ('simplex', 'orthoplex', 'hadamard')
    """

    num_classes: int
    dim: int
    kind: str = "auto"
    seed: int | None = 0

    def __post_init__(self) -> None:
        for name in ("num_classes", "dim", "seed"):
            if name != "seed" or self.seed is not None:
                object.__setattr__(self, name, whole_number(name, getattr(self, name)))
        if self.seed is not None and not 0 <= self.seed < 1 << 63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        k, d = self.num_classes, self.dim
        if k < 2 or d < 1:
            raise ValueError(f"a code needs at least 2 classes and 1 dimension, got {k} and {d}")
        if self.kind == "auto":
            signed = is_power_of_two(d) and self.seed is not None and not _may_coincide(k, d)
            wide = "hadamard" if signed else "sphere"
            kind = "simplex" if k <= d + 1 else "orthoplex" if k <= 2 * d else wide
            object.__setattr__(self, "kind", kind)
        _check_fit(self.kind, k, d)
        if self.seed is None and (self.kind in _DRAWN or (self.kind == "hadamard" and k > d)):
            raise ValueError(f"a {self.kind} code of {k} classes in {d} dimensions is random: give it a seed")

    @property
    def key(self) -> jax.Array | None:
        """The key of what is random, or None."""
        return None if self.seed is None else jax.random.key(self.seed)

    @property
    def by_number(self) -> bool:
        """Whether `columns` can make a column from its number, without the others."""
        rotated = self.seed is not None and self.kind in ("simplex", "orthonormal", "orthoplex")
        return not rotated and self.kind != "optimized"

    @property
    def exact(self) -> bool:
        """Whether it is made of integers and signs alone, and so the same bits on every machine."""
        return self.by_number and self.kind not in _DRAWN

    @property
    def is_slice(self) -> bool:
        """Whether the logits are the first K features times a number, but for a shift of all of them."""
        return self.seed is None and self.kind in ("simplex", "orthonormal") and self.num_classes <= self.dim

    def matrix(self, dtype: DTypeLike = jnp.float32) -> jax.Array:
        """The vectors as columns, [dim, num_classes]; built in float32 and rounded once."""
        return _matrix(self.key, self.num_classes, self.dim, self.kind).astype(dtype)

    def columns(self, classes: jax.Array) -> jax.Array:
        """Some vectors, without the others.

        Args:
          classes: their numbers, int32 [n].

        Returns:
          float32 [n, dim].

        Raises:
          ValueError: a code whose vectors depend on one another (rotated or optimized ones).
        """
        if not self.by_number:
            raise ValueError(
                f"the vectors of a rotated or optimized code are made together: use {self}.matrix()"
            )
        return _columns(self.key, classes, self.num_classes, self.dim, self.kind)


def class_code(
    key: jax.Array | None, num_classes: int, dim: int, kind: str = "auto", dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """One fixed vector a class, as the columns of a matrix.

    Args:
      key: a typed key; None: the unrotated form, where there is one (see `ClassCode.seed`).
      num_classes: K.
      dim: d.
      kind: as in `ClassCode`.
      dtype: of the result, which is built in float32 and rounded once.

    Returns:
      [dim, num_classes], columns of length 1 (but for "gaussian", whose lengths are 1 in the mean).

    Raises:
      TypeError: a key that is not a typed one, or a size that is not a whole number.
      ValueError: as `ClassCode`.

    Source: Jiang et al. 2023, arXiv 2310.05351, for what is best where; stacked bases for vocabularies are
      ours.

    Example:
      >>> class_code(None, 3, 2, "orthoplex").T
      Array([[ 1.,  0.],
             [ 0.,  1.],
             [-1.,  0.]], dtype=float32)
    """
    if key is not None:
        check_key(key)
    spec = ClassCode(num_classes, dim, kind, None if key is None else 0)
    return _matrix(key, spec.num_classes, spec.dim, spec.kind).astype(dtype)


def etf_matrix(
    key: jax.Array | None, num_classes: int, dim: int, dtype: DTypeLike = jnp.float32
) -> jax.Array:
    """A simplex equiangular tight frame: M^T M = K/(K-1) I - 1/(K-1) 11^T, M 1 = 0.

    M = sqrt(K / (K - 1)) U V^T with V [K, K - 1] the Helmert basis of the vectors orthogonal to 1, and U
    [d, K - 1] orthonormal columns, uniform over all of them. Without a key and with d >= K it is
    sqrt(K / (K - 1)) (I - 11^T / K) on the first K features, and [V^T; 0] for d = K - 1.

    Args:
      key: of the rotation, or None.
      num_classes: K, at least 2.
      dim: d, at least K - 1.
      dtype: of the result, which is built in float32 and rounded once.

    Returns:
      [dim, num_classes]. The factorization behind a rotation has other last bits on other machines: keep the
      result where that matters.

    Raises:
      TypeError: a key that is not a typed one, or a size that is not a whole number.
      ValueError: K below 2, or d below K - 1.

    Source: Papyan, Han and Donoho 2020, "Prevalence of neural collapse", definition 2; Yang et al. 2022,
      arXiv 2203.09081, equation 1.

    Example:
      >>> m = etf_matrix(jax.random.key(0), 3, 2)
      >>> bool(jnp.allclose(m.T @ m, 1.5 * jnp.eye(3) - 0.5, atol=1e-6))
      True
    """
    return class_code(key, num_classes, dim, "simplex", dtype)


def extend_code(
    key: jax.Array | None, code: jax.Array, num_classes: int, kind: str, dtype: DTypeLike | None = None
) -> jax.Array:
    """More classes for a code whose old vectors stay where they are.

    Args:
      key: that the code was made with.
      code: [d, K], of `class_code(key, K, d, kind)`.
      num_classes: of the longer code, at least K.
      kind: of the code, one of `EXTENSIBLE`.
      dtype: None: that of `code`.

    Returns:
      [d, num_classes]; the first K columns are those of `code`, bit for bit.

    Raises:
      ValueError: a kind that moves old vectors when it grows, fewer classes than there are, or more than fit.

    Example:
      >>> old = class_code(jax.random.key(0), 100, 64, "hadamard")
      >>> extend_code(jax.random.key(0), old, 1000, "hadamard").shape
      (64, 1000)
    """
    dim, old = code.shape
    if kind not in EXTENSIBLE:
        raise ValueError(
            f"a {kind} code moves all of its vectors when classes are added: reserve num_classes from the "
            f"start and compare the first ones (eval_classes), or use {', '.join(EXTENSIBLE)}"
        )
    if num_classes < old:
        raise ValueError(f"the code has {old} classes already, got num_classes {num_classes}")
    longer = class_code(key, num_classes, dim, kind, code.dtype if dtype is None else dtype)
    return longer.at[:, :old].set(code.astype(longer.dtype))


def helmert_rows(rows: jax.Array, num_classes: int) -> jax.Array:
    """Rows of the Helmert basis V [K, K - 1]: orthonormal columns, each orthogonal to the ones.

    Args:
      rows: int32 [n].
      num_classes: K.

    Returns:
      float32 [n, K - 1].

    Example:
      >>> v = helmert_rows(jnp.arange(3), 3)
      >>> bool(jnp.allclose(v.T @ v, jnp.eye(2), atol=1e-6))
      True
    """
    i, j = rows[:, None], jnp.arange(num_classes - 1, dtype=rows.dtype)[None]
    step = (j + 1).astype(jnp.float32)
    unit = jax.lax.rsqrt(step * (step + 1))
    return jnp.where(i <= j, unit, jnp.where(i == j + 1, -step * unit, 0.0))


def _check_fit(kind: str, k: int, d: int) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be auto or one of {', '.join(KINDS)}, got {kind!r}")
    if kind == "simplex" and d < k - 1:
        raise ValueError(
            f"a simplex of {k} classes needs at least {k - 1} dimensions, got {d}: widen the features, or "
            "take another code (kind='auto' of class_code)"
        )
    if kind == "orthonormal" and d < k:
        raise ValueError(f"{k} orthonormal vectors need at least {k} dimensions, got {d}")
    if kind == "orthoplex" and k > 2 * d:
        raise ValueError(f"an orthoplex in {d} dimensions has {2 * d} vectors, got {k} classes")
    if kind == "hadamard" and not is_power_of_two(d):
        raise ValueError(
            f"a Hadamard code needs a power of two of dimensions, got {d}: the next is "
            f"{1 << d.bit_length()}, or take kind='sphere'"
        )
    if kind == "hadamard" and _may_coincide(k, d):
        raise ValueError(
            f"{d} random signs are too few to tell the blocks of a Hadamard code of {k} classes apart: take "
            "64 dimensions or more, or kind='sphere'"
        )


def _may_coincide(k: int, d: int) -> bool:
    """Whether two blocks could share vectors: the chance that D_b D_c is a row of +-H is 2 d / 2^d."""
    blocks = -(-k // d)
    return blocks * (blocks - 1) / 2 * 2 * d > 1e-6 * 2.0 ** min(d, 1000)


def _frame(key: jax.Array, dim: int, count: int) -> jax.Array:
    """Orthonormal columns [dim, count], uniform over all of them: Q of a Gaussian matrix with diag(R) > 0."""
    # Column by column, so that a frame with more columns begins with the same ones.
    q, r = jnp.linalg.qr(_drawn(key, jnp.arange(count, dtype=jnp.int32), dim).T)
    return q * jnp.where(jnp.diagonal(r) < 0, -1.0, 1.0)[None]


def _drawn(key: jax.Array, classes: jax.Array, dim: int) -> jax.Array:
    """N(0, 1) [n, dim], each row from its own key."""
    draw = lambda k: jax.random.normal(jax.random.fold_in(key, k), (dim,), jnp.float32)  # noqa: E731
    return jax.vmap(draw)(classes)


def _columns(key: jax.Array | None, classes: jax.Array, k: int, d: int, kind: str) -> jax.Array:
    """float32 [n, d]; `key` is None where there is a rotation, which is somebody else's."""
    if kind == "hadamard":
        return hadamard_columns(key, classes, d)
    if kind in ("sphere", "gaussian"):
        rows = _drawn(key, classes, d)
        length = jnp.linalg.norm(rows, axis=1, keepdims=True) if kind == "sphere" else math.sqrt(d)
        return rows / length
    i = jnp.arange(d, dtype=classes.dtype)[None]
    if kind == "orthoplex":
        return jnp.where(i == (classes % d)[:, None], jnp.where(classes < d, 1.0, -1.0)[:, None], 0.0)
    unit = jnp.where(i == classes[:, None], jnp.float32(1), jnp.float32(0))
    if kind == "orthonormal":
        return unit
    scale = jnp.float32(math.sqrt(k / (k - 1)))
    if d >= k:
        return scale * (unit - jnp.where(i < k, jnp.float32(1 / k), jnp.float32(0)))
    return scale * helmert_rows(classes, k)


def _matrix(key: jax.Array | None, k: int, d: int, kind: str) -> jax.Array:
    """float32 [d, k]."""
    classes = jnp.arange(k, dtype=jnp.int32)
    if kind == "optimized":
        return _optimized(key, k, d)
    if key is None or kind in ("hadamard", "sphere", "gaussian"):
        return _columns(key, classes, k, d, kind).T
    if kind == "simplex":
        scale = jnp.float32(math.sqrt(k / (k - 1)))
        basis = helmert_rows(classes, k).T
        return scale * jnp.matmul(_frame(key, d, k - 1), basis, precision=jax.lax.Precision.HIGHEST)
    if kind == "orthonormal":
        return _frame(key, d, k)
    frame = _frame(key, d, d)
    return jnp.concatenate([frame, -frame], axis=1)[:, :k]


@functools.partial(jax.jit, static_argnums=(1, 2))
def _optimized(key: jax.Array, k: int, d: int, steps: int = 3000) -> jax.Array:
    """Descent on (1 / s) log sum_{k != l} exp(s <w_k, w_l>) over unit vectors, s growing from 8 to 800."""
    start = _columns(key, jnp.arange(k, dtype=jnp.int32), k, d, "sphere")
    optimizer = optax.adam(optax.cosine_decay_schedule(0.05, steps))
    own = jnp.eye(k, dtype=bool)

    def unit(w: jax.Array) -> jax.Array:
        return w / jnp.linalg.norm(w, axis=1, keepdims=True)

    def worst(w: jax.Array, sharpness: jax.Array) -> jax.Array:
        w = unit(w)
        gram = jnp.matmul(w, w.T, precision=jax.lax.Precision.HIGHEST)
        return jax.nn.logsumexp(jnp.where(own, -jnp.inf, sharpness * gram)) / sharpness

    def step(i: jax.Array, carry: tuple[jax.Array, optax.OptState]) -> tuple[jax.Array, optax.OptState]:
        w, state = carry
        sharpness = 8.0 * 100.0 ** (i.astype(jnp.float32) / steps)
        with jax.numpy_dtype_promotion("standard"):  # inside Adam
            updates, state = optimizer.update(jax.grad(worst)(w, sharpness), state)
        return optax.apply_updates(w, updates), state

    return unit(jax.lax.fori_loop(0, steps, step, (start, optimizer.init(start)))[0]).T
