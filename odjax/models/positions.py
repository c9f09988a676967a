"""Position tables: sinusoidal ones, and learned ones brought to another grid of patches."""

import jax
import jax.numpy as jnp
import numpy as np

# name -> (the kernel's parameter a, what is added to the number of rows when the scale is taken, antialias)
INTERPOLATIONS: dict[str, tuple[float, float, bool]] = {
    # DINOv2 without registers was trained and is evaluated with an offset of 0.1 in the scale.
    "bicubic_offset": (-0.75, 0.1, False),
    "bicubic": (-0.75, 0.0, False),
    # DINOv2 with registers.
    "bicubic_antialias": (-0.5, 0.0, True),
}


def sinusoidal_positions(length: int, width: int) -> jax.Array:
    """Fixed positions: sines in the first half of the channels, cosines in the second.

    Args:
        length: number of positions.
        width: number of channels, even.

    Returns:
        [length, width] float32.

    Raises:
        ValueError: if `width` is odd.

    Source: Vaswani et al. 2017, section 3.5; halves in place of interleaved channels, which only permutes
    them.

    Example:
        >>> sinusoidal_positions(3, 4)[0].tolist()
        [0.0, 0.0, 1.0, 1.0]
    """
    if width % 2:
        raise ValueError(f"width must be even for sinusoidal positions, got {width}")
    angles = np.arange(length)[:, None] * 10000.0 ** (-2 * np.arange(width // 2) / width)[None]
    return jnp.asarray(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), jnp.float32)


def interpolate_positions(
    table: jax.Array, old: tuple[int, int], new: tuple[int, int], method: str
) -> jax.Array:
    """Brings learned positions of a grid of patches to another grid, in float32.

    Args:
        table: [1 + old rows * old columns, width]; the first row is the class token's and stays.
        old: rows and columns that the table is for.
        new: rows and columns wanted.
        method: a key of `INTERPOLATIONS`.

    Returns:
        [1 + new rows * new columns, width] float32.

    Source: Keys 1981, "Cubic Convolution Interpolation for Digital Image Processing", equation 15 (a = -0.5).

    Example:
        >>> interpolate_positions(jnp.ones((5, 3)), (2, 2), (4, 4), "bicubic").shape
        (17, 3)
    """
    a, offset, antialias = INTERPOLATIONS[method]
    rows, columns = (
        jnp.asarray(_resize_matrix(o, n, a, (n + offset) / o, antialias), jnp.float32)
        for o, n in zip(old, new, strict=True)
    )
    table = table.astype(jnp.float32)
    grid = jnp.reshape(table[1:], (*old, table.shape[-1]))
    precision = jax.lax.Precision.HIGHEST
    grid = jnp.einsum("ij,kl,jld->ikd", rows, columns, grid, precision=precision)
    return jnp.concatenate([table[:1], jnp.reshape(grid, (new[0] * new[1], table.shape[-1]))])


def _cubic(t: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel at distances `t`."""
    t = np.abs(t)
    near = ((a + 2) * t - (a + 3)) * t**2 + 1
    far = ((a * t - 5 * a) * t + 8 * a) * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0.0))


def _resize_matrix(old: int, new: int, a: float, scale: float, antialias: bool) -> np.ndarray:
    """The matrix [new, old] of a cubic resize; `scale` is output samples per input sample."""
    matrix = np.zeros((new, old))
    centres = (np.arange(new) + 0.5) / scale - 0.5
    if antialias:
        # The kernel widens when shrinking, and what falls off the edge is left out.
        stretch = min(scale, 1.0)
        matrix = _cubic((centres[:, None] - np.arange(old)[None]) * stretch, a)
        return matrix / matrix.sum(axis=1, keepdims=True)
    for i, centre in enumerate(centres):
        for tap in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
            matrix[i, min(max(tap, 0), old - 1)] += _cubic(np.array(centre - tap), a)
    return matrix
