"""The mesh: sizes, axis rules, and what belongs to a parameter."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from odjax_train.errors import UserError
from odjax_train.mesh import (
    DEFAULT_RULES,
    MeshShape,
    _across,
    bytes_per_device,
    data_parallelism,
    like_parameters,
    make_mesh,
    parameter_shardings,
)


@given(sizes=st.tuples(*[st.integers(1, 5)] * 3), free=st.integers(0, 2))
def test_a_free_axis_takes_the_devices_that_are_left(sizes, free):
    devices = sizes[0] * sizes[1] * sizes[2]
    asked = [-1 if i == free else size for i, size in enumerate(sizes)]
    assert MeshShape(*asked).resolve(devices) == sizes
    assert MeshShape(*sizes).resolve(devices) == sizes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("3,1,1", r"mesh 3,1,1 \(data,fsdp,tensor\) needs 3 devices, there are 8"),
        ("3,-1,1", "needs a multiple of 3 devices, there are 8"),
        ("2,2", "three whole numbers"),
        ("a,b,c", "three whole numbers"),
        ("-1,-1,1", "at most one may be -1"),
        ("0,1,8", "sizes are positive"),
    ],
)
def test_a_mesh_that_does_not_fit_says_why(text, message):
    with pytest.raises(UserError, match=message):
        MeshShape.parse(text).resolve(8)


@pytest.mark.parametrize(("sizes", "parts"), [((8, 1, 1), 8), ((1, 8, 1), 8), ((2, 2, 2), 4), ((1, 1, 8), 1)])
def test_the_batch_is_cut_over_data_and_fsdp(sizes, parts):
    mesh = make_mesh(MeshShape(*sizes))
    assert data_parallelism(mesh) == parts
    assert tuple(mesh.shape.values()) == sizes


class _Layer(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        named = nn.with_logical_partitioning
        kernel = self.param(
            "kernel", named(nn.initializers.ones, ("embed", "mlp")), (x.shape[-1], self.width)
        )
        scale = self.param("scale", named(nn.initializers.ones, ("embed",)), (x.shape[-1],))
        return (x * scale[None]) @ kernel


def test_parameters_follow_the_rules_and_what_does_not_divide_stays_whole():
    mesh = make_mesh(MeshShape(2, 2, 2))
    for width, spec in ((6, P("fsdp", "tensor")), (5, P("fsdp", None))):
        boxed = jax.eval_shape(_Layer(width).init, jax.random.key(0), jnp.ones((1, 4)))
        found = parameter_shardings(boxed["params"], mesh, DEFAULT_RULES)
        assert found["kernel"].spec == spec
        assert found["scale"].spec == P("fsdp")


def test_optimizer_state_is_laid_out_like_the_parameter_it_belongs_to():
    mesh = make_mesh(MeshShape(2, 2, 2))
    boxed = jax.eval_shape(_Layer(6).init, jax.random.key(0), jnp.ones((1, 4)))["params"]
    params, shardings = nn.unbox(boxed), parameter_shardings(boxed, mesh, DEFAULT_RULES)
    for optimizer in (optax.adamw(1e-3), optax.chain(optax.clip(1.0), optax.sgd(1e-2, momentum=0.9))):
        state = jax.eval_shape(optimizer.init, params)
        found = like_parameters(state, params, shardings, mesh)
        moments = optax.tree.get_all_with_path(found, "mu") + optax.tree.get_all_with_path(found, "trace")
        assert len(moments) == 1
        for tree in moments:
            assert tree[1]["kernel"].spec == P("fsdp", "tensor")
        scalars = [
            s
            for s, leaf in zip(jax.tree.leaves(found), jax.tree.leaves(state), strict=True)
            if not leaf.shape
        ]
        assert all(s.spec == P() for s in scalars)


def test_state_of_another_size_keeps_the_axis_it_shares():
    mesh = make_mesh(MeshShape(2, 2, 2))
    params = {"layer": {"kernel": jax.ShapeDtypeStruct((4, 6), jnp.float32)}}
    shardings = {"layer": {"kernel": NamedSharding(mesh, P("fsdp", "tensor"))}}
    factors = {"moments": {"layer": {"kernel": jax.ShapeDtypeStruct((3, 6), jnp.float32)}}}
    found = like_parameters(factors, params, shardings, mesh)
    assert found["moments"]["layer"]["kernel"].spec == P(None, "tensor")


def test_bytes_on_a_device_are_those_of_its_shards():
    mesh = make_mesh(MeshShape(2, 2, 2))
    tree = {"a": jax.ShapeDtypeStruct((4, 6), jnp.float32), "b": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}
    shardings = {"a": NamedSharding(mesh, P("fsdp", "tensor")), "b": NamedSharding(mesh, P())}
    assert bytes_per_device(tree, shardings) == 4 * 6 * 4 // 4 + 3 * 2


def test_the_slow_network_is_crossed_by_data_or_else_by_fsdp():
    assert _across((8, 8, 1), 8) == (8, 1, 1)
    assert _across((1, 64, 1), 8) == (1, 8, 1)
    with pytest.raises(UserError, match="its data or its fsdp axis must be a multiple of the 8 slices"):
        _across((1, 4, 16), 8)
