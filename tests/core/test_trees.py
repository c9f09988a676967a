"""Taking trees apart is lossless, frozen gradients are never computed, differences are found both ways."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.paths import leaves_with_paths
from odjax.core.trees import combine, differences, format_differences, partition, unbox

names = st.sampled_from(["a", "b", "c", "d"])
subtrees = st.recursive(
    st.integers(), lambda t: st.dictionaries(names, t, min_size=1, max_size=3), max_leaves=6
)
trees = st.dictionaries(names, subtrees, min_size=1, max_size=3)


@given(trees, st.data())
def test_combine_inverts_partition(tree, data):
    paths = [path for path, _ in leaves_with_paths(tree)]
    chosen = set(data.draw(st.lists(st.sampled_from(paths), min_size=1)))
    selected, rest = partition(tree, lambda path, _: path in chosen)
    assert {path for path, _ in leaves_with_paths(selected)} == chosen
    assert {path for path, _ in leaves_with_paths(rest)} == set(paths) - chosen
    assert combine(selected, rest) == tree
    assert combine(rest, selected) == tree


@pytest.mark.parametrize("form", ["boxed", "nnx"])
def test_boxes_survive_partition_and_combine(form):
    tree = {"a": nn.Partitioned(jnp.ones(2), ("x",)), "b": nn.LogicallyPartitioned(jnp.zeros(3), ("y",))}
    if form == "nnx":
        tree = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    first = leaves_with_paths(tree)[0][0]
    selected, rest = partition(tree, first)
    whole = combine(selected, rest)
    assert jax.tree.structure(whole) == jax.tree.structure(tree)
    assert jax.tree.all(jax.tree.map(lambda x, y: bool(jnp.array_equal(x, y)), whole, tree))


def test_three_way_combine():
    assert combine(
        {"a": 1, "b": None, "c": None}, {"a": None, "b": 2, "c": None}, {"a": None, "b": None, "c": 3}
    ) == {
        "a": 1,
        "b": 2,
        "c": 3,
    }


def test_a_leaf_in_two_trees_is_an_error():
    with pytest.raises(ValueError, match="the leaf 'x/w' is in 2 trees"):
        combine({"x": {"w": 1}}, {"x": {"w": 2}})


def test_a_leaf_in_no_tree_is_an_error():
    with pytest.raises(ValueError, match="the leaf 'x/w' is missing in every tree"):
        combine({"x": {"w": None}, "y": 1}, {"x": {"w": None}, "y": None})


def test_combining_trees_of_different_structure_names_a_path():
    with pytest.raises(ValueError, match="only one of them has 'b'"):
        combine({"a": 1}, {"a": None, "b": 2})
    with pytest.raises(ValueError, match="at least one tree"):
        combine()


def test_a_tree_with_none_cannot_be_partitioned():
    with pytest.raises(ValueError, match="the tree has None at 'bias'"):
        partition({"kernel": 1, "bias": None}, "kernel")


def jaxpr_shapes(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, tuple(variable.aval.shape)
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from jaxpr_shapes(inner)


def test_the_gradient_of_a_partitioned_function_computes_nothing_of_a_frozen_leafs_size():
    params = {"frozen": jnp.ones((7, 5)), "free": jnp.ones((5, 3))}
    x = jnp.ones((2, 7))

    def loss(params):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["frozen"]) @ params["free"]))

    selected, rest = partition(params, "free")
    split = jax.make_jaxpr(jax.grad(lambda s, r: loss(combine(s, r))))(selected, rest)
    whole = jax.make_jaxpr(jax.grad(loss))(params)
    sizes = {shape for _, shape in jaxpr_shapes(split.jaxpr)}
    assert (7, 5) not in sizes
    assert (5, 7) not in sizes
    assert [tuple(v.aval.shape) for v in split.jaxpr.outvars] == [(5, 3)]
    assert (7, 5) in {shape for _, shape in jaxpr_shapes(whole.jaxpr)}  # the test can tell


def test_equal_trees_have_no_differences_even_when_one_is_only_shapes():
    tree = {"a": jnp.ones((2, 3), jnp.bfloat16), "b": [np.zeros(4, np.int32)], "k": jax.random.key(0)}
    assert differences(tree, jax.eval_shape(lambda: tree)) == []
    assert format_differences([]) == ""


def test_differences_are_found_in_both_directions():
    expected = {"a": jnp.ones(2), "b": jnp.ones(3), "c": jnp.ones(4), "d": jnp.ones(5)}
    found = {"a": jnp.ones(2), "b": jnp.ones(4), "c": jnp.ones(4, jnp.bfloat16), "e": jnp.ones(6)}
    result = differences(expected, found)
    assert [(d.path, d.kind) for d in result] == [
        ("b", "shape"),
        ("c", "dtype"),
        ("d", "missing"),
        ("e", "extra"),
    ]
    assert str(result[0]) == "b: shape differs, expected float32[3], found float32[4]"
    assert str(result[1]) == "c: dtype differs, expected float32[4], found bfloat16[4]"
    mirrored = differences(found, expected)
    assert {(d.path, d.kind) for d in mirrored} == {
        ("b", "shape"),
        ("c", "dtype"),
        ("d", "extra"),
        ("e", "missing"),
    }
    assert format_differences(result, max_rows=1).endswith("... and 3 more")


def test_a_boxed_tree_and_its_plain_form_have_no_differences():
    boxed = {"w": nn.LogicallyPartitioned(jnp.ones((2, 3)), ("a", "b"))}
    assert differences(boxed, unbox(boxed)) == []
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)))
    assert differences(state, nnx.to_pure_dict(state)) == []
    assert [path for path, _ in leaves_with_paths(unbox(state))] == ["bias", "kernel"]
    assert isinstance(
        jax.tree.leaves(unbox(state), is_leaf=lambda x: isinstance(x, nnx.Variable))[0], jax.Array
    )


def test_python_numbers_are_leaves_too():
    assert differences({"a": 1}, {"a": 2}) == []
    assert [d.kind for d in differences({"a": 1}, {"a": 1.5})] == ["dtype"]
