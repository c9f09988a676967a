"""Random keys that depend on what they are for: a path in a tree, a step. Never on the number of devices."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from odjax.core.paths import map_with_path


def check_key(key: Any, name: str = "key") -> jax.Array:
    """Makes sure that a key is one typed key, and says what to type where it is not.

    Args:
      key: what came.
      name: the argument's name for the error.

    Returns:
      The key.

    Raises:
      TypeError: a legacy uint32 key, a number, or anything that is no typed key.
      ValueError: an array of keys.
    """
    dtype = getattr(key, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jax.dtypes.prng_key):
        if dtype is not None and dtype == jnp.uint32 and key.shape[-1:] == (2,):
            remedy = "it is a legacy uint32 key: type jax.random.key(seed), or jax.random.wrap_key_data(key)"
        else:
            remedy = f"got {key!r}: make it with jax.random.key(seed)"
        raise TypeError(f"{name} must be a typed key; {remedy}")
    if key.shape != ():
        raise ValueError(
            f"{name} must be one key, got an array of keys of shape {key.shape}: pass one of them"
        )
    return key


def fold_path(key: jax.Array, path: str) -> jax.Array:
    """A key for one path: 64 bits of a BLAKE2b hash of the text, folded in as two words.

    The hash is the same in every process and release (Python's own `hash` is not). Among n paths the chance
    that any two share a key is about n^2 / 2^65.

    Args:
      key: a typed key, as of `jax.random.key`.
      path: any text, such as the path of a leaf or the name of an edit.

    Returns:
      A typed key.

    Raises:
      TypeError: the key is not a typed one.

    Example:
      >>> key = jax.random.key(0)
      >>> bool(jnp.all(fold_path(key, "a/kernel") == fold_path(key, "a/bias")))
      False
    """
    digest = hashlib.blake2b(path.encode(), digest_size=8).digest()
    high, low = np.frombuffer(digest, dtype="<u4").astype(np.uint32)
    return jax.random.fold_in(jax.random.fold_in(check_key(key), high), low)


def fold_step(key: jax.Array, step: int | jax.Array) -> jax.Array:
    """A key for one step.

    Args:
      key: a typed key.
      step: the number of the step, at least 0; may be traced.

    Returns:
      A typed key; the same for a Python number and a traced one.

    Raises:
      TypeError: the key is not a typed one.

    Example:
      >>> key = jax.random.key(0)
      >>> bool(fold_step(key, 3) == jax.jit(fold_step)(key, 3))
      True
    """
    return jax.random.fold_in(check_key(key), jnp.asarray(step).astype(jnp.uint32))


def keys_like(key: jax.Array, tree: Any) -> Any:
    """One key a leaf, by the path of the leaf.

    The key of a leaf depends on its path alone: it stays when other leaves come and go, and it is the same
    for a Linen dict and an `nnx.State` of one model.

    Args:
      key: a typed key.
      tree: a tree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      A tree of typed keys with the structure of `tree`.

    Raises:
      TypeError: the key is not a typed one.
      ValueError: two leaves have the same path.

    Example:
      >>> keys = keys_like(jax.random.key(0), {"a": jnp.zeros(2), "b": jnp.zeros(2)})
      >>> bool(keys["a"] == fold_path(jax.random.key(0), "a"))
      True
    """
    check_key(key)
    return map_with_path(lambda path, _: fold_path(key, path), tree)
