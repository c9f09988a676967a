"""A head without trainable weights: its logits, its losses, and that nothing moves it."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from odjax.core import leaves_with_paths
from odjax.heads import Classifier, FixedHead, dot_regression_loss, etf_logits, keep_constant
from odjax.models import MLP, Decoder

KEY = jax.random.key(0)
D = 32
HEADS = {
    "slice": {"num_classes": 10},
    "rotated": {"num_classes": 10, "rotate": True},
    "helmert": {"num_classes": D + 1},
    "orthoplex": {"num_classes": 40},
    "rotated orthoplex": {"num_classes": 40, "rotate": True},
    "orthonormal": {"num_classes": 10, "kind": "orthonormal"},
    "hadamard": {"num_classes": 100},
    "sphere": {"num_classes": 64, "kind": "sphere"},
    "drawn": {"num_classes": 64, "kind": "sphere", "stored": False},
    "optimized": {"num_classes": 70, "kind": "optimized"},
    "batch norm": {"num_classes": 10, "norm": "bn+l2"},
    "bias": {"num_classes": 100, "norm": "none", "bias": True},
    "free length": {"num_classes": 100, "norm": "none", "scale": 2.0},
}


def batch(classes, seed=0):
    h, y = jax.random.split(jax.random.key(seed))
    return jax.random.normal(h, (6, D)), jax.random.randint(y, (6,), 0, classes)


def lenient(optimizer):
    def update(*args):
        with jax.numpy_dtype_promotion("standard"):
            return optimizer.update(*args)

    return optax.GradientTransformation(optimizer.init, update)


@pytest.mark.parametrize(
    "name, loss", [(name, loss) for name in HEADS for loss in ("ce", "dr") if (name, loss) != ("bias", "dr")]
)
def test_logits_and_losses_are_those_of_the_matrix(name, loss):
    head = FixedHead(loss=loss, **HEADS[name])
    h, labels = batch(head.num_classes)
    variables = nn.unbox(head.init(KEY, h))
    bias = jnp.zeros(())
    if head.bias:
        bias = jnp.sin(jnp.arange(head.num_classes, dtype=jnp.float32))[None]
        variables["params"]["bias"] = bias[0]
    logits = head.apply(variables, h)
    matrix = head.apply(variables, D, method="matrix")
    prepared = head.apply(variables, h, method="prepared")
    expected = etf_logits(prepared, matrix, head.inverse_temperature()) + bias
    assert logits.dtype == jnp.float32
    if name in ("slice", "batch norm") and loss == "ce":  # but for what all logits share
        np.testing.assert_allclose(
            logits - logits.mean(axis=1, keepdims=True),
            expected - expected.mean(axis=1, keepdims=True),
            atol=5e-6,
        )
    else:
        np.testing.assert_allclose(logits, expected, atol=5e-6)
    found = head.apply(variables, h, labels, method="losses")
    want = (
        optax.softmax_cross_entropy_with_integer_labels(expected, labels)
        if loss == "ce"
        else dot_regression_loss(prepared, labels, matrix)
    )
    np.testing.assert_allclose(found.loss, want, atol=5e-6)
    np.testing.assert_array_equal(found.correct, expected.argmax(axis=1) == labels)


@pytest.mark.parametrize("name", HEADS)
def test_the_gradient_of_the_losses_is_that_of_the_logits(name):
    head = FixedHead(**HEADS[name])
    h, labels = batch(head.num_classes)
    variables = head.init(KEY, h)

    def by_logits(h):
        return optax.softmax_cross_entropy_with_integer_labels(head.apply(variables, h), labels).sum()

    def by_losses(h):
        return head.apply(variables, h, labels, method="losses").loss.sum()

    np.testing.assert_allclose(jax.grad(by_losses)(h), jax.grad(by_logits)(h), atol=5e-6)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_has_no_parameters_but_those_of_a_batch_norm_and_a_bias_where_they_are_asked_for(name):
    head = FixedHead(**HEADS[name])
    shapes = nn.unbox(jax.eval_shape(head.init, KEY, jnp.ones((2, D))))
    paths = [path for path, _ in leaves_with_paths(shapes.get("params", {}))]
    assert paths == {"batch norm": ["batch_norm/bias", "batch_norm/scale"], "bias": ["bias"]}.get(name, [])
    stored = name in ("rotated", "rotated orthoplex", "sphere", "optimized")
    assert ("constants" in shapes) == stored


def test_the_code_is_the_same_for_every_key_of_init_and_another_for_another_seed():
    head = FixedHead(10, rotate=True)
    first, second = (head.init(jax.random.key(i), jnp.ones((1, D))) for i in (1, 2))
    jax.tree.map(np.testing.assert_array_equal, first, second)
    other = FixedHead(10, rotate=True, seed=1).init(KEY, jnp.ones((1, D)))
    assert not np.allclose(nn.unbox(other)["constants"]["code"], nn.unbox(first)["constants"]["code"])


def test_after_steps_with_weight_decay_the_code_is_bit_identical():
    x, labels = jax.random.normal(KEY, (8, 4)), jnp.arange(8) % 10
    model = Classifier(nn.Dense(D), FixedHead(10, rotate=True, loss="dr"))
    optimizer = lenient(optax.adamw(0.1, weight_decay=0.5))
    variables = nn.unbox(model.init(KEY, x))
    before = variables["params"]["backbone"]["kernel"]
    code = np.array(variables["constants"]["head"]["code"])

    def loss(params, constants):
        variables = {"params": params, "constants": constants}
        inputs = ((x,), labels)
        out, changed = model.apply(variables, *inputs, train=True, method="losses", mutable=["constants"])
        return out.loss.mean(), changed["constants"]

    @jax.jit
    def step(params, state, constants):
        gradient, constants = jax.grad(loss, has_aux=True)(params, constants)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, constants

    params, constants = variables["params"], variables["constants"]
    state = optimizer.init(params)
    for _ in range(5):
        params, state, constants = step(params, state, constants)
    assert not np.allclose(params["backbone"]["kernel"], before)
    np.testing.assert_array_equal(constants["head"]["code"], code)
    np.testing.assert_array_equal(
        np.asarray(jax.tree.leaves(jax.grad(loss, 1, has_aux=True)(params, constants)[0])[0]), 0
    )


def test_a_constant_in_somebody_elses_parameters_stays_where_it_is():
    params = {"head": {"code": jnp.ones((3, 2))}, "body": {"kernel": jnp.ones((2, 3))}}
    optimizer = lenient(keep_constant(optax.adamw(0.1, weight_decay=0.5), "head/code"))
    state = optimizer.init(params)
    for _ in range(3):
        updates, state = optimizer.update(jax.tree.map(jnp.ones_like, params), state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(params["head"]["code"], 1)
    assert float(params["body"]["kernel"].max()) < 0.9
    sizes = [leaf.shape for leaf in jax.tree.leaves(state)]
    assert (3, 2) not in sizes
    nnx_state = nnx.state(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
    optimizer = lenient(keep_constant(optax.sgd(1.0), "bias"))
    updates, _ = optimizer.update(
        jax.tree.map(jnp.ones_like, nnx_state), optimizer.init(nnx_state), nnx_state
    )
    np.testing.assert_array_equal(jax.tree.leaves(updates["bias"])[0], 0)
    np.testing.assert_array_equal(jax.tree.leaves(updates["kernel"])[0], -1)
    with pytest.raises(ValueError, match="no leaf|nothing|selects"):
        keep_constant(optax.sgd(1.0), "haed").init(params)


@given(st.sampled_from(["slice", "rotated", "hadamard", "sphere"]), st.sampled_from([2, 4, 8]))
def test_reserved_classes_take_part_in_training_alone(name, some):
    options = HEADS[name]
    full, head = FixedHead(**options), FixedHead(eval_classes=some, **options)
    h, labels = batch(some)
    variables = full.init(KEY, h)
    whole = full.apply(variables, h)
    np.testing.assert_array_equal(head.apply(variables, h, train=True), whole)
    np.testing.assert_allclose(head.apply(variables, h), whole[:, :some], atol=2e-6)
    found = head.apply(variables, h, labels, method="losses")
    np.testing.assert_array_equal(found.correct, whole[:, :some].argmax(axis=1) == labels)


@pytest.mark.parametrize("options", [{}, {"rotate": True}, {"kind": "hadamard"}, {"bias": True}], ids=str)
@pytest.mark.parametrize("fixed", [True, (2.0, 1.0, 0.5, 3.0)], ids=["batch", "given"])
def test_lengths_multiply_the_vectors_in_the_losses_of_training_alone(options, fixed):
    h, labels = batch(4)[0], jnp.array([0, 0, 0, 0, 1, 2])
    lengths = jnp.array([0.5, 2.0, 2.0, 1.0]) ** 0.5 if fixed is True else jnp.array(fixed)  # gamma = 6 / 3
    for loss in ("ce",) if options.get("bias") else ("ce", "dr"):
        head = FixedHead(4, loss=loss, lengths=fixed, **options)
        variables = nn.unbox(head.init(KEY, h))
        bias = jnp.zeros(4)
        if head.bias:
            variables["params"]["bias"] = bias = jnp.array([1.0, -1.0, 0.5, 0.0])
        unit = head.apply(variables, h, method="prepared")
        code = head.apply(variables, D, method="matrix")
        scaled = etf_logits(unit, code * lengths[None], head.inverse_temperature()) + bias[None]
        want = (
            optax.softmax_cross_entropy_with_integer_labels(scaled, labels)
            if loss == "ce"
            else dot_regression_loss(unit, labels, code, lengths)
        )
        found = head.apply(variables, h, labels, train=True, method="losses")
        np.testing.assert_allclose(found.loss, want, rtol=2e-5, atol=1e-6)
        plain = FixedHead(4, loss=loss, **options)
        judged, same = (m.apply(variables, h, labels, method="losses") for m in (head, plain))
        jax.tree.map(np.testing.assert_array_equal, judged, same)
        np.testing.assert_array_equal(found.correct, judged.correct)  # prediction has vectors of one length


@pytest.mark.parametrize("name", ["slice", "rotated", "hadamard"])
def test_a_traced_label_that_is_no_class_never_makes_a_loss_infinite(name):
    head = FixedHead(eval_classes=8, **HEADS[name])
    h, _ = batch(8)
    variables = head.init(KEY, h)
    labels = jnp.array([0, 7, 8, -1, head.num_classes, 3])
    found = jax.jit(lambda h, y: head.apply(variables, h, y, method="losses"))(h, labels)
    logits = head.apply(variables, h)
    np.testing.assert_allclose(found.loss[2:5], jax.nn.logsumexp(logits, axis=1)[2:5], rtol=1e-5)
    np.testing.assert_array_equal(found.correct[2:5], False)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 8\), got"):
        head.apply(variables, h, labels, method="losses")


def test_a_dot_regression_training_step_moves_features_to_their_vertices():
    x, labels = jax.random.normal(KEY, (16, 8)), jnp.arange(16) % 4
    model = Classifier(MLP((32, D)), FixedHead(4, loss="dr"))
    params = nn.unbox(model.init(KEY, x))["params"]
    optimizer = lenient(optax.adam(1e-2))

    def loss(params):
        return model.apply({"params": params}, (x,), labels, train=True, method="losses").loss.mean()

    @jax.jit
    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return (optax.apply_updates(params, updates), state), value

    (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), None, length=200)
    assert losses[-1] < 1e-2 * losses[0]
    cosines = model.apply({"params": params}, x)
    np.testing.assert_array_equal(cosines.argmax(axis=1), labels)
    np.testing.assert_allclose(cosines[jnp.arange(16), labels], 1, atol=0.05)


SMALL = {"vocab": 100, "layers": 1, "width": D, "heads": 2, "mlp_width": 24, "max_length": 8}


def test_a_decoder_takes_a_fixed_head_and_its_losses_are_those_of_its_logits():
    tokens = jnp.arange(16, dtype=jnp.int32).reshape(2, 8)
    targets = (tokens + 1) % 100
    model = Decoder(**SMALL, head=FixedHead(100, norm="none", chunk=16))
    variables = model.init(KEY, tokens)
    assert [path for path, _ in leaves_with_paths(variables["params"]) if "head" in path] == []
    logits = model.apply(variables, tokens)
    assert logits.shape == (2, 8, 100)
    found = model.apply(variables, (tokens, None, None), targets, method="losses")
    np.testing.assert_allclose(
        found.loss, optax.softmax_cross_entropy_with_integer_labels(logits, targets), atol=2e-6
    )
    with pytest.raises(ValueError, match="without losses of its own .None.: use the logits"):
        Decoder(**SMALL).apply(variables, (tokens, None, None), targets, method="losses")
    with pytest.raises(ValueError, match="either tied=True or head="):
        Decoder(**SMALL, tied=True, head=FixedHead(100))


def test_eight_devices_give_the_losses_of_one_through_the_rules_of_the_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    head = FixedHead(100, norm="none", chunk=8)
    h, labels = batch(100)

    def total(h):
        return head.apply({}, h, labels, method="losses").loss.sum()

    expected = jax.value_and_grad(total)(h)
    with jax.set_mesh(mesh), nn.logical_axis_rules([("act_vocab", "tensor")]):
        program = jax.jit(jax.value_and_grad(total)).lower(h).compile()
        found = program(h)
    assert "all-reduce" in program.as_text()
    assert "all-gather" not in program.as_text()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, expected)


def test_float64_features_stay_float64_in_every_code():
    with jax.enable_x64(True):
        for name in ("slice", "rotated", "hadamard", "sphere"):
            head = FixedHead(dtype=jnp.bfloat16, **HEADS[name])
            h = jax.random.normal(KEY, (3, D), jnp.float64)
            variables = head.init(KEY, h)
            logits = head.apply(variables, h)
            assert logits.dtype == jnp.float64
            matrix = np.asarray(head.apply(variables, D, method="matrix"), np.float64)
            unit = np.asarray(h) / np.linalg.norm(h, axis=1, keepdims=True)
            want = head.inverse_temperature() * unit @ matrix
            centred = [x - np.mean(x, axis=1, keepdims=True) for x in (np.asarray(logits), want)]
            np.testing.assert_allclose(*centred, atol=1e-6)  # the code is float32


def test_a_missing_collection_is_named():
    with pytest.raises(
        ValueError, match="collection 'constants', which is missing: apply with all that init"
    ):
        FixedHead(**HEADS["sphere"]).apply({}, jnp.ones((1, D)))


def test_bfloat16_products_keep_float32_logits_close():
    for name in ("rotated", "hadamard"):
        head = FixedHead(dtype=jnp.bfloat16, **HEADS[name])
        h, _ = batch(head.num_classes)
        variables = head.init(KEY, h)
        low, wide = head.apply(variables, h), FixedHead(**HEADS[name]).apply(variables, h)
        assert low.dtype == jnp.float32
        # Features and the code are rounded to 2^-9; sums are not.
        assert float(jnp.abs(low - wide).max()) < 2**-7 * head.inverse_temperature()
        assert np.mean(low != low.astype(jnp.bfloat16).astype(jnp.float32)) > 0.9


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"num_classes": 1}, ValueError, "at least 2 classes"),
        ({"num_classes": 10.0}, TypeError, "num_classes must be a whole number, got 10.0"),
        ({"loss": "mse"}, ValueError, "loss must be one of ce, dr, got 'mse'"),
        ({"eval_classes": 5.0}, TypeError, "eval_classes must be a whole number, got 5.0"),
        ({"chunk": 5.5}, TypeError, "chunk must be a whole number, got 5.5"),
        ({"seed": "a"}, TypeError, "seed must be a whole number, got 'a'"),
        ({"scale": "3"}, ValueError, "scale must be a positive number, got '3'"),
        ({"lengths": (1.0, 2.0)}, ValueError, "lengths must be 10 numbers, got 2"),
        ({"weight": -1.0}, ValueError, "weight must be positive and norm_penalty not negative"),
        ({"bias": True, "loss": "dr"}, ValueError, "a bias is for loss='ce'"),
        ({"norm": "bn"}, ValueError, r"norm must be one of l2, bn\+l2, none, got 'bn'"),
        ({"kind": "etf"}, ValueError, "kind must be auto or one of .*, got 'etf'"),
        ({"scale": 0.0}, ValueError, "scale must be a positive number, got 0"),
        ({"scale": -2.0}, ValueError, "scale must be a positive number, got -2"),
        ({"scale": 2.0, "probability": 0.9}, ValueError, "not both"),
        ({"probability": 1.0}, ValueError, "between 1/10 and 1, got 1.0"),
        ({"eval_classes": 11}, ValueError, "between 2 and num_classes 10, got 11"),
        ({"collection": "params"}, ValueError, "a fixed code is not to be trained: .*keep_constant"),
        ({"chunk": 0}, ValueError, "chunk must be at least 1, got 0"),
    ],
    ids=str,
)
def test_settings_that_do_not_fit_are_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        FixedHead(**{"num_classes": 10, **options})


@pytest.mark.parametrize(
    "head, message",
    [
        (FixedHead(34, kind="simplex"), "needs at least 33 dimensions, got 32"),
        (FixedHead(70, kind="orthoplex"), "has 64 vectors, got 70"),
        (FixedHead(10, rotate=True, stored=False), "made together, and must be stored"),
    ],
    ids=range(3),
)
def test_features_that_the_code_does_not_fit_are_refused_when_it_is_called(head, message):
    with pytest.raises(ValueError, match=message):
        head.init(KEY, jnp.ones((2, D)))


def test_labels_are_checked_where_they_are_known():
    head = FixedHead(10)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 10\), got 10"):
        head.apply({}, jnp.ones((1, D)), jnp.array([10]), method="losses")
    with pytest.raises(TypeError, match="labels must be integers"):
        head.apply({}, jnp.ones((1, D)), jnp.array([1.0]), method="losses")
    with pytest.raises(TypeError, match="features must be floating point, got int32"):
        head.apply({}, jnp.ones((1, D), int))


def test_a_classifier_hands_train_on_to_those_who_take_it():
    x = jax.random.normal(KEY, (4, 8))
    model = Classifier(MLP((16, D), dropout=0.5), FixedHead(10, norm="bn+l2"))
    variables = model.init(KEY, x)
    quiet = model.apply(variables, x)
    loud, changed = model.apply(variables, x, train=True, rngs={"dropout": KEY}, mutable=["batch_stats"])
    assert not np.allclose(quiet, loud)
    assert not np.allclose(jax.tree.leaves(changed)[0], jax.tree.leaves(variables["batch_stats"])[0])
    learned = Classifier(MLP((16, D)), nn.Dense(3))
    variables = learned.init(KEY, x)
    logits = learned.apply(variables, x)
    found = learned.apply(variables, x, jnp.array([0, 1, 2, 0]), method="losses")
    np.testing.assert_allclose(
        found.loss,
        optax.softmax_cross_entropy_with_integer_labels(logits, jnp.array([0, 1, 2, 0])),
        atol=1e-6,
    )
    np.testing.assert_array_equal(
        learned.apply(variables, x, method="seen"), learned.apply(variables, x, method="features")
    )
