"""Rotary positions in the half-split layout, the one of Llama checkpoints in Hugging Face format."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from odjax.core import statistics_dtype


@dataclasses.dataclass(frozen=True)
class RotaryScaling:
    """Llama 3's stretching of low frequencies to reach longer texts.

    Wavelengths longer than `original_length / low` are stretched by `factor`, those shorter than
    `original_length / high` are kept, and the ones between are interpolated.

    Source: Grattafiori et al. 2024, "The Llama 3 Herd of Models"; the values are those of Llama 3.1 (Llama
    3.2 has factor 32).

    Attributes:
        factor: how much longer the longest wavelengths become.
        low: number of periods in `original_length` under which a frequency is stretched in full.
        high: number of periods in `original_length` over which a frequency is kept.
        original_length: length of the texts before the extension.
    """

    factor: float = 8.0
    low: float = 1.0
    high: float = 4.0
    original_length: int = 8192


def rotary_frequencies(
    head_dim: int, theta: float = 10000.0, scaling: RotaryScaling | None = None
) -> tuple[float, ...]:
    """Angles per position, one for each pair of channels: `theta^(-2i/head_dim)`.

    Args:
        head_dim: width of a head.
        theta: base of the geometric progression.
        scaling: how low frequencies are stretched, or None.

    Returns:
        `head_dim // 2` angles in radians.

    Raises:
        ValueError: if `head_dim` is odd.

    Source: Su et al. 2021, "RoFormer", section 3.2.2.

    Example:
        >>> rotary_frequencies(4, theta=100.0)
        (1.0, 0.1)
    """
    if head_dim % 2:
        raise ValueError(f"head_dim must be even for rotary positions, got {head_dim}")
    frequencies = [theta ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return tuple(frequencies)
    return tuple(_scaled(f, scaling) for f in frequencies)


def _scaled(frequency: float, scaling: RotaryScaling) -> float:
    periods = scaling.original_length * frequency / (2 * math.pi)
    kept = min(max((periods - scaling.low) / (scaling.high - scaling.low), 0.0), 1.0)
    return frequency * (kept + (1 - kept) / scaling.factor)


def rotary_angles(positions: jax.Array, frequencies: tuple[float, ...]) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine of every position's angles; computed once and shared by all layers.

    Args:
        positions: [B, T] int32; packed documents restart at 0.
        frequencies: from `rotary_frequencies`.

    Returns:
        Cosine and sine, each [B, T, 1, head_dim // 2] float32.

    Example:
        >>> cos, sin = rotary_angles(jnp.zeros((1, 3), jnp.int32), (1.0, 0.1))
        >>> cos.shape, float(cos.min()), float(sin.max())
        ((1, 3, 1, 2), 1.0, 0.0)
    """
    table = jnp.asarray(frequencies, jnp.float32)[None, None, None, :]
    angles = positions.astype(jnp.float32)[:, :, None, None] * table
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Rotates channel `i` with channel `i + head_dim / 2`, in float32.

    Args:
        x: queries or keys [B, T, heads, head_dim].
        angles: from `rotary_angles`; a leading axis of 1 serves every row.

    Returns:
        Rotated `x`, same shape and dtype.

    Source: Su et al. 2021, "RoFormer", equation 34, with the pairs taken across the two halves of a head.

    Example:
        >>> quarter = rotary_angles(jnp.ones((1, 1), jnp.int32), (math.pi / 2,))
        >>> [round(float(v), 4) for v in rotate(jnp.array([[[[1.0, 0.0]]]]), quarter).ravel()]
        [-0.0, 1.0]
    """
    cos, sin = angles
    first, second = jnp.split(x.astype(statistics_dtype(x)), 2, axis=-1)
    cos, sin = cos.astype(first.dtype), sin.astype(first.dtype)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
