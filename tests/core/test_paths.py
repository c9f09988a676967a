"""Paths name the same parameter whatever framework made the tree, and a selection is never silently wrong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.paths import label, leaves_with_paths, map_with_path, select

names = st.sampled_from(["a", "b", "c", "kernel", "value", "0"])
trees = st.recursive(
    st.integers(0, 9),
    lambda inner: (
        st.dictionaries(names, inner, min_size=1, max_size=3) | st.lists(inner, min_size=1, max_size=3)
    ),
    max_leaves=8,
)


class LinenModel(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(
            3, name="first", kernel_init=nn.with_logical_partitioning(nn.initializers.ones, ("e", "m"))
        )(x)
        return nn.Dense(
            2, name="second", kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "m"))
        )(x)


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(4, 3, rngs=rngs)
        self.second = nnx.Linear(3, 2, rngs=rngs)


@pytest.fixture(scope="module")
def three_forms():
    boxed = LinenModel().init(jax.random.key(0), jnp.ones((1, 4)))["params"]
    return {"boxed": boxed, "plain": nn.meta.unbox(boxed), "nnx": nnx.state(NnxModel(nnx.Rngs(0)), nnx.Param)}


def test_one_model_has_the_same_paths_as_plain_dict_boxed_dict_and_nnx_state(three_forms):
    expected = ["first/bias", "first/kernel", "second/bias", "second/kernel"]
    for tree in [*three_forms.values(), freeze(three_forms["plain"])]:
        assert [path for path, _ in leaves_with_paths(tree)] == expected


def test_leaves_come_in_the_order_of_jax(three_forms):
    for tree in three_forms.values():
        for (_, ours), theirs in zip(leaves_with_paths(tree), jax.tree.leaves(tree), strict=True):
            assert ours is theirs


@given(trees)
def test_every_leaf_has_a_path_unless_two_collide(tree):
    keyed = jax.tree_util.tree_flatten_with_path(tree)[0]
    expected = [jax.tree_util.keystr(key_path, simple=True, separator="/") for key_path, _ in keyed]
    if len(set(expected)) < len(expected):
        with pytest.raises(ValueError, match="two leaves have the path"):
            leaves_with_paths(tree)
        return
    found = leaves_with_paths(tree)
    assert [path for path, _ in found] == expected
    assert [leaf for _, leaf in found] == jax.tree.leaves(tree)


def test_a_field_called_value_is_part_of_the_path_when_it_is_no_box():
    assert leaves_with_paths({"head": {"value": 1, "key": 2}}) == [("head/key", 2), ("head/value", 1)]
    state = optax.EmaState(count=1, ema={"value": 2})
    assert [path for path, _ in leaves_with_paths({"s": state})] == ["s/count", "s/ema/value"]


def test_a_custom_node_without_keys_uses_the_index_of_the_child():
    class Pair:
        def __init__(self, a, b):
            self.a, self.b = a, b

    jax.tree_util.register_pytree_node(Pair, lambda p: ((p.a, p.b), None), lambda _, c: Pair(*c))
    assert leaves_with_paths({"p": Pair(1, 2)}) == [("p/0", 1), ("p/1", 2)]


def test_a_box_around_a_tree_drops_only_its_own_level():
    assert leaves_with_paths({"w": nn.Partitioned({"a": 1, "b": 2}, ("x",))}) == [("w/a", 1), ("w/b", 2)]
    assert leaves_with_paths(nn.Partitioned(1, ())) == [("", 1)]


def test_two_leaves_with_one_path_are_an_error_that_names_it():
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        leaves_with_paths({"a/b": 1, "a": {"b": 2}})


def test_a_selection_has_the_structure_of_the_tree_and_works_as_an_optax_mask(three_forms):
    for tree in three_forms.values():
        mask = select(tree, r"first/.*")
        assert jax.tree.structure(mask) == jax.tree.structure(tree)
        assert jax.tree.leaves(mask) == [True, True, False, False]
        updates, _ = optax.masked(optax.set_to_zero(), mask).update(
            tree, optax.masked(optax.set_to_zero(), mask).init(tree)
        )
        assert float(jnp.abs(jax.tree.leaves(updates)[1]).max()) == 0


def test_a_pattern_must_match_the_whole_path(three_forms):
    with pytest.raises(ValueError, match=r"where='kernel' selects no leaf.*whole path.*'\.\*kernel\.\*'"):
        select(three_forms["plain"], "kernel")


def test_a_pattern_that_selects_nothing_shows_the_closest_paths(three_forms):
    with pytest.raises(
        ValueError, match=r"where='frist/kernel' selects no leaf; the closest paths are 'first/kernel'"
    ):
        select(three_forms["nnx"], "frist/kernel")
    with pytest.raises(ValueError, match="the tree has no leaves"):
        select({}, ".*")


def test_a_predicate_that_selects_nothing_is_an_error_too(three_forms):
    with pytest.raises(ValueError, match=r"predicate.*selects no leaf; the first paths are 'first/bias'"):
        select(three_forms["plain"], lambda path, leaf: leaf.ndim == 7)


def test_an_invalid_expression_is_shown_with_the_position():
    with pytest.raises(
        ValueError, match=r"where='a/\(b' is not a regular expression: .* at position 2 \('\(b'\)"
    ):
        select({"a": 1}, "a/(b")


def test_where_of_another_type_is_a_type_error():
    with pytest.raises(TypeError, match="must be a regular expression or a predicate"):
        select({"a": 1}, ["a"])


def test_a_predicate_sees_path_and_leaf(three_forms):
    mask = select(three_forms["nnx"], lambda path, leaf: path.startswith("second") and leaf.ndim == 2)
    assert jax.tree.leaves(mask) == [False, False, False, True]


def test_map_with_path_keeps_structure_and_pairs_leaves(three_forms):
    for tree in three_forms.values():
        result = map_with_path(lambda path, x, y: len(path) + 0 * x.size + y.size, tree, tree)
        assert jax.tree.structure(result) == jax.tree.structure(tree)
        assert jax.tree.leaves(result) == [len(path) + leaf.size for path, leaf in leaves_with_paths(tree)]


def test_map_with_path_refuses_another_structure():
    with pytest.raises(ValueError):  # noqa: PT011 (jax words it)
        map_with_path(lambda path, x, y: x, {"a": 1, "b": 2}, {"a": 1})


def test_labels_partition_the_leaves_and_drive_multi_transform():
    params = {"lora": {"a": jnp.ones(2), "b": jnp.ones(2)}, "norm": jnp.ones(2)}
    labels = label(params, {"train": "lora/.*", "slow": "norm"})
    optimizer = optax.multi_transform({"train": optax.sgd(1.0), "slow": optax.sgd(0.5)}, labels)
    updates, _ = optimizer.update(params, optimizer.init(params), params)
    assert float(updates["lora"]["a"][0]) == -1.0
    assert float(updates["norm"][0]) == -0.5


def test_a_leaf_that_two_rules_select_is_an_error_naming_both():
    with pytest.raises(ValueError, match=r"'a/w' is selected by two rules, 'x' \(where='a/\.\*'\) and 'y'"):
        label({"a": {"w": 1}, "b": {"w": 2}}, {"x": "a/.*", "y": ".*/w"})


def test_a_leaf_that_no_rule_selects_is_an_error_without_a_default():
    with pytest.raises(ValueError, match="no rule selects the leaf 'b'"):
        label({"a": 1, "b": 2}, {"x": "a"})
    assert label({"a": 1, "b": 2}, {"x": "a"}, default="rest") == {"a": "x", "b": "rest"}
