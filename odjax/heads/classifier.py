"""A backbone and a head as one model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from odjax.heads.losses import cross_entropy
from odjax.heads.vocab import TokenLosses


class Classifier(nn.Module):
    """A backbone that gives features, and a head on them.

    Parameters: those of `backbone/...` and `head/...`.

    Attributes:
      backbone: a module of images, tokens, ... to features [..., d].
      head: a module of features to logits: `FixedHead`, `nn.Dense`, ...

    Example:
      >>> from odjax.heads.fixed import FixedHead
      >>> model = Classifier(nn.Dense(16), FixedHead(10))
      >>> logits, variables = model.init_with_output(jax.random.key(0), jnp.ones((2, 8)))
      >>> logits.shape, list(variables["params"])
      ((2, 10), ['backbone'])
    """

    backbone: nn.Module
    head: nn.Module

    def __call__(self, *inputs: jax.Array, train: bool = False) -> jax.Array:
        """Classifies: logits [..., K] float32."""
        features = self.features(*inputs, train=train)
        return _call(self.head, features, train=train).astype(jnp.float32)

    def features(self, *inputs: jax.Array, train: bool = False) -> jax.Array:
        """What the head sees, [..., d]."""
        return _call(self.backbone, *inputs, train=train)

    def seen(self, *inputs: jax.Array, train: bool = False) -> jax.Array:
        """The features as the head compares them with its classes: normalized, where it does that."""
        features = self.features(*inputs, train=train)
        return self.head.prepared(features, train=train) if hasattr(self.head, "prepared") else features

    def losses(
        self,
        inputs: jax.Array | Sequence[jax.Array],
        labels: jax.Array,
        weights: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> TokenLosses:
        """The losses of the head, as in `FixedHead.losses`; cross-entropy of the logits of other heads.

        Args:
          inputs: of the backbone, one array or several.
          labels: integers [...].
          weights: [...], 0 for padding.
          train: whether the backbone and the head are training.

        Returns:
          The loss of every example, and whether its class has the largest logit.
        """
        inputs = tuple(inputs) if isinstance(inputs, Sequence) else (inputs,)
        features = self.features(*inputs, train=train)
        if hasattr(self.head, "losses"):
            return self.head.losses(features, labels, weights, train=train)
        logits = _call(self.head, features, train=train).astype(jnp.float32)
        return TokenLosses(cross_entropy(logits, labels), jnp.argmax(logits, axis=-1) == labels)


def _call(module: nn.Module, *inputs: jax.Array, train: bool) -> Any:
    """Calls a module, telling it whether it trains where it wants to know."""
    parameters = inspect.signature(type(module).__call__).parameters
    return module(*inputs, train=train) if "train" in parameters else module(*inputs)
