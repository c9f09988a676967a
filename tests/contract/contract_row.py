"""What a row of the contract matrix is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

KEY = jax.random.key(0)
KINDS = ("transform", "edit", "statistic", "module", "function", "adapter", "algorithm")


class Row(NamedTuple):
    """One object of the matrix.

    Attributes:
        api: the dotted name of the public object, as in the registry.
        kind: one of KINDS.
        build: makes the object; what it returns depends on the kind:
            transform -> optax.GradientTransformation
            edit -> (Edit, `where` of the leaves that it may touch)
            statistic -> (Statistic, batch(key, n) -> arguments of `observe` with n rows)
            module -> (nn.Module, arguments of its call)
            adapter -> (adapted nn.Module, arguments of its call)
            function -> (function of arrays, arguments)
            algorithm -> (Algorithm, its parameters, what is frozen or None, its `Clients`)
        label: tells several rows of one api apart.
        tolerance: of a function whose sums may be taken in another order: how far layouts may differ,
            relative to the largest value; 0: not in a single bit.
    """

    api: str
    kind: str
    build: Callable[[], Any]
    label: str = ""
    tolerance: float = 0.0

    @property
    def id(self) -> str:
        return f"{self.api.rsplit('.', 1)[-1]}{'-' if self.label else ''}{self.label}"
