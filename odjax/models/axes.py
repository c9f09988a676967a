"""Logical axis names: what the models call the axes of their parameters and activations.

A model never names a mesh axis. It names its own axes with the words below, and one table of rules, given by
whoever runs it (`flax.linen.logical_axis_rules`), maps them onto the mesh. Without rules or without a mesh
nothing happens.

Parameters:

| name       | axis                                                | where it usually goes |
|------------|-----------------------------------------------------|-----------------------|
| `layers`   | the stack of scanned layers                         | nowhere               |
| `vocab`    | token types                                         | `tensor`              |
| `embed`    | the residual width, in a matrix                     | `fsdp`                |
| `heads`    | query heads                                         | `tensor`              |
| `kv_heads` | key and value heads                                 | `tensor`              |
| `head_dim` | the width of one head                               | nowhere               |
| `mlp`      | the hidden width of a feed-forward layer            | `tensor`              |
| `norm`     | a vector of the residual width: scales, biases      | nowhere               |
| `position` | rows of a table of learned positions                | nowhere               |
| `window`   | height and width of a convolution's kernel          | nowhere               |
| `channels` | input channels, or flattened input features         | nowhere               |
| `classes`  | outputs of a classifier                             | nowhere               |

Activations:

| name           | axis                                            | where it usually goes |
|----------------|-------------------------------------------------|-----------------------|
| `batch`        | examples                                        | `data`, `fsdp`        |
| `length`       | tokens or patches                               | nowhere               |
| `act_embed`    | the residual width                              | nowhere               |
| `act_heads`    | query heads                                     | `tensor`              |
| `act_kv_heads` | key and value heads, also of the cache          | `tensor`              |
| `act_mlp`      | the hidden width of a feed-forward layer        | `tensor`              |
| `act_vocab`    | logits                                          | `tensor`              |

A tensor axis must divide `heads`, `kv_heads`, `mlp` and `vocab`; a model with fewer key heads than that needs
a rule that leaves `kv_heads` and `act_kv_heads` whole.
"""

import flax.linen as nn
import jax

PARAMETER_AXES = (
    "layers",
    "vocab",
    "embed",
    "heads",
    "kv_heads",
    "head_dim",
    "mlp",
    "norm",
    "position",
    "window",
    "channels",
    "classes",
)
ACTIVATION_AXES = ("batch", "length", "act_embed", "act_heads", "act_kv_heads", "act_mlp", "act_vocab")


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Lays an activation out by its logical axis names; the identity without rules or without a mesh.

    Args:
        x: the activation.
        *names: one of `ACTIVATION_AXES`, or None, for each axis.

    Returns:
        `x`, with a sharding constraint.

    Example:
        >>> constrain(jax.numpy.ones((2, 3)), "batch", "act_embed").shape
        (2, 3)
    """
    return nn.with_logical_constraint(x, names)
