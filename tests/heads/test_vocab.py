"""Cross-entropy of codes that are never stored, on one device and on eight."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.heads.codes import ClassCode
from odjax.heads.vocab import code_cross_entropy

KEY = jax.random.key(5)
CODES = [
    ClassCode(256, 64, "hadamard"),
    ClassCode(96, 32, "hadamard"),
    ClassCode(10, 16, "hadamard"),
    ClassCode(48, 16, "sphere"),
    ClassCode(16, 32, "simplex", None),
]
codes = st.sampled_from(CODES)


def batch(code, seed=0, shape=(2, 4)):
    h, y, w = jax.random.split(jax.random.key(seed), 3)
    features = 3 * jax.random.normal(h, (*shape, code.dim))
    return features, jax.random.randint(y, shape, 0, code.num_classes), jax.random.uniform(w, shape)


def mesh_of(shards):
    return jax.make_mesh(
        (8 // shards, shards), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )


@functools.cache
def weighted(code, **options):
    def total(h, y, w):
        return jnp.sum(w * code_cross_entropy(h, y, code, scale=1.5, **options).loss)

    return jax.jit(jax.value_and_grad(total))


@given(st.sampled_from([CODES[0], CODES[3]]), st.sampled_from([8, 8192]), st.sampled_from([1, 8]))
def test_a_bias_and_its_gradient_are_those_of_the_logits(code, chunk, shards):
    h, labels, weights = batch(code)
    bias = jax.random.normal(jax.random.key(9), (code.num_classes,))
    with jax.set_mesh(mesh_of(shards)):
        loss, gradients = with_bias(code, chunk, "tensor" if shards > 1 else None)(h, bias, labels, weights)
    expected, their_gradients = with_bias(code, None, None)(h, bias, labels, weights)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-6), gradients, their_gradients)


@functools.cache
def with_bias(code, chunk, axis):
    def total(h, bias, y, w):
        if chunk is None:
            logits = 1.5 * jnp.matmul(h, code.matrix(), precision="highest") + bias[None, None]
            return jnp.sum(w * optax.softmax_cross_entropy_with_integer_labels(logits, y))
        found = code_cross_entropy(h, y, code, bias=bias, scale=1.5, chunk=chunk, axis=axis)
        return jnp.sum(w * found.loss)

    return jax.jit(jax.value_and_grad(total, (0, 1)))


@functools.cache
def reference(code):
    matrix = code.matrix()

    def total(h, y, w):
        logits = 1.5 * jnp.matmul(h, matrix, precision="highest")
        return jnp.sum(w * optax.softmax_cross_entropy_with_integer_labels(logits, y))

    return jax.jit(jax.value_and_grad(total))


@given(codes, st.sampled_from([8, 40, 8192]), st.integers(0, 9))
def test_loss_and_gradient_are_those_of_the_logits(code, chunk, seed):
    arguments = batch(code, seed)
    loss, gradient = weighted(code, chunk=chunk)(*arguments)
    expected, its_gradient = reference(code)(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, its_gradient, atol=2e-6)


@pytest.mark.parametrize(
    "code, shards", [(c, s) for c in CODES for s in (2, 8) if c.num_classes % s == 0], ids=str
)
def test_shards_that_divide_the_classes_give_the_loss_and_gradient_of_one_device(code, shards):
    arguments = batch(code)
    with jax.set_mesh(mesh_of(shards)):
        loss, gradient = weighted(code, chunk=8, axis="tensor")(*arguments)
    expected, its_gradient = weighted(code)(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, its_gradient, atol=2e-6)


@functools.cache
def correct(code, chunk):
    return jax.jit(lambda h, y: code_cross_entropy(h, y, code, chunk=chunk).correct)


@given(codes, st.sampled_from([8, 8192]))
def test_a_token_is_correct_when_its_target_is_the_first_largest(code, chunk):
    features, labels, _ = batch(code)
    logits = features @ code.matrix()
    found = correct(code, chunk)
    np.testing.assert_array_equal(found(features, jnp.argmax(logits, -1)), True)
    np.testing.assert_array_equal(found(features, labels), jnp.argmax(logits, -1) == labels)
    np.testing.assert_array_equal(found(0 * features, 0 * labels), True)  # all are equal: the first
    np.testing.assert_array_equal(found(0 * features, 0 * labels + 1), False)


def test_the_first_of_equal_logits_is_the_answer_across_shards_too():
    code = CODES[0]
    with jax.set_mesh(mesh_of(4)):
        run = jax.jit(lambda h, y: code_cross_entropy(h, y, code, axis="tensor").correct)
        np.testing.assert_array_equal(run(jnp.zeros((2, 64)), jnp.array([0, 200])), [True, False])


def test_float64_features_give_the_loss_to_twelve_digits():
    with jax.enable_x64(True):
        code = ClassCode(96, 32, "hadamard")
        h = 3 * jax.random.normal(KEY, (5, 32), jnp.float64)
        y = jnp.arange(5)
        logits = np.asarray(h) @ np.sign(np.asarray(code.matrix(), np.float64)) / np.sqrt(32)
        top = logits.max(-1)
        expected = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(5), np.arange(5)]
        np.testing.assert_allclose(code_cross_entropy(h, y, code, chunk=8).loss, expected, rtol=1e-12)


@pytest.mark.parametrize("dim, classes", [(1024, 1100), (64, 100)])
def test_the_products_of_a_tpu_give_the_loss_and_gradient_to_bfloat16(monkeypatch, dim, classes):
    code = ClassCode(classes, dim, "hadamard")
    h, y, w = batch(code, shape=(4,))
    expected, its_gradient = reference(code)(h, y, w)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *arrays, tpu, default: tpu(*arrays))

    def total(h):
        return jnp.sum(w * code_cross_entropy(h, y, code, scale=1.5, chunk=512).loss)

    loss, gradient = jax.value_and_grad(total)(h.astype(jnp.bfloat16))
    np.testing.assert_allclose(loss, expected, rtol=2**-8)
    scale = float(jnp.abs(its_gradient).max())
    np.testing.assert_allclose(gradient.astype(jnp.float32), its_gradient, atol=4 * 2**-8 * scale)


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_a_number_of_classes_that_no_power_of_two_divides_is_as_good(shards):
    code = ClassCode(1004, 64, "hadamard")  # a shard begins inside a group of classes
    arguments = batch(code)
    with jax.set_mesh(mesh_of(shards)):
        loss, gradient = weighted(code, chunk=128, axis="tensor")(*arguments)
    expected, its_gradient = reference(code)(*arguments)
    np.testing.assert_allclose(loss, expected, rtol=2e-6)
    np.testing.assert_allclose(gradient, its_gradient, atol=2e-6)


@pytest.mark.parametrize("code", [ClassCode(1004, 64, "hadamard"), CODES[3]], ids=str)
def test_a_traced_label_that_is_no_class_has_the_log_sum_exp_and_is_never_correct(code):
    h, labels, weights = batch(code, shape=(4,))
    weights = weights.at[:2].set(0)
    outside = labels.at[0].set(-1).at[1].set(code.num_classes)
    loss = jax.jit(lambda h, y: code_cross_entropy(h, y, code, chunk=256))
    found = loss(h, outside)
    np.testing.assert_allclose(found.loss[:2], jax.nn.logsumexp(h @ code.matrix(), axis=-1)[:2], rtol=1e-5)
    np.testing.assert_array_equal(found.correct[:2], False)
    masked = jax.jit(jax.value_and_grad(lambda h, y: jnp.sum(weights * loss(h, y).loss)))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), masked(h, outside), masked(h, labels)
    )


def test_large_features_do_not_overflow():
    code = CODES[0]
    value, gradient = jax.value_and_grad(
        lambda h: code_cross_entropy(h, jnp.array([3]), code, chunk=16).loss[0]
    )(jnp.full((1, 64), 1e30))
    assert bool(jnp.isfinite(value))
    assert bool(jnp.isfinite(gradient).all())


def test_no_array_of_tokens_times_classes_nor_of_the_code_is_made():
    code = ClassCode(4096, 64, "hadamard")
    h = jax.ShapeDtypeStruct((128, 64), jnp.float32)
    y = jax.ShapeDtypeStruct((128,), jnp.int32)
    step = jax.jit(jax.grad(lambda h, y: jnp.sum(code_cross_entropy(h, y, code, chunk=256).loss)))
    program = step.lower(h, y).compile()
    # A chunk of logits and its gradient, a few times; the logits alone would be 2 MB, the code 1 MB.
    assert program.memory_analysis().temp_size_in_bytes < 6 * 128 * 256 * 4
    elements = [
        np.prod([int(n) for n in s.split(",")]) for s in re.findall(r"f32\[([\d,]+)\]", program.as_text())
    ]
    assert max(elements) <= 128 * 256


@pytest.mark.parametrize("kind", ["hadamard", "sphere"])
def test_nothing_is_gathered_over_the_mesh_and_only_sums_of_a_token_cross_it(kind):
    code, mesh = ClassCode(512, 64, kind), mesh_of(4)
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    h = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=rows)
    y = jax.ShapeDtypeStruct((16,), jnp.int32, sharding=rows)

    def total(h, y):
        return jnp.sum(code_cross_entropy(h, y, code, mesh=mesh, axis="tensor", chunk=64).loss)

    text = jax.jit(jax.grad(total)).lower(h, y).compile().as_text()
    for word in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert word not in text
    shapes = re.findall(r"= (.*?) all-reduce(?:-start)?\(", text)
    elements = [
        np.prod([int(n) for n in s.split(",")]) for each in shapes for s in re.findall(r"\[([\d,]+)\]", each)
    ]
    assert shapes
    assert max(elements) == 8 * 64


@pytest.mark.parametrize(
    "options, labels, error, message",
    [
        ({}, [0, 96], ValueError, r"labels must be in \[0, 96\), got 96"),
        ({}, [-1, 0], ValueError, r"labels must be in \[0, 96\), got -1"),
        ({}, [0.0, 1.0], TypeError, "labels must be integers, got float32"),
        ({}, [0], ValueError, r"differ: \(2, 32\), \(1,\)"),
        ({"bias": jnp.zeros(95)}, [0, 1], ValueError, r"bias must be \[96\], .* shape \(95,\)"),
        (
            {"features": jnp.ones((2, 32), int)},
            [0, 1],
            TypeError,
            "features must be floating point, got int32",
        ),
        ({"scale": 0.0}, [0, 1], ValueError, "scale must be a positive number, got 0"),
        ({"scale": float("nan")}, [0, 1], ValueError, "scale must be a positive number, got nan"),
        ({"chunk": 0}, [0, 1], ValueError, "chunk must be at least 1, got 0"),
        ({"axis": "tensor"}, [0, 1], ValueError, "no axis 'tensor' .no mesh is in force"),
        ({"code": ClassCode(96, 16, "sphere")}, [0, 1], ValueError, r"must be \[..., 16\]"),
        ({"code": ClassCode(8, 32, "simplex", 0)}, [0, 1], ValueError, "made together"),
    ],
    ids=str,
)
def test_bad_input_is_named(options, labels, error, message):
    options = {"code": ClassCode(96, 32, "hadamard"), **options}
    features = options.pop("features", jnp.ones((2, 32)))
    with pytest.raises(error, match=message):
        code_cross_entropy(features, jnp.array(labels), options.pop("code"), **options)


def test_shards_that_do_not_divide_the_classes_are_refused():
    mesh = mesh_of(8)
    with pytest.raises(ValueError, match="the 8 shards of axis 'tensor' do not divide 10 classes"):
        code_cross_entropy(jnp.ones((2, 16)), jnp.array([0, 1]), CODES[2], mesh=mesh, axis="tensor")
    with pytest.raises(ValueError, match="no axis 'model' .it has 'data', 'tensor'"):
        code_cross_entropy(jnp.ones((2, 16)), jnp.array([0, 1]), CODES[2], mesh=mesh, axis="model")
