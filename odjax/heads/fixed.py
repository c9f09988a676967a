"""A classifier head without trainable weights."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

from odjax.core import Where, label, named, statistics_dtype
from odjax.heads.checks import check_features, check_labels, check_scale, whole_number
from odjax.heads.codes import KINDS, ClassCode
from odjax.heads.hadamard import hadamard_logits
from odjax.heads.losses import (
    batch_class_lengths,
    cross_entropy,
    etf_logits,
    scale_for_probability,
    unit_features,
    vertex_regression,
)
from odjax.heads.vocab import CHUNK, TokenLosses, code_cross_entropy

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
      norm_penalty: weight of the features' length in the dot regression, for norm "none".
      lengths: for imbalanced classes, the vectors' lengths in the losses of a training batch: True for
        sqrt(gamma / n_k) of the batch, or K numbers (`batch_class_lengths` of a whole data set).
        Cross-entropy then makes all logits, whatever the code.
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
    norm_penalty: float = 0.0
    lengths: bool | tuple[float, ...] = False
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
        for name in ("seed", "chunk", *(("eval_classes",) if self.eval_classes is not None else ())):
            whole_number(name, getattr(self, name))
        if not isinstance(self.lengths, bool) and len(self.lengths) != self.num_classes:
            raise ValueError(f"lengths must be {self.num_classes} numbers, got {len(self.lengths)}")
        if not self.weight > 0 or self.norm_penalty < 0:
            raise ValueError(
                f"weight must be positive and norm_penalty not negative, got {self.weight} and "
                f"{self.norm_penalty}"
            )
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
        check_features(features)
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

        On a mesh in whose rules "act_vocab" has an axis that divides the classes, they are divided over it.

        Args:
          features: [..., d].
          labels: integers [...], in [0, K), outside training in [0, eval_classes). Traced ones are not
            checked: the cross-entropy of one outside is the log-sum-exp.
          weights: [...], 0 for padding; only the class lengths look at them.
          train: as in `__call__`.

        Returns:
          The loss of every example, not weighted, and whether its class has the largest logit.

        Raises:
          TypeError: labels that are no integers.
          ValueError: labels that do not fit the features, or are outside where they are known.
        """
        h = self.prepared(features, train=train)
        code, compared = self.code(h.shape[-1]), self._compared(train)
        check_labels(labels, compared, h)
        lengths = self._lengths(labels, weights) if train else None
        streamed = code.kind in ("hadamard", "sphere", "gaussian") and not self._is_stored(code)
        if streamed and (self.loss == "dr" or lengths is None):
            found = code_cross_entropy(
                self._cast(h),
                labels,
                ClassCode(compared, code.dim, code.kind, code.seed),
                bias=self.prior[:compared] if self.bias else None,
                scale=self.inverse_temperature(),
                chunk=self.chunk,
                axis=_vocabulary_axis(compared),
            )
        else:
            logits = self._logits(h, compared)
            correct = jnp.argmax(logits, axis=-1) == labels
            if lengths is not None and self.loss == "ce":
                logits = self._logits(h, compared, lengths)
            found = TokenLosses(cross_entropy(logits, labels), correct)
        if self.loss == "ce":
            return found
        own = self._own(code, labels)
        if lengths is not None:
            own = own * lengths[labels][..., None]
        return found._replace(loss=vertex_regression(h, own, self.weight, self.norm_penalty))

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
        if not self.has_variable(self.collection, "code") and not self.is_mutable_collection(self.collection):
            raise ValueError(
                f"the code of this head lies in the collection {self.collection!r}, which is missing: apply "
                f"with all that init returned, or type stored=False"
            )
        init = named(lambda: code.matrix(), None, "vocab")
        return jax.lax.stop_gradient(self.variable(self.collection, "code", init).value)

    def _own(self, code: ClassCode, labels: jax.Array) -> jax.Array:
        """The vector of each one's class, float32 [..., d]."""
        if self._is_stored(code):
            return jnp.moveaxis(self._stored(code)[:, labels], 0, -1)
        return jnp.reshape(code.columns(jnp.ravel(labels)), (*labels.shape, code.dim))

    def _lengths(self, labels: jax.Array, weights: jax.Array | None) -> jax.Array | None:
        """Lengths of the class vectors in a training batch, [K]; None: all 1."""
        if isinstance(self.lengths, bool):
            return batch_class_lengths(labels, self.num_classes, weights) if self.lengths else None
        return jnp.asarray(self.lengths, jnp.float32)

    def _cast(self, h: jax.Array) -> jax.Array:
        """Features in the dtype of products; float64 stays."""
        return h if h.dtype == jnp.float64 else h.astype(self.dtype)

    def _logits(self, h: jax.Array, compared: int, lengths: jax.Array | None = None) -> jax.Array:
        y = self._products(h, compared, exact=self.loss == "dr" or lengths is not None)
        own = [] if lengths is None else [(jnp.multiply, lengths)]
        if self.bias:
            own.append((jnp.add, self.prior[:compared]))
        for combine, each in own:
            y = combine(y, jnp.reshape(each.astype(y.dtype), (1,) * (y.ndim - 1) + each.shape))
        return y

    def _products(self, h: jax.Array, compared: int, *, exact: bool) -> jax.Array:
        """scale * h . m_k; not exact: but for a shift that all classes share."""
        code, scale = self.code(h.shape[-1]), self.inverse_temperature()
        if self._is_stored(code):
            return etf_logits(self._cast(h), self._stored(code)[:, :compared], scale)
        if code.kind == "hadamard":
            y = hadamard_logits(code.key, self._cast(h), compared)
        elif code.kind == "orthoplex":
            y = jnp.concatenate([h, -h], axis=-1)[..., :compared]
        elif code.is_slice:
            y = h[..., : code.num_classes]
            if code.kind == "simplex":
                if exact:
                    y = y - jnp.mean(y, axis=-1, keepdims=True)
                y = y * jnp.asarray((code.num_classes / (code.num_classes - 1)) ** 0.5, y.dtype)
            y = y[..., :compared]
        else:
            return etf_logits(self._cast(h), code.matrix()[:, :compared], scale)
        return y * jnp.asarray(scale, y.dtype)


def _vocabulary_axis(classes: int) -> str | None:
    """The mesh axis that vocabularies are divided over, where there is one that divides these classes."""
    axis = next((axis for name, axis in nn.get_logical_axis_rules() if name == "act_vocab"), None)
    if isinstance(axis, tuple) and len(axis) == 1:
        (axis,) = axis
    mesh = jax.sharding.get_abstract_mesh()
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
