"""odjax: on-device and parameter-efficient learning as small, pure, composable JAX pieces."""

from odjax.version import __version__ as __version__
