"""The tree report shows every leaf and adds up."""

import jax
import jax.numpy as jnp
import pytest

from odjax.core.report import format_bytes, tree_report

SHAPES = {
    "embed": jax.ShapeDtypeStruct((16, 4), jnp.bfloat16),
    "layers": {
        "q": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32),
        "k": jax.ShapeDtypeStruct((2, 4, 4), jnp.float32),
    },
}


def test_the_totals_add_up_over_shapes_that_were_never_allocated():
    last = tree_report(SHAPES, trainable="layers/q").splitlines()[-1]
    assert last == "total: 3 leaves, 32 of 128 numbers trained (25.00 %), 384 B"


def test_rules_that_match_are_named_beside_the_leaf():
    lines = tree_report(SHAPES, rules={"attention": "layers/.*", "query": ".*/q"}).splitlines()
    assert lines[0].split() == ["path", "shape", "dtype", "rule", "trained", "bytes"]
    assert "  -  " in lines[1]
    assert "attention query" in next(line for line in lines if line.startswith("layers/q"))


def test_the_columns_are_aligned():
    lines = tree_report(SHAPES).splitlines()[:-1]
    start = lines[0].index("dtype")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def test_long_trees_are_cut_and_say_so():
    lines = tree_report(SHAPES, max_rows=1).splitlines()
    assert lines[2] == "... 2 more leaves, layers/k to layers/q"
    assert lines[-1].startswith("total: 3 leaves, 128 of 128")


def test_shardings_are_shown_when_a_leaf_has_one():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", None))
    sharded = jax.device_put(jnp.ones((8, 2)), sharding)
    text = tree_report(
        {"w": sharded, "s": jax.ShapeDtypeStruct((8, 2), jnp.float32, sharding=sharding), "b": 1.0}
    )
    assert "sharding" in text.splitlines()[0]
    assert text.count("(fsdp, -)") == 2


def test_an_empty_tree_and_typed_keys_have_a_report():
    assert tree_report({}).splitlines()[-1] == "total: 0 leaves, 0 of 0 numbers trained (-), 0 B"
    assert "key<fry>" in tree_report({"key": jax.random.key(0)})


def test_a_rule_that_selects_nothing_is_an_error():
    with pytest.raises(ValueError, match="selects no leaf"):
        tree_report(SHAPES, rules={"x": "nothing"})


@pytest.mark.parametrize(
    "count, text",
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * 2**29, "1.5 GiB"), (2**60, "1024.0 PiB")],
)
def test_bytes_are_written_in_binary_units(count, text):
    assert format_bytes(count) == text
