"""A classifier head without trainable weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from odjax.core import Where, label, named, statistics_dtype
from odjax.heads.codes import KINDS, ClassCode
from odjax.heads.hadamard import hadamard_logits
from odjax.heads.losses import (
    batch_class_lengths,
    check_scale,
    etf_logits,
    scale_for_probability,
    unit_features,
    vertex_regression,
)
from odjax.heads.vocab import CHUNK, TokenLosses, check_labels, code_cross_entropy

LOSSES = ("ce", "dr")
NORMS = ("l2", "bn+l2", "none")


class FixedHead(nn.Module):
    """Class vectors that are fixed before training; only what is below them learns.

    Features go in, logits scale * h . m_k come out, h being the features of length 1. The vectors are no
    parameters: they have no gradient, no weight decay and no optimizer state. Most are computed where they
    are used (a simplex of K <= d classes is a slice of the features, a Hadamard code a fast transform); those
    that a machine could round differently are in the collection "constants", which a checkpoint keeps.

    The features must have both signs: end the layers below with a linear layer or a BatchNorm, not a ReLU.

    Parameters: none with norm "l2" or "none"; `batch_norm/(scale|bias)` with "bn+l2"; `bias` [K] if asked
    for. Constants: `code` [d, K] where it is stored.

    Attributes:
      num_classes: K, all that there will ever be, reserved ones included.
      kind: of the code, see `ClassCode`.
      seed: of what is random in it. The code does not depend on the key of `init`: whoever has the numbers of
        this head has its vectors.
      rotate: turn a simplex, orthonormal or orthoplex code by a random rotation, instead of using the first
        features as its axes.
      scale: inverse temperature; None: from `probability`, 1 for loss "dr" and for norm "none".
      probability: the highest that can be reached on a simplex with features of length 1; None: 0.999.
      loss: what `losses` computes: "ce" (cross-entropy) or "dr" (dot regression).
      norm: "l2", "bn+l2" (a BatchNorm before) or "none" (the length of the features is the confidence).
      bias: a trainable number a class, beside the fixed vectors: classes that never occur cost nothing then.
      weight: of the dot regression.
      lengths: vectors of length sqrt(gamma / n_k) in the losses of a training batch, for imbalanced classes.
      eval_classes: how many of the first classes are compared outside training; None: all.
      stored: keep the code in "constants"; None: unless it is made of integers alone. A code that is not
        stored is drawn anew in every step.
      collection: that a stored code is kept in.
      chunk: classes at a time in `losses`, where the code is not stored.
      dtype: of products; sums, logits and losses are float32.
      param_dtype: of the BatchNorm.

    Raises:
      TypeError: at construction, for a number of classes that is not a whole one.
      ValueError: at construction, for settings that do not fit together, or a trainable collection; when it
        is called, for features too narrow for the code.

    Source: Tiomoko Ali et al. 2024, arXiv 2402.18614; Yang et al. 2022, arXiv 2203.09081.

    Example:
      >>> head = FixedHead(10)
      >>> h = jnp.ones((2, 64))
      >>> head.init(jax.random.key(0), h)
      {}
      >>> head.apply({}, h).shape
      (2, 10)
    """

    num_classes: int
    kind: str = "auto"
    seed: int = 0
    rotate: bool = False
    scale: float | None = None
    probability: float | None = None
    loss: str = "ce"
    norm: str = "l2"
    bias: bool = False
    weight: float = 1.0
    lengths: bool = False
    eval_classes: int | None = None
    stored: bool | None = None
    collection: str = "constants"
    chunk: int = CHUNK
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if self.norm not in NORMS:
            raise ValueError(f"norm must be one of {', '.join(NORMS)}, got {self.norm!r}")
        if self.bias and self.loss == "dr":
            raise ValueError("a bias is for loss='ce': a dot regression looks at the own vector alone")
        if self.collection == "params":
            raise ValueError(
                "a fixed code is not to be trained: collection='params' would give it a gradient and weight "
                "decay; for a tree that must hold it as a parameter use odjax.heads.keep_constant"
            )
        if self.scale is not None:
            check_scale(self.scale)
            if self.probability is not None:
                raise ValueError(f"give scale={self.scale} or probability={self.probability}, not both")
        if self.kind not in ("auto", *KINDS):
            raise ValueError(f"kind must be auto or one of {', '.join(KINDS)}, got {self.kind!r}")
        ClassCode(self.num_classes, self.num_classes)  # raises for what is no number of classes
        if self.probability is not None:
            scale_for_probability(self.num_classes, self.probability)
        if self.eval_classes is not None and not 2 <= self.eval_classes <= self.num_classes:
            raise ValueError(
                f"eval_classes must be between 2 and num_classes {self.num_classes}, got {self.eval_classes}"
            )
        if self.chunk < 1:
            raise ValueError(f"chunk must be at least 1, got {self.chunk}")

    def code(self, dim: int) -> ClassCode:
        """The code for features of a width.

        Args:
          dim: d.

        Returns:
          What it is made from.

        Raises:
          ValueError: a width that the code does not fit.
        """
        code = ClassCode(self.num_classes, dim, self.kind, self.seed)
        if code.kind in ("simplex", "orthonormal", "orthoplex") and not self.rotate:
            code = ClassCode(self.num_classes, dim, code.kind, None)
        return code

    def inverse_temperature(self) -> float:
        """The scale of the logits."""
        if self.scale is not None:
            return float(self.scale)
        if self.probability is None and (self.loss == "dr" or self.norm == "none"):
            return 1.0
        return scale_for_probability(self.num_classes, self.probability or 0.999)

    def setup(self) -> None:
        """Makes the BatchNorm and the bias, where there are any."""
        if self.norm == "bn+l2":
            self.batch_norm = nn.BatchNorm(
                momentum=0.9,
                epsilon=1e-5,
                dtype=jnp.float32,
                param_dtype=self.param_dtype,
                scale_init=named(nn.initializers.ones, "norm"),
                bias_init=named(nn.initializers.zeros, "norm"),
            )

        if self.bias:
            zeros = named(nn.initializers.zeros, "vocab")
            self.prior = self.param("bias", zeros, (self.num_classes,), self.param_dtype)

    def prepared(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """The features as the code sees them: normalized as `norm` says.

        Args:
          features: [..., d].
          train: whether a BatchNorm takes the statistics of the batch.

        Returns:
          [..., d] float32.
        """
        h = features.astype(statistics_dtype(features))
        if self.norm == "bn+l2":
            h = self.batch_norm(h, use_running_average=not train)
        return h if self.norm == "none" else unit_features(h)

    def __call__(self, features: jax.Array, *, train: bool = False) -> jax.Array:
        """Compares features with the class vectors.

        Args:
          features: [..., d].
          train: whether all K classes are compared, and a BatchNorm takes the statistics of the batch.

        Returns:
          Logits [..., K] float32, or [..., eval_classes] outside training. With loss "ce", a simplex of
          K <= d classes without a rotation leaves out a shift that all logits share.
        """
        return self._logits(self.prepared(features, train=train), self._compared(train))

    def losses(
        self, features: jax.Array, labels: jax.Array, weights: jax.Array | None = None, *, train: bool = False
    ) -> TokenLosses:
        """Losses without logits where the code is not stored: memory is that of `chunk` classes.

        On a mesh in whose rules "act_vocab" has an axis, classes are divided over it.

        Args:
          features: [..., d].
          labels: int32 [...], in [0, K).
          weights: [...], 0 for padding; only the class lengths look at them.
          train: as in `__call__`.

        Returns:
          The loss of every example, not weighted, and whether its class has the largest logit.

        Raises:
          TypeError: labels that are no integers.
          ValueError: labels that do not fit the features, or outside [0, K) where they are known.
        """
        h = self.prepared(features, train=train)
        check_labels(labels, self.num_classes, h)
        code, compared = self.code(h.shape[-1]), self._compared(train)
        lengths = None
        if self.lengths and train:
            lengths = batch_class_lengths(labels, self.num_classes, weights)
        made_of_rows = code.kind in ("hadamard", "sphere", "gaussian") and not self._is_stored(code)
        if not made_of_rows or (self.loss == "ce" and lengths is not None):
            logits = self._logits(h, compared)
            correct = jnp.argmax(logits, axis=-1) == labels
            if self.loss == "ce":
                if lengths is not None:
                    logits = logits * jnp.reshape(lengths, (1,) * (logits.ndim - 1) + lengths.shape)
                return TokenLosses(optax.softmax_cross_entropy_with_integer_labels(logits, labels), correct)
        else:
            found = code_cross_entropy(
                h.astype(self.dtype),
                labels,
                ClassCode(compared, code.dim, code.kind, code.seed),
                bias=self.prior[:compared] if self.bias else None,
                scale=self.inverse_temperature(),
                chunk=self.chunk,
                axis=_vocabulary_axis(compared),
            )
            if self.loss == "ce":
                return found
            correct = found.correct
        own = self._own(code, labels)
        if lengths is not None:
            own = own * lengths[labels][..., None]
        return TokenLosses(vertex_regression(h, own, self.weight), correct)

    def matrix(self, dim: int) -> jax.Array:
        """The class vectors as columns, [dim, K] float32; of length 1 for all kinds but "gaussian"."""
        code = self.code(dim)
        return self._stored(code) if self._is_stored(code) else code.matrix()

    def _compared(self, train: bool) -> int:
        return self.num_classes if train or self.eval_classes is None else self.eval_classes

    def _is_stored(self, code: ClassCode) -> bool:
        if self.stored is None:
            return not code.exact
        if not self.stored and not code.by_number:
            raise ValueError(f"stored=False: the vectors of {code} are made together, and must be stored")
        return self.stored

    @nn.compact
    def _stored(self, code: ClassCode) -> jax.Array:
        init = named(lambda: code.matrix(), None, "vocab")
        return jax.lax.stop_gradient(self.variable(self.collection, "code", init).value)

    def _own(self, code: ClassCode, labels: jax.Array) -> jax.Array:
        """The vector of each one's class, float32 [..., d]."""
        if self._is_stored(code):
            return jnp.moveaxis(self._stored(code)[:, labels], 0, -1)
        return jnp.reshape(code.columns(jnp.ravel(labels)), (*labels.shape, code.dim))

    def _logits(self, h: jax.Array, compared: int) -> jax.Array:
        y = self._products(h, compared)
        if not self.bias:
            return y
        prior = self.prior[:compared].astype(y.dtype)
        return y + jnp.reshape(prior, (1,) * (y.ndim - 1) + prior.shape)

    def _products(self, h: jax.Array, compared: int) -> jax.Array:
        """The logits without the bias."""
        code, scale = self.code(h.shape[-1]), self.inverse_temperature()
        if self._is_stored(code):
            return etf_logits(h.astype(self.dtype), self._stored(code)[:, :compared], scale)
        wide = statistics_dtype(h)
        if code.kind == "hadamard":
            y = hadamard_logits(code.key, h.astype(self.dtype), compared).astype(wide)
        elif code.kind == "orthoplex":
            y = jnp.concatenate([h, -h], axis=-1)[..., :compared]
        elif code.is_slice:
            y = h[..., : code.num_classes]
            if code.kind == "simplex":
                if self.loss == "dr":
                    y = y - jnp.mean(y, axis=-1, keepdims=True)
                y = y * jnp.asarray((code.num_classes / (code.num_classes - 1)) ** 0.5, y.dtype)
            y = y[..., :compared]
        else:
            return etf_logits(h.astype(self.dtype), code.matrix()[:, :compared], scale)
        return y * jnp.asarray(scale, wide)


