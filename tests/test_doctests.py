"""Every example in a docstring of the three packages runs and prints what it says."""

import doctest
import importlib
import pkgutil

import jax
import pytest

PACKAGES = ("odjax", "odjax_kernels", "odjax_train")


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        root = importlib.import_module(package)
        names += [package, *(m.name for m in pkgutil.walk_packages(root.__path__, package + "."))]
    return sorted(name for name in names if not name.endswith("__main__"))


@pytest.mark.parametrize("name", modules())
def test_examples_in(name: str) -> None:
    # Examples show what a user would see, and users run with jax's own promotion rules.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0
