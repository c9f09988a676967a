"""Selecting the leaves of a tree of parameters by the '/'-joined path of each leaf.

The path of a leaf does not depend on the framework that made the tree: a Linen dict, the same dict with boxed
parameters (`nn.Partitioned`, `nn.LogicallyPartitioned`) and an `nnx.State` of the same model give the same
paths. The level that a box adds for its value is dropped.
"""

from __future__ import annotations

import difflib
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax.core.meta import AxisMetadata

Where = str | Callable[[str, Any], bool]
"""A regular expression for the whole path of a leaf, or a predicate `(path, leaf) -> bool`."""


NOT_KERNELS = ("bias", "scale", "embedding", "pos_embedding", "positions", "cls")
"""Names of leaves that may have two axes and are no kernel of a linear map."""

STACKED = r"(.*/)?layers/(?!\d+(/|$)).*"
"""Paths of leaves that `nn.scan` stacked along their first axis (`layers/0/kernel` is a layer of a list)."""


def is_stacked(path: str, stacked: str | None = STACKED) -> bool:
    """Whether the first axis of a leaf counts layers.

    Args:
      path: of the leaf.
      stacked: regular expression for the paths of stacked layers; None where there are none.

    Returns:
      True when the whole path matches.

    Example:
      >>> is_stacked("layers/attn/q/kernel"), is_stacked("layers/0/attn/q/kernel")
      (True, False)
    """
    return stacked is not None and re.fullmatch(stacked, path) is not None


def is_box(node: Any) -> bool:
    """Whether a node is a box around a value: Linen axis metadata or an `nnx.Variable`.

    Args:
      node: any node of a tree.

    Returns:
      True for a box, whose own level is not part of a path.
    """
    if isinstance(node, AxisMetadata):
        return True
    nnx = sys.modules.get("flax.nnx")  # a tree holds a Variable only where nnx has been imported already
    return nnx is not None and isinstance(node, nnx.Variable)


def name_of(key: Any) -> str:
    """The text of one entry of a jax key path.

    Args:
      key: a `DictKey`, `GetAttrKey`, `SequenceKey` or `FlattenedIndexKey`.

    Returns:
      The dict key, the attribute's name, or the index.

    Example:
      >>> name_of(jax.tree_util.SequenceKey(3))
      '3'
    """
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)


def _flatten(tree: Any, keep_none: bool) -> list[tuple[tuple[str, ...], Any]]:
    def stop(node: Any) -> bool:
        return is_box(node) or (keep_none and node is None)

    found = []
    for key_path, node in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        names = tuple(name_of(key) for key in key_path)
        if not is_box(node):
            found.append((names, node))
            continue
        children, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda x, box=node: x is not box)
        for inner_path, child in children:
            inner = tuple(name_of(key) for key in inner_path[1:])  # the first entry is the box's own level
            found += [((*names, *inner, *rest), leaf) for rest, leaf in _flatten(child, keep_none)]
    return found


def leaves_with_paths(tree: Any, *, keep_none: bool = False) -> list[tuple[str, Any]]:
    """The leaves of a tree, each with its '/'-joined path, in the order of `jax.tree.leaves`.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`.
      keep_none: count None as a leaf (a hole left by `partition`).

    Returns:
      A list of (path, leaf). A tree that is one leaf has the path ''.

    Raises:
      ValueError: two leaves have the same path (`{"a/b": x, "a": {"b": y}}`).

    Example:
      >>> leaves_with_paths({"mlp": {"kernel": 1, "bias": 2}, "heads": [3]})
      [('heads/0', 3), ('mlp/bias', 2), ('mlp/kernel', 1)]
    """
    found = [("/".join(names), leaf) for names, leaf in _flatten(tree, keep_none)]
    if len({path for path, _ in found}) != len(found):
        seen: set[str] = set()
        double = next(path for path, _ in found if path in seen or seen.add(path))
        raise ValueError(
            f"two leaves have the path {double!r}: rename one of them, paths must tell leaves apart"
        )
    return found


