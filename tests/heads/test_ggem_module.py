"""GGeM pooling: what its derivatives keep, meshes, the module, errors."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from odjax.core import leaves_with_paths
from odjax.heads.ggem import GGeM, ggem_pool

from .ggem_cases import VARIANTS, exponents, pool, signs, some_tokens, uniform


def kept_for_the_backward_pass(x, p, **options):
    """What the derivative at x and p holds on to and is no smaller than x."""
    pull = jax.eval_shape(lambda x, p: jax.vjp(functools.partial(ggem_pool, **options), x, p)[1], x, p)
    return [leaf for leaf in jax.tree.leaves(pull) if leaf.size >= x.size]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_backward_pass_keeps_the_tokens_and_no_powers(variant, dtype):
    x, p = jnp.ones((4, 256, 16), dtype), jnp.full(4, 3.0)
    (kept,) = kept_for_the_backward_pass(x, p, **variant)
    assert (kept.shape, kept.dtype) == (x.shape, x.dtype)
    _, pull = jax.vjp(functools.partial(ggem_pool, **variant), x, p)
    assert any(leaf is x for leaf in jax.tree.leaves(pull))


def test_the_compiled_forward_pass_hands_the_tokens_and_no_powers_to_the_backward_pass():
    x, p = jnp.ones((4, 256, 16)), jnp.full(4, 3.0)

    def naive(x, p):
        r = jnp.maximum(x, 1e-6)
        q = jnp.repeat(p, 4)
        return jnp.mean(r ** q[None, None], axis=-2) ** (1 / q)[None]

    def handed_over(f):
        compiled = jax.jit(lambda x, p: jax.vjp(f, x, p)).lower(x, p).compile()
        return compiled.memory_analysis().output_size_in_bytes / x.nbytes

    assert 1 <= handed_over(ggem_pool) < 1.1
    assert handed_over(naive) > 3

    # The derivative as a whole: one array of powers at a time.
    def temporary(f):
        loss = jax.grad(lambda x, p: jnp.sum(f(x, p) ** 2), (0, 1))
        return jax.jit(loss).lower(x, p).compile().memory_analysis().temp_size_in_bytes / x.nbytes

    assert temporary(ggem_pool) < temporary(naive) / 2


SHARDED = [
    pytest.param(variant, masked, checked, id=f"{variant}-{'mask' if masked else 'whole'}-{checked}")
    for variant, masked, checked in [
        (VARIANTS[0], False, True),
        (VARIANTS[0], False, False),
        (VARIANTS[0], True, True),
        (VARIANTS[0], True, False),
        (VARIANTS[1], True, True),
        (VARIANTS[2], True, True),
        (VARIANTS[2], True, False),
        (VARIANTS[3], True, True),
    ]
]


@pytest.mark.parametrize("variant, masked, checked", SHARDED)
def test_tokens_sharded_over_a_sequence_axis_pool_like_whole_ones(variant, masked, checked):
    mesh = jax.make_mesh((2, 4), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    x, p = signs(0, (4, 8, 8)), exponents(0, 4)
    # With two tokens a device, some devices have none that is kept.
    mask = some_tokens(0, (4, 8)) if masked else np.ones((4, 8), bool)
    mask[0, 2:] = not masked
    mask[0, 0] = True
    weights = signs(1, (4, 8))
    sharded = jax.shard_map(
        lambda x, p, mask: ggem_pool(x, p, mask=mask, axis_name="sequence", **variant),
        mesh=mesh,
        in_specs=(P("data", "sequence"), P(), P("data", "sequence")),
        out_specs=P("data"),
        check_vma=checked,
    )

    def run(f):
        loss = jax.value_and_grad(lambda x, p: jnp.sum(weights * f(x, p, mask)), (0, 1))
        return jax.jit(loss)(x, p)

    got = run(sharded)
    expected = run(lambda x, p, mask: ggem_pool(x, p, mask=mask, **variant))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got, expected)


def test_whole_groups_of_channels_on_a_device_need_no_collective():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    x, p, layout = signs(0, (4, 6, 8)), exponents(0, 4), NamedSharding(mesh, P("data", None, "tensor"))
    run = jax.jit(
        ggem_pool,
        in_shardings=(layout, NamedSharding(mesh, P())),
        out_shardings=NamedSharding(mesh, P("data", "tensor")),
    )
    program = run.lower(x, p).compile().as_text()
    for collective in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
        assert collective not in program
    np.testing.assert_allclose(run(x, p), pool(x, p), rtol=1e-6)


def test_the_module_is_the_function_with_a_parameter_p():
    x, mask = signs(0), some_tokens(0)
    module = GGeM(4, p_init=2.0, rectify="softplus")
    variables = module.init(jax.random.key(0), x)
    box = variables["params"]["p"]
    assert isinstance(box, nn.LogicallyPartitioned)
    assert box.names == (None,)
    np.testing.assert_array_equal(box.value, np.full(4, 2.0, np.float32))
    p = exponents(0, 4)
    got = jax.jit(module.apply)({"params": {"p": p}}, x, mask=mask, cls=x[:, 0])
    np.testing.assert_array_equal(got, pool(x, p, mask=mask, rectify="softplus"))


def test_fixed_exponents_are_no_parameters_and_tokens_still_get_gradients():
    x, module = signs(0), GGeM(4, p_init=2.0, learnable=False)
    assert not jax.tree.leaves(module.init(jax.random.key(0), x))
    p = np.full(4, 2.0, np.float32)
    np.testing.assert_array_equal(module.apply({}, x), pool(x, p))
    slope = jax.grad(lambda x: jnp.sum(jnp.sin(module.apply({}, x))))(x)
    np.testing.assert_array_equal(slope, jax.grad(lambda x: jnp.sum(jnp.sin(pool(x, p))))(x))


@pytest.mark.parametrize("start", [-1e6, -1.0, 0.0, 0.009])
def test_an_exponent_below_the_least_counts_as_the_least_and_comes_back(start):
    x, module = uniform(0), GGeM(2)
    run = jax.jit(lambda p: module.apply({"params": {"p": p}}, x))
    low = jnp.full(2, start)
    np.testing.assert_array_equal(run(low), run(jnp.full(2, 0.01)))
    slope = jax.jit(jax.grad(lambda p: -jnp.sum(module.apply({"params": {"p": p}}, x))))
    np.testing.assert_array_equal(slope(low), slope(jnp.full(2, 0.01)))
    assert (slope(low) < 0).all()  # descent raises them


def test_trained_exponents_find_those_that_made_the_targets():
    x, made = uniform(0, (16, 6, 8)), np.array([1.0, 6.0], np.float32)
    module, targets = GGeM(2), pool(x, made)

    @jax.jit
    def descend(p):
        def step(p, _):
            return p - 20.0 * jax.grad(
                lambda p: jnp.mean((module.apply({"params": {"p": p}}, x) - targets) ** 2)
            )(p), None

        return jax.lax.scan(step, p, length=300)[0]

    np.testing.assert_allclose(descend(jnp.full(2, 3.0)), made, rtol=1e-2)
    # Also from where all powers are the least one.
    np.testing.assert_allclose(descend(jnp.full(2, -0.5)), made, rtol=1e-2)


def test_the_result_has_the_dtype_of_the_module_and_parameters_stay_float32():
    x = jnp.asarray(signs(0), jnp.bfloat16)
    for dtype in (jnp.float32, jnp.bfloat16):
        module = GGeM(4, dtype=dtype)
        got, variables = module.init_with_output(jax.random.key(0), x)
        assert got.dtype == dtype
        assert {leaf.dtype for _, leaf in leaves_with_paths(variables)} == {jnp.dtype(jnp.float32)}
        wide = pool(x.astype(jnp.float32), np.full(4, 3.0, np.float32))
        np.testing.assert_array_equal(got, wide.astype(dtype))


X, P4 = np.ones((2, 3, 8), np.float32), np.full(4, 3.0, np.float32)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((X, np.ones(3, np.float32)), {}, ValueError, "8 channels are not a multiple of 3 groups"),
        (
            (X, np.float32(3)),
            {},
            ValueError,
            r"p must be floating point \[groups\], got float32 of shape \(\)",
        ),
        ((X, np.ones(4, np.int32)), {}, ValueError, r"got int32 of shape \(4,\): write jnp.full"),
        ((X, jnp.array([1.0, 0.0])), {}, ValueError, "exponents must be positive, got p = "),
        ((X, jnp.array([jnp.nan])), {}, ValueError, "exponents must be positive"),
        ((X[:, :0], P4), {}, ValueError, r"with N at least 1, got shape \(2, 0, 8\)"),
        ((X[0, 0], P4), {}, ValueError, r"tokens must be \[..., N, D\] with N at least 1, got shape \(8,\)"),
        ((X.astype(np.int32), P4), {}, TypeError, r"got int32: tokens.astype\(jnp.float32\)"),
        ((X, P4), {"eps": 0.0}, ValueError, r"eps must be positive .*, got 0.0: take eps=1e-6"),
        ((X, P4), {"eps": -1.0}, ValueError, "eps must be positive"),
        ((X, P4), {"rectify": "relu"}, ValueError, "one of clamp, softplus, shift, got 'relu'"),
        (
            (X, P4),
            {"rectify": "shift", "signed": True},
            ValueError,
            "needs rectify='clamp', got rectify='shift'",
        ),
        ((X, P4), {"mask": jnp.ones((2, 4), bool)}, ValueError, r"here \(2, 3\), got \(2, 4\)"),
        ((X, P4), {"mask": jnp.ones((2, 3))}, TypeError, "mask must be bool, got float32: .* mask != 0"),
        (
            (X, P4),
            {"mask": jnp.array([[True] * 3, [False] * 3])},
            ValueError,
            "mask has no token for 1 of 2 samples: leave those samples out",
        ),
    ],
)
def test_what_cannot_be_pooled_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ggem_pool(*arguments, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_groups": 0}, "num_groups must be at least 1, got 0"),
        ({"num_groups": 4, "p_init": 0.0}, "p_init must be positive and at least p_min 0.01, got 0.0"),
        ({"num_groups": 4, "p_init": -3.0}, "p_init must be positive"),
        ({"num_groups": 4, "p_min": 0.0}, "p_min must be positive, got 0.0"),
        ({"num_groups": 4, "eps": 0.0}, "eps must be positive"),
        ({"num_groups": 4, "rectify": "abs"}, "one of clamp, softplus, shift, got 'abs'"),
        ({"num_groups": 4, "rectify": "shift", "signed": True}, "needs rectify='clamp'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_at_construction(options, message):
    with pytest.raises(ValueError, match=message):
        GGeM(**options)


def test_channels_that_the_groups_do_not_divide_are_refused_by_the_module():
    with pytest.raises(ValueError, match="8 channels are not a multiple of 3 groups: take as many groups"):
        GGeM(3).init(jax.random.key(0), X)
