"""Plans: integer numbers of links that add up, whatever the shapes."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.sparse.masks import NM, Block, Channel
from odjax.sparse.plans import LeafPlan, check_plan, custom, erk, overall_density, uniform


def shapes(*all_shapes, **named):
    tree = {f"l{i}": shape for i, shape in enumerate(all_shapes)} | named
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in tree.items()}


matrices = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60)), min_size=1, max_size=6)
tenths = st.integers(1, 99).map(lambda i: i / 100)


@given(matrices, st.integers(0, 99))
def test_uniform_leaves_floor_of_s_n_zeros(all_shapes, percent):
    plan = uniform(shapes(*all_shapes), percent / 100)
    for i, shape in enumerate(all_shapes):
        assert math.prod(shape) - plan[f"l{i}"].links == percent * math.prod(shape) // 100


def test_counts_are_exact_where_float32_and_binary_fractions_are_not():
    plan = uniform(shapes((10, 1), (5000, 12000), (3, 100)), 0.7)
    assert [leaf.links for leaf in plan.values()] == [3, 18_000_000, 90]


@given(matrices, tenths, st.sampled_from([0.0, 0.5, 1.0]))
def test_erk_spends_its_budget_and_no_leaf_has_more_than_all_links(all_shapes, sparsity, power):
    plan = erk(shapes(*all_shapes), sparsity, power=power)
    total = sum(math.prod(shape) for shape in all_shapes)
    budget = (1 - Fraction(str(sparsity))) * total
    links = sum(leaf.links for leaf in plan.values())
    assert budget <= links < budget + len(plan)
    assert all(1 <= leaf.links <= leaf.size for leaf in plan.values())


@given(matrices, tenths)
def test_erk_does_not_depend_on_the_order_of_leaves(all_shapes, sparsity):
    plan = erk(shapes(*all_shapes), sparsity)
    turned = erk(shapes(*all_shapes[::-1]), sparsity)
    assert [leaf.links for leaf in plan.values()] == [leaf.links for leaf in turned.values()][::-1]


@given(matrices, tenths)
def test_erk_with_power_zero_is_uniform(all_shapes, sparsity):
    tree = shapes(*all_shapes)
    assert erk(tree, sparsity, power=0.0) == uniform(tree, sparsity)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(2, 5), tenths)
def test_a_larger_leaf_of_the_same_aspect_is_never_denser(rows, columns, factor, sparsity):
    small, large = (4 * rows, 4 * columns), (4 * factor * rows, 4 * factor * columns)
    plan = erk(shapes(small, large), sparsity)
    density = [plan[name].links / plan[name].size for name in ("l0", "l1")]
    assert density[1] <= density[0] + 1 / plan["l1"].size


def test_erk_by_hand():
    # Ratios 20/100 and 200/10000; 0.1 * 10100 = 1010 = eps (20 + 200): eps = 4.59, densities 0.918, 0.0918.
    plan = erk(shapes((10, 10), (100, 100)), 0.9)
    assert [leaf.links for leaf in plan.values()] == [92, 919]
    # At 70 % the first would have density 2.75: dense, the other has the 2930 links that are left.
    plan = erk(shapes((10, 10), (100, 100)), 0.7)
    assert [leaf.links for leaf in plan.values()] == [100, 2930]


def test_er_looks_at_the_last_two_axes_only():
    tree = shapes((3, 3, 8, 8), (20, 20))
    window = erk(tree, 0.8, kernel_sizes=False)
    ratio = (window["l0"].links / 576) / (window["l1"].links / 400)
    assert ratio == pytest.approx((16 / 64) / (40 / 400), rel=0.05)
    kernel = erk(tree, 0.8)
    ratio = (kernel["l0"].links / 576) / (kernel["l1"].links / 400)
    assert ratio == pytest.approx((22 / 576) / (40 / 400), rel=0.05)


def test_fixed_leaves_are_honoured_and_outside_the_budget():
    tree = shapes((50, 50), (30, 30), (40, 40))
    plan = erk(tree, 0.9, fixed={"l0": 0.5})
    assert plan["l0"].links == 1250
    assert {p: plan[p] for p in ("l1", "l2")} == erk(shapes(l1=(30, 30), l2=(40, 40)), 0.9)
    assert uniform(tree, 0.9, fixed={"l[01]": 0.0})["l1"].links == 900


def test_stacked_layers_are_planned_a_slice():
    stacked = {"layers": {"kernel": jax.ShapeDtypeStruct((5, 20, 30), jnp.float32)}, **shapes((20, 30))}
    apart = shapes(*[(20, 30)] * 6)
    for make in (uniform, erk):
        plan = make(stacked, 0.9)
        leaf = plan["layers/kernel"]
        assert (leaf.batch_dims, leaf.slices, leaf.size) == (1, 5, 600)
        assert leaf.links == plan["l0"].links == make(apart, 0.9)["l0"].links
    assert uniform(stacked, 0.9, stacked=None)["layers/kernel"].links == 300


def test_biases_norms_and_embeddings_stay_dense():
    tree = shapes(kernel=(8, 8), bias=(8,), scale=(8,), embedding=(20, 8), steps=())
    assert list(uniform(tree, 0.5)) == ["kernel"]
    assert list(uniform(tree, 0.5, where="embedding")) == ["embedding"]
    assert uniform(tree, 0.5, where="bias", allow_vectors=True)["bias"].links == 4


def test_structures_round_down_to_whole_groups_but_never_to_nothing():
    tree = shapes((8, 12))
    assert uniform(tree, structure=NM(2, 4))["l0"].links == 48
    assert uniform(tree, 0.5, structure=Block(4, 4))["l0"].links == 48
    assert uniform(tree, 0.9, structure=Block(4, 4))["l0"].links == 16
    assert uniform(tree, 0.8, structure=Channel())["l0"].links == 16
    assert uniform(tree, 0.8, structure=Channel(axis=-2))["l0"].links == 12


def test_custom_gives_every_pattern_its_own():
    plan = custom(shapes((10, 10), (10, 10), (4, 4)), {"l0": 0.5, "l1": 0.9})
    assert {path: leaf.links for path, leaf in plan.items()} == {"l0": 50, "l1": 10}
    assert overall_density(plan) == 0.3


TREE = shapes((8, 6), bias=(6,))
PLAN = uniform(TREE, 0.5)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: uniform(TREE, 1.0), r"sparsity must be at least 0 and below 1, got 1.0"),
        (lambda: uniform(TREE, -0.1), r"sparsity must be at least 0 and below 1, got -0.1"),
        (lambda: uniform(TREE, math.nan), r"below 1, got nan"),
        (lambda: uniform(TREE), r"uniform needs a sparsity"),
        (lambda: uniform(TREE, 0.5, where="l9"), r"where='l9' selects no leaf; the closest paths are 'l0'"),
        (
            lambda: uniform(TREE, 0.5, where="bias"),
            r"'bias' of shape \(6,\), which is no matrix.*allow_vectors",
        ),
        (lambda: uniform(shapes(bias=(3,)), 0.5), r"finds no matrix among the parameters \('bias'\)"),
        (lambda: uniform({"w": jnp.ones((2, 2), jnp.int32)}, 0.5, where="w"), r"'w' is int32"),
        (lambda: uniform(TREE, structure=NM(2, 5)), r"needs a multiple of 5 there, got 8"),
        (lambda: uniform(TREE, 0.5, structure=NM(2, 4)), r"2:4 sets the sparsity, 0.5"),
        (lambda: uniform(TREE, 0.5, structure=Block(3, 3)), r"3 x 3 do not divide the shape \(8, 6\)"),
        (lambda: uniform(TREE, 0.5, fixed={"l0": 1.0}), r"the sparsity of 'l0' must be"),
        (lambda: uniform(TREE, 0.5, fixed={"l0": 0.1, "l.": 0.2}), r"two patterns, the second is 'l.'"),
        (lambda: erk(TREE, 0.0), r"erk with sparsity 0 leaves every leaf dense"),
        (lambda: erk(TREE, 0.5, fixed={"l0": 0.5}), r"fixed= names every sparse leaf"),
        (lambda: erk(TREE, 0.5, power=-1.0), r"power must be 0 or more"),
        (lambda: erk(TREE, 0.5, structure=NM(2, 4)), r"same density everywhere"),
        (lambda: custom(TREE, {}), r"at least one pattern"),
        (lambda: custom(TREE, {"l0": 0.5, "l.*": 0.5}), r"'l0' is given a sparsity by two patterns"),
        (lambda: check_plan({}, TREE), r"the plan is empty"),
        (lambda: check_plan(PLAN, shapes(l1=(8, 6))), r"names 'l0', which the parameters do not have.*'l1'"),
        (lambda: check_plan(PLAN, shapes((8, 7))), r"'l0' with shape \(8, 6\), the parameters with \(8, 7\)"),
        (
            lambda: check_plan({"l0": LeafPlan((8, 6), 49)}, TREE),
            r"'l0' cannot have 49 links: between 1 and 48",
        ),
    ],
)
def test_bad_input_says_what_to_type(call, message):
    with pytest.raises(ValueError, match=message):
        call()