def map_with_path(fn: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """Maps `fn(path, leaf, *others)` over the leaves of a tree.

    Args:
      fn: called once a leaf with the path, the leaf, and the leaves of `rest` at the same place.
      tree: a tree.
      *rest: trees with the structure of `tree`, or with subtrees in the place of its leaves.

    Returns:
      A tree with the structure of `tree` (boxes included).

    Raises:
      ValueError: a tree of `rest` has another structure.

    Example:
      >>> map_with_path(lambda path, x, y: f"{path}={x + y}", {"a": 1, "b": [2]}, {"a": 10, "b": [20]})
      {'a': 'a=11', 'b': ['b/0=22']}
    """
    leaves = leaves_with_paths(tree)
    structure = jax.tree.structure(tree)
    others = [structure.flatten_up_to(other) for other in rest]
    return structure.unflatten(
        [fn(path, leaf, *(o[i] for o in others)) for i, (path, leaf) in enumerate(leaves)]
    )


def _closest(pattern: str, paths: list[str], count: int = 3) -> str:
    if not paths:
        return "the tree has no leaves"
    near = difflib.get_close_matches(pattern, paths, n=count, cutoff=0.0)
    return "the closest paths are " + ", ".join(repr(path) for path in near)


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        place = (
            "" if error.pos is None else f" at position {error.pos} ({pattern[error.pos : error.pos + 8]!r})"
        )
        raise ValueError(f"where={pattern!r} is not a regular expression: {error.msg}{place}") from None


def _matches(leaves: list[tuple[str, Any]], where: Where) -> list[bool]:
    if callable(where):
        hits = [bool(where(path, leaf)) for path, leaf in leaves]
        if not any(hits):
            examples = ", ".join(repr(path) for path, _ in leaves[:3]) or "none: the tree has no leaves"
            raise ValueError(f"the predicate where={where!r} selects no leaf; the first paths are {examples}")
        return hits
    if not isinstance(where, str):
        raise TypeError(
            f"where must be a regular expression or a predicate (path, leaf) -> bool, got {where!r}"
        )
    pattern = _compile(where)
    hits = [pattern.fullmatch(path) is not None for path, _ in leaves]
    if not any(hits):
        paths = [path for path, _ in leaves]
        hint = ""
        if any(pattern.search(path) for path in paths):
            hint = f"; a pattern is matched against the whole path: where='.*{where}.*' would select some"
        raise ValueError(f"where={where!r} selects no leaf; {_closest(where, paths)}{hint}")
    return hits


def select(tree: Any, where: Where) -> Any:
    """Which leaves of a tree `where` selects.

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`.
      where: a regular expression matched with `re.fullmatch` against the whole path of a leaf
        (`"layers/attn/(q|v)/kernel"`), or a predicate `(path, leaf) -> bool`.

    Returns:
      A tree of bool with the structure of `tree` (a mask for `optax.masked`, for example).

    Raises:
      ValueError: nothing is selected (the error shows the closest paths), or the expression is invalid.
      TypeError: `where` is neither text nor callable.

    Example:
      >>> select({"attn": {"q": 1, "k": 2}, "mlp": 3}, "attn/.*")
      {'attn': {'k': True, 'q': True}, 'mlp': False}
    """
    return jax.tree.structure(tree).unflatten(_matches(leaves_with_paths(tree), where))


def label(tree: Any, rules: Mapping[str, Where], *, default: str | None = None) -> Any:
    """Gives every leaf the label of the one rule that selects it (labels for `optax.multi_transform`).

    Args:
      tree: a tree of arrays or `jax.ShapeDtypeStruct`.
      rules: label -> `where`. Every rule must select something.
      default: the label of a leaf that no rule selects; None makes such a leaf an error.

    Returns:
      A tree of labels with the structure of `tree`.

    Raises:
      ValueError: a leaf is selected by two rules, or by none and there is no default, or a rule selects
        nothing.

    Example:
      >>> label({"lora": {"a": 1, "b": 2}, "norm": 3}, {"train": "lora/.*"}, default="freeze")
      {'lora': {'a': 'train', 'b': 'train'}, 'norm': 'freeze'}
    """
    leaves = leaves_with_paths(tree)
    hits = {name: _matches(leaves, where) for name, where in rules.items()}
    labels = []
    for i, (path, _) in enumerate(leaves):
        names = [name for name in rules if hits[name][i]]
        if len(names) > 1:
            raise ValueError(
                f"the leaf {path!r} is selected by two rules, {names[0]!r} (where={rules[names[0]]!r}) and "
                f"{names[1]!r} (where={rules[names[1]]!r}): narrow one of them"
            )
        if not names and default is None:
            raise ValueError(f"no rule selects the leaf {path!r}: add a rule for it or pass default=")
        labels.append(names[0] if names else default)
    return jax.tree.structure(tree).unflatten(labels)
