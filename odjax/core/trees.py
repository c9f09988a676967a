"""Taking a tree of parameters apart by path, putting it together again, and comparing two trees.

Partition first, then differentiate: `jax.grad` over the selected part alone never computes the gradient of
the rest.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from odjax.core.paths import Where, is_box, leaves_with_paths, select


def partition(tree: Any, where: Where) -> tuple[Any, Any]:
    """Splits a tree into the leaves that `where` selects and the rest, with None in the holes.

    None is an empty subtree to jax, so that `jax.grad`, `optax` and `jax.jit` see only the leaves that are
    there.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`.
      where: which leaves are selected, as in `odjax.core.paths.select`.

    Returns:
      (selected, rest), each with the structure of `tree` and None where the leaf is in the other one.

    Raises:
      ValueError: nothing is selected, or the tree itself holds a None, which could not be told from a hole.

    Example:
      >>> selected, rest = partition({"kernel": 1.0, "bias": 2.0}, "kernel")
      >>> selected, rest
      ({'bias': None, 'kernel': 1.0}, {'bias': 2.0, 'kernel': None})
      >>> combine(selected, rest)
      {'bias': 2.0, 'kernel': 1.0}
    """
    for path, leaf in leaves_with_paths(tree, keep_none=True):
        if leaf is None:
            raise ValueError(
                f"the tree has None at {path!r}, which is how a hole is marked: drop that entry first"
            )
    chosen = select(tree, where)
    selected = jax.tree.map(lambda hit, leaf: leaf if hit else None, chosen, tree)
    rest = jax.tree.map(lambda hit, leaf: None if hit else leaf, chosen, tree)
    return selected, rest


def _named(tree: Any) -> dict[str, Any]:
    return dict(leaves_with_paths(tree, keep_none=True))


def combine(*trees: Any) -> Any:
    """Puts together what `partition` took apart.

    Args:
      *trees: trees of one structure, in which every leaf is there once and None everywhere else.

    Returns:
      The tree without holes; boxes (axis names) are those of the first tree.

    Raises:
      ValueError: a leaf is in two trees, in none of them, or the structures differ; the path is named.

    Example:
      >>> combine({"a": 1, "b": None}, {"a": None, "b": 2})
      {'a': 1, 'b': 2}
    """
    if not trees:
        raise ValueError("combine needs at least one tree")
    named = [_named(tree) for tree in trees]
    for other in named[1:]:
        for path in {**named[0], **other}:
            if path not in other or path not in named[0]:
                raise ValueError(f"the trees to combine differ in structure: only one of them has {path!r}")
    leaves = []
    for path in named[0]:
        present = [leaves_of[path] for leaves_of in named if leaves_of[path] is not None]
        if len(present) != 1:
            fault = "is missing in every tree" if not present else f"is in {len(present)} trees"
            raise ValueError(
                f"the leaf {path!r} {fault}: each leaf must be in exactly one of the {len(trees)} trees"
            )
        leaves.append(present[0])
    return jax.tree.structure(trees[0], is_leaf=lambda node: node is None).unflatten(leaves)


@dataclass(frozen=True)
class Difference:
    """One way in which a tree is not what was expected. `str` of it is one readable line.

    Attributes:
      path: the '/'-joined path of the leaf.
      kind: "missing" (expected, not found), "extra" (found, not expected), "shape" or "dtype".
      expected: what was expected there, as text; '' for an extra leaf.
      found: what was found there, as text; '' for a missing leaf.
    """

    path: str
    kind: str
    expected: str
    found: str

    def __str__(self) -> str:
        if self.kind == "missing":
            return f"{self.path}: missing (expected {self.expected})"
        if self.kind == "extra":
            return f"{self.path}: not expected (found {self.found})"
        return f"{self.path}: {self.kind} differs, expected {self.expected}, found {self.found}"


def shape_of(leaf: Any) -> tuple[int, ...]:
    """The shape of an array, of a `jax.ShapeDtypeStruct`, or of a Python number.

    Args:
      leaf: a leaf of a tree.

    Returns:
      Its shape.
    """
    return tuple(leaf.shape) if hasattr(leaf, "shape") else np.shape(leaf)


def dtype_of(leaf: Any) -> Any:
    """The dtype of an array, of a `jax.ShapeDtypeStruct`, or of a Python number.

    Args:
      leaf: a leaf of a tree.

    Returns:
      Its dtype (a typed key has an extended one).
    """
    return leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype


def _describe(leaf: Any) -> str:
    return f"{dtype_of(leaf)}{list(shape_of(leaf))}"


def differences(expected: Any, found: Any) -> list[Difference]:
    """Compares paths, shapes and dtypes of two trees in both directions, so that a restore can fail loudly.

    Boxes are looked through: a Linen dict and an `nnx.State` of one model have no differences.

    Args:
      expected: a tree of arrays or `jax.ShapeDtypeStruct`.
      found: a tree of arrays or `jax.ShapeDtypeStruct`.

    Returns:
      The differences in the order of the expected paths, extra leaves last; empty when the trees agree.

    Example:
      >>> import jax.numpy as jnp
      >>> expected = {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}
      >>> print(format_differences(differences(expected, {"w": jnp.zeros((3, 2)), "c": jnp.zeros(3)})))
      b: missing (expected float32[3])
      w: shape differs, expected float32[2, 3], found float32[3, 2]
      c: not expected (found float32[3])
    """
    wanted, came = dict(leaves_with_paths(expected)), dict(leaves_with_paths(found))
    result = []
    for path, leaf in wanted.items():
        if path not in came:
            result.append(Difference(path, "missing", _describe(leaf), ""))
        elif shape_of(leaf) != shape_of(came[path]):
            result.append(Difference(path, "shape", _describe(leaf), _describe(came[path])))
        elif dtype_of(leaf) != dtype_of(came[path]):
            result.append(Difference(path, "dtype", _describe(leaf), _describe(came[path])))
    result += [
        Difference(path, "extra", "", _describe(leaf)) for path, leaf in came.items() if path not in wanted
    ]
    return result


def format_differences(found: Iterable[Difference], max_rows: int = 20) -> str:
    """Differences as text, one a line.

    Args:
      found: what `differences` returned.
      max_rows: how many lines at most before the rest is only counted.

    Returns:
      The text; '' when there are none.
    """
    lines = [str(difference) for difference in found]
    if len(lines) > max_rows:
        lines = [*lines[:max_rows], f"... and {len(lines) - max_rows} more"]
    return "\n".join(lines)


def unbox(tree: Any) -> Any:
    """Replaces every box (Linen axis metadata, `nnx.Variable`) by its value.

    Args:
      tree: a tree, boxed or not.

    Returns:
      The tree with plain leaves; the containers stay what they are.

    Example:
      >>> import flax.linen as nn
      >>> unbox({"w": nn.Partitioned(1.0, ("embed",))})
      {'w': 1.0}
    """

    def open_box(node: Any) -> Any:
        if not is_box(node):
            return node
        inner = jax.tree.leaves(node, is_leaf=lambda x: x is not node)
        return unbox(inner[0]) if inner else None

    return jax.tree.map(open_box, tree, is_leaf=is_box)
