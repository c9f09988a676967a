"""LoRA-Guard: a model that moderates with the weights of the chat model, low-rank factors and a linear head.

Two paths over the same weights W, of tokens x with the embedding phi (Elesedy et al. 2024, section 3):

    generate:  g_lm(f_W(phi(x)))                     factors off, the chat model bit for bit
    guard:     c = G h + b,  h = pool(f_{W + s A B}(phi(x)))     factors on

Only A, B, G and b are trained (`GUARD`). The guard costs sum r (in + out) + (C + u)(d + 1) numbers beside the
chat model, with u = 1 for an output of its own that says "unsafe".
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from odjax.core import named, statistics_dtype
from odjax.lowrank.adapt import Adapted
from odjax.lowrank.guard_loss import is_concrete
from odjax.lowrank.methods import FACTORS
from odjax.lowrank.switch import On

GUARD = rf"{FACTORS}|guard_head/.*"
"""What is trained: factors and head, for `odjax.core.partition` and `Experiment(trainable=)`."""


class Verdict(NamedTuple):
    """Logits of a guard: `unsafe` [B] and `categories` [B, C]; float32. A sigmoid gives probabilities."""

    unsafe: jax.Array
    categories: jax.Array


class GuardHead(nn.Module):
    """The linear head of a guard, features to the logits of C categories and of "unsafe".

    Without an output of its own, "unsafe" is the largest logit of a category.

    Parameters: `kernel` [d, u + C] and `bias` [u + C], u = 1 with `unsafe`; output 0 is then "unsafe".

    Attributes:
      categories: C.
      unsafe: whether "unsafe" has an output of its own.
      use_bias: whether there is a bias.
      dtype: of the computation; logits are float32, float64 for float64.
      param_dtype: of the parameters.

    Raises:
      ValueError: at construction, for fewer than two outputs; when called, for features of another width than
        the parameters have.
      TypeError: when called, for features that are not floating point.

    Source: Elesedy et al. 2024, "LoRA-Guard", section 3.

    Example:
      >>> head = GuardHead(3)
      >>> verdict, variables = head.init_with_output(jax.random.key(0), jnp.ones((2, 8)))
      >>> verdict.unsafe.shape, verdict.categories.shape
      ((2,), (2, 3))
    """

    categories: int
    unsafe: bool = True
    use_bias: bool = True
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.categories < 1 or self.categories + self.unsafe < 2:
            raise ValueError(
                f"a guard has at least two outputs, got categories={self.categories}, unsafe={self.unsafe}: "
                "give unsafe=True, or more categories"
            )

    @nn.compact
    def __call__(self, features: jax.Array) -> Verdict:
        """Judges features [..., d]."""
        if not jnp.issubdtype(features.dtype, jnp.floating):
            raise TypeError(f"features must be floating point, got {features.dtype}")
        width, outputs = features.shape[-1], self.categories + self.unsafe
        if self.has_variable("params", "kernel"):
            known = nn.unbox(self.get_variable("params", "kernel")).shape
            if known != (width, outputs):
                raise ValueError(
                    f"the head's kernel has the shape {tuple(known)}, features of width {width} and "
                    f"{outputs} outputs need {(width, outputs)}: another backbone or other categories?"
                )
        init = named(nn.initializers.xavier_uniform(), "embed", "classes")
        kernel = self.param("kernel", init, (width, outputs), self.param_dtype)
        wide = statistics_dtype(self.dtype)
        logits = jnp.matmul(
            features.astype(self.dtype), kernel.astype(self.dtype), preferred_element_type=wide
        )
        if self.use_bias:
            init = named(nn.initializers.zeros, "classes")
            bias = self.param("bias", init, (outputs,), self.param_dtype).astype(wide)
            logits = logits + bias.reshape((1,) * (logits.ndim - 1) + (-1,))
        if self.unsafe:
            return Verdict(logits[..., 0], logits[..., 1:])
        return Verdict(jnp.max(logits, axis=-1), logits)


class Guard(nn.Module):
    """A model that also moderates: called, it is the model itself; `guard` judges texts.

    The parameters are those of the backbone, under the same paths, and `guard_head/(kernel|bias)`. So
    the parameters of a guard serve `backbone` too: `switched(guard.backbone, False)` is the chat model, with
    all its methods.

    A backbone that was not adapted is the head alone on frozen features (rank 0). Factors on the top layers
    alone leave the activations below them as the chat path has them: `adapt(where=...)` chooses the layers,
    by number in a stack that is not scanned (`layers_(10|11)/attn/(q|v)/kernel`).

    Attributes:
      backbone: what `odjax.lowrank.adapt` returned, or a bare model; one with a method `features` that gives
        [B, T, d], such as `odjax.models.Decoder` and `odjax.models.Bert`.
      categories: see `GuardHead`.
      unsafe: see `GuardHead`.
      use_bias: see `GuardHead`.
      pooling: "last": the last token (`last_token`); "own": the backbone's method `pooled`; or a module,
        called as `pooling(features, cls=first_token, mask=mask)`. None: "own" where there is one, else
        "last".
      dtype: of the head's computation.
      param_dtype: of the head's parameters.

    Raises:
      ValueError: at construction, for an unknown pooling, "own" without one, or too few outputs.
      TypeError: at construction, for a backbone without `features`.

    Source: Elesedy et al. 2024, "LoRA-Guard", section 3.

    Example:
      >>> from odjax.lowrank.adapt import adapt
      >>> from odjax.models import decoder
      >>> model = Guard(adapt(decoder("tiny"), rank=2, where=".*attn/(q|v)/kernel"), categories=3)
      >>> tokens = jnp.array([[7, 9, 4, 0]])
      >>> variables = model.init(jax.random.key(0), tokens)
      >>> model.apply(variables, tokens, tokens != 0, method="guard").categories.shape
      (1, 3)
      >>> model.apply(variables, tokens).shape
      (1, 4, 256)
    """

    backbone: nn.Module
    categories: int
    unsafe: bool = True
    use_bias: bool = True
    pooling: str | nn.Module | None = None
    dtype: DTypeLike = jnp.float32
    param_dtype: DTypeLike = jnp.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        bare = type(_bare(self.backbone))
        if not callable(getattr(bare, "features", None)):
            raise TypeError(f"a guard's backbone has a method features(tokens), a {bare.__name__} has none")
        if not isinstance(self.pooling, nn.Module) and self.pooling not in ("last", "own", None):
            raise ValueError(f"pooling must be 'last', 'own', None or a module, got {self.pooling!r}")
        if self.pooling == "own" and not hasattr(bare, "pooled"):
            raise ValueError(f"a {bare.__name__} has no pooling of its own: give pooling='last' or a module")
        GuardHead(self.categories, self.unsafe, parent=None)

    def setup(self) -> None:
        """Gives the backbone the scope of this module, so that its parameters keep their paths."""
        nn.share_scope(self, self.backbone)
        self.guard_head = GuardHead(self.categories, self.unsafe, self.use_bias, self.dtype, self.param_dtype)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """What the backbone gives with its factors off: the generating path, or embeddings.

        Args:
          *args: of the backbone.
          **kwargs: of the backbone.

        Returns:
          What the backbone returns.
        """
        if self.is_initializing():
            self.guard(args[0])
        off = {"on": False} if isinstance(self.backbone, Adapted) else {}
        return self.backbone(*args, **off, **kwargs)

    def guard(
        self,
        tokens: jax.Array,
        mask: jax.Array | None = None,
        *,
        on: On = True,
        train: bool = False,
    ) -> Verdict:
        """Judges texts: the guarding path.

        Args:
          tokens: [B, T] int32, padded on the right.
          mask: bool [B, T], True at tokens; None: no padding.
          on: whether the factors are applied, see `odjax.lowrank.switched`.
          train: whether the backbone is training (its own dropout); that of the factors is on while there is
            a "dropout" key.

        Returns:
          The logits.

        Raises:
          ValueError: a mask of another shape, or (when it is concrete) a text without a token, or one that is
            not padded on the right.
          TypeError: a mask that is not bool.
        """
        bare = _bare(self.backbone)
        takes = inspect.signature(type(bare).features).parameters
        if mask is not None:
            check_right_padded(mask, tokens.shape)
        more: dict[str, Any] = {"on": on} if isinstance(self.backbone, Adapted) else {}
        more |= {"train": train} if "train" in takes else {}
        more |= {"mask": mask} if "mask" in takes else {}
        features = self.backbone.features(tokens, **more)
        return self.guard_head(self._pooled(features, mask))

    def _pooled(self, features: jax.Array, mask: jax.Array | None) -> jax.Array:
        if isinstance(self.pooling, nn.Module):
            return self.pooling(features, cls=features[:, 0], mask=mask)
        if self.pooling == "last" or not hasattr(type(_bare(self.backbone)), "pooled"):
            return last_token(features, mask)
        return self.backbone.pooled(features, mask)


def _bare(model: nn.Module) -> nn.Module:
    return model.inner if isinstance(model, Adapted) else model


def last_token(hidden: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """The features of the last token of every text.

    From the mask, not from a padding id: where that id ends texts too, or there is no padding, a search for
    it finds another token.

    Args:
      hidden: [B, T, d].
      mask: bool [B, T], True at tokens, which stand at the left; None: no padding.

    Returns:
      [B, d]. Under a traced mask a text without a token gives the features at T - 1.

    Raises:
      ValueError: like `check_right_padded`.
      TypeError: like `check_right_padded`.

    Source: Elesedy et al. 2024, "LoRA-Guard", section 3.

    Example:
      >>> hidden = jnp.array([[[1.0], [2.0], [3.0]]])
      >>> last_token(hidden, jnp.array([[True, True, False]]))
      Array([[2.]], dtype=float32)
    """
    if mask is None:
        return hidden[:, -1]
    check_right_padded(mask, hidden.shape[:2])
    last = mask.shape[1] - 1 - jnp.argmax(mask[:, ::-1], axis=1)
    return jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]


def check_right_padded(mask: jax.Array, shape: tuple[int, ...]) -> None:
    """Raises for a mask of texts that are not padded on the right.

    Args:
      mask: [B, T]; its values are looked at when it is concrete.
      shape: of the tokens, [B, T].

    Raises:
      ValueError: another shape, a text without a token, or a token behind padding.
      TypeError: a mask that is not bool.

    Example:
      >>> check_right_padded(jnp.array([[False, True]]), (1, 2))
      Traceback (most recent call last):
      ValueError: mask has a token behind padding in row 0: pad on the right
    """
    if mask.dtype != jnp.bool_:
        raise TypeError(f"mask must be bool, got {mask.dtype}: compare first, such as mask != 0")
    if mask.shape != tuple(shape):
        raise ValueError(f"mask must have the shape of tokens {tuple(shape)}, got {tuple(mask.shape)}")
    if is_concrete(mask):
        seen = np.asarray(mask)
        if (empty := np.flatnonzero(~seen.any(axis=1))).size:
            raise ValueError(f"mask has no token in row {empty[0]}: leave empty texts out")
        if (behind := np.flatnonzero((~seen[:, :-1] & seen[:, 1:]).any(axis=1))).size:
            raise ValueError(f"mask has a token behind padding in row {behind[0]}: pad on the right")
