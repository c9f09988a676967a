"""Token embedding tables on a mesh."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from odjax.models.axes import constrain

embedding_init = nn.initializers.normal(0.02)


def table_by_vocab(*arrays: jax.Array, dtype: DTypeLike, inexact: bool = True) -> list[jax.Array]:
    """A `promote_dtype` for `nn.Embed`: casts, and lays the table out by its vocabulary alone.

    A table split along its width as well makes the partitioner replicate the looked-up activations; gathered
    along the width first, every device looks up its part of the vocabulary.

    Args:
        *arrays: the table [vocab, width] last, as `nn.Embed` gives them.
        dtype: of the results.
        inexact: part of the signature that Flax expects.

    Returns:
        The arrays in `dtype`.
    """
    *rest, table = (array.astype(dtype) for array in arrays)
    return [*rest, constrain(table, "act_vocab", "act_embed")]


def attend_tokens(embed: nn.Embed, features: jax.Array) -> jax.Array:
    """Logits of a tied head, in float32 and as one matrix product (see `odjax.models.dense`).

    Args:
        embed: the table [vocab, width].
        features: [B, T, width].

    Returns:
        [B, T, vocab] float32.
    """
    batch, length, width = features.shape
    y = embed.attend(jnp.reshape(features, (batch * length, width)).astype(jnp.float32))
    return jnp.reshape(y, (batch, length, y.shape[-1]))
