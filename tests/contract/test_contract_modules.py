"""What every module keeps: named axes, float32 parameters, a gradient that reaches every one of them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from odjax.core.paths import leaves_with_paths

from .contract_rows import rows

ALL = rows("module")


@pytest.fixture(scope="module", params=ALL, ids=[row.id for row in ALL])
def made(request):
    module, arguments = request.param.build()
    variables = jax.jit(module.init)(jax.random.key(0), *arguments)
    return module, arguments, variables


def away_from_zero(variables):
    """Parameters that start at zero (a head, a scale) hide what is behind them: all are moved a little."""
    leaves, structure = jax.tree.flatten(variables)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [p + 0.05 * jax.random.normal(k, p.shape, p.dtype) for p, k in zip(leaves, keys, strict=True)]
    return structure.unflatten(moved)


def test_init_works_on_shapes_alone(made):
    module, arguments, variables = made
    shapes = jax.eval_shape(module.init, jax.random.key(0), *jax.eval_shape(lambda: arguments))
    assert jax.tree.structure(shapes) == jax.tree.structure(variables)
    for want, got in zip(jax.tree.leaves(shapes), jax.tree.leaves(variables), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)


def test_every_parameter_is_float32_and_carries_logical_axis_names_of_its_rank(made):
    _, _, variables = made
    boxes = jax.tree.leaves(variables["params"], is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    assert boxes
    for box in boxes:
        assert isinstance(box, nn.LogicallyPartitioned), f"a parameter of shape {box.shape} has no axis names"
        assert len(box.names) == box.value.ndim, f"{box.names} for {box.value.shape}"
        assert box.value.dtype == jnp.float32


def test_nothing_is_nan_at_the_start_and_jit_keeps_shape_and_dtype(made):
    module, arguments, variables = made
    output = jax.jit(module.apply)(variables, *arguments)
    shapes = jax.eval_shape(module.apply, variables, *arguments)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), output) == jax.tree.map(
        lambda x: (x.shape, x.dtype), shapes
    )
    for leaf in [*jax.tree.leaves(output), *jax.tree.leaves(variables)]:
        assert bool(jnp.isfinite(leaf).all())


def test_the_gradient_reaches_every_parameter(made):
    module, arguments, variables = made

    def loss(params):
        outputs = jax.tree.leaves(module.apply({**variables, "params": params}, *arguments))
        return sum(
            jnp.sum(jnp.sin(3 * o + jnp.arange(o.size, dtype=o.dtype).reshape(o.shape))) for o in outputs
        )

    moved = away_from_zero(variables)["params"]
    for path, gradient in leaves_with_paths(jax.jit(jax.grad(loss))(moved)):
        assert bool(jnp.isfinite(gradient).all()), path
        assert float(jnp.abs(gradient).max()) > 0, f"no gradient reaches {path}"


def test_bfloat16_compute_keeps_float32_parameters_and_is_close(made):
    module, arguments, variables = made
    narrow = module.clone(dtype=jnp.bfloat16)
    shapes = jax.eval_shape(narrow.init, jax.random.key(0), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes["params"])} == {jnp.dtype(jnp.float32)}
    variables = away_from_zero(variables)
    wide, low = (jax.tree.leaves(jax.jit(m.apply)(variables, *arguments))[0] for m in (module, narrow))
    scale = float(jnp.abs(wide).max())
    # bfloat16 keeps 8 bits: 2^-8 a rounding, a few dozen of them in sequence through two layers.
    assert float(jnp.abs(wide - low.astype(jnp.float32)).max()) < 24 * 2**-8 * scale