def _vocabulary_axis(classes: int) -> str | None:
    """The mesh axis that vocabularies are divided over, where there is one that divides these classes."""
    rules = dict(nn.get_logical_axis_rules())
    axis, mesh = rules.get("act_vocab"), jax.sharding.get_abstract_mesh()
    if not isinstance(axis, str) or mesh.empty or axis not in mesh.shape:
        return None
    return axis if mesh.shape[axis] > 1 and classes % mesh.shape[axis] == 0 else None


def keep_constant(inner: optax.GradientTransformation, where: Where) -> optax.GradientTransformationExtraArgs:
    """Keeps leaves of a parameter tree as they are, weight decay or not: for codes in other people's trees.

    Unlike `optax.masked`, which hands the raw gradients of the leaves it leaves out on as updates, this gives
    them an update of zero and no state.

    Args:
      inner: the optimizer of everything else.
      where: what stays.

    Returns:
      The transformation.

    Raises:
      ValueError: at `init`, when `where` selects nothing.

    Example:
      >>> params = {"code": jnp.ones(2), "kernel": jnp.ones(2)}
      >>> optimizer = keep_constant(optax.adamw(0.1), "code")
      >>> updates, _ = optimizer.update(params, optimizer.init(params), params)
      >>> updates["code"]
      Array([0., 0.], dtype=float32)
    """
    return optax.multi_transform(
        {"train": inner, "keep": optax.set_to_zero()},
        lambda params: label(params, {"keep": where}, default="train"),
    )
