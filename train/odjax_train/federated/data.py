"""Which client has which training examples."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from odjax.federated import Clients, dirichlet_split, group_by_client, label_shards
from odjax_train.data.examples import Examples
from odjax_train.errors import UserError

Owners = Callable[[Mapping[str, np.ndarray]], np.ndarray]
"""Training examples, name -> array [n, ...], to the client of each, int [n]."""


class Split(NamedTuple):
    """Who has what.

    Attributes:
        clients: how many there are, some of whom may have nothing.
        owners: of the examples.
    """

    clients: int
    owners: Owners


@dataclasses.dataclass(frozen=True)
class ByClient:
    """A data set whose training examples belong to clients.

    Args:
        data: any data set; its training examples are read into memory, without augmentation.
        split: who has what: `evenly`, `in_order`, `by_label_shards`, `by_dirichlet`, or your own.

    Raises:
        UserError: when the data is opened, what is wrong with the split.

    >>> from odjax_train.data import Images
    >>> data = ByClient(Images(source="digits"), evenly(10, seed=0))
    >>> data.clients().count, int(data.clients().sizes.sum())
    (10, 1438)
    """

    data: Any
    split: Split

    def __getattr__(self, name: str) -> Any:
        """What the data set has besides: its tokenizer, its classes."""
        if name.startswith("_") or name == "data":
            raise AttributeError(name)
        return getattr(self.data, name)

    def element_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of one example."""
        return self.data.element_spec()

    def train(self, seed: int) -> grain.MapDataset:
        """All training examples, whoever they belong to."""
        return self.data.train(seed)

    def evaluation(self) -> grain.MapDataset:
        """The held-out examples."""
        return self.data.evaluation()

    def describe(self) -> dict[str, Any]:
        """What was found, and how it is divided."""
        sizes = self.clients().sizes
        found = {
            "clients": len(sizes),
            "examples_of_a_client": f"{sizes.min()} to {sizes.max()}, {np.median(sizes):g} in the middle",
            "clients_fingerprint": self.fingerprint,
        }
        return {**self.data.describe(), **found}

    def describe_publicly(self) -> dict[str, Any]:
        """What may be said of the data of a private run: nothing that follows from training examples."""
        told = {name: value for name, value in self.data.describe().items() if not name.startswith("train_")}
        return {**told, "clients": self.clients().count}

    def clients(self) -> Clients:
        """The examples of every client."""
        return self._clients

    @functools.cached_property
    def fingerprint(self) -> str:
        """Identifies the examples and who has them."""
        content = hashlib.blake2b(self._clients.offsets.tobytes(), digest_size=16)
        for name, array in sorted(self._clients.examples.items()):
            content.update(name.encode())
            content.update(np.ascontiguousarray(array).tobytes())
        return content.hexdigest()

    @functools.cached_property
    def _clients(self) -> Clients:
        source = self.data.train(0)
        if not isinstance(source, Examples):
            raise UserError(
                f"a {type(self.data).__name__} cannot be divided by client: its training examples are no "
                "odjax_train.data.Examples"
            )
        rows = np.arange(source.size)
        examples = (
            dataclasses.replace(self.data, **_plain(self.data))
            .train(0)
            .read(rows, np.zeros_like(rows, np.uint64))
        )
        try:
            return group_by_client(examples, np.asarray(self.split.owners(examples)), self.split.clients)
        except ValueError as error:
            raise UserError(f"the split by client: {error}") from error


def _plain(data: Any) -> dict[str, Any]:
    """Settings of a data set without augmentation."""
    fields = {field.name for field in dataclasses.fields(data)}
    return {name: value for name, value in (("shift", 0), ("flip", False)) if name in fields}


def evenly(clients: int, seed: int = 0) -> Split:
    """Examples at random, as many to each client.

    Args:
        clients: number of clients.
        seed: of the assignment.
    """

    def split(examples: Mapping[str, np.ndarray]) -> np.ndarray:
        total = len(next(iter(examples.values())))
        if clients < 1 or total < clients:
            raise UserError(f"{total} examples do not make {clients} clients")
        return np.random.default_rng(seed).permutation(np.arange(total) % clients)

    return Split(clients, split)


def in_order(clients: int) -> Split:
    """Neighbouring examples to each client, as many of them: parts of a text, say.

    Args:
        clients: number of clients.
    """

    def split(examples: Mapping[str, np.ndarray]) -> np.ndarray:
        total = len(next(iter(examples.values())))
        if clients < 1 or total < clients:
            raise UserError(f"{total} examples do not make {clients} clients")
        return np.arange(total) * clients // total

    return Split(clients, split)


def by_label_shards(clients: int, shards: int = 2, seed: int = 0) -> Split:
    """A few labels to each client (`odjax.federated.label_shards`).

    Args:
        clients: number of clients.
        shards: of each client.
        seed: of the assignment.
    """
    return Split(clients, lambda examples: label_shards(_labels(examples), clients, shards, seed))


def by_dirichlet(clients: int, concentration: float, seed: int = 0) -> Split:
    """Proportions of labels from a Dirichlet distribution (`odjax.federated.dirichlet_split`).

    Args:
        clients: number of clients.
        concentration: small for few labels a client.
        seed: of the assignment.
    """
    return Split(clients, lambda examples: dirichlet_split(_labels(examples), clients, concentration, seed))


def _labels(examples: Mapping[str, np.ndarray]) -> np.ndarray:
    if "label" not in examples:
        raise UserError(f"a split by label needs examples with a label, they hold {', '.join(examples)}")
    return examples["label"]
