"""Recalibration inside the layers of ViT and BERT: the identity at the start, its place, what is trained."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.core import combine, leaves_with_paths, partition
from odjax.heads.recalibration import PSRP
from odjax.models import unstack_layers
from odjax.models.bert import BertLayer, bert
from odjax.models.vit import ViTLayer, vit

RANK2 = functools.partial(PSRP, rank=2)
IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 1)), jnp.float32)
TOKENS = jnp.asarray([[3, 1, 4, 1], [5, 9, 2, 6]], jnp.int32)
MASK = jnp.asarray([[1, 1, 1, 1], [1, 1, 1, 0]], jnp.int32)
SMALL = {"layers": 2, "width": 8, "heads": 2, "mlp_width": 12, "classes": 3}


def small_vit(**options):
    return vit("tiny-digits", **{**SMALL, "image": (4, 4), "layer_scale": 0.5, **options}), (IMAGES,)


def small_bert(**options):
    return bert("tiny", **{**SMALL, "vocab": 16, "max_length": 4, **options}), (TOKENS, MASK)


MODELS = pytest.mark.parametrize("make", [small_vit, small_bert])


def moved(model, inputs, seed=1):
    """Parameters away from their start, so that nothing is hidden by a zero."""
    shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
    noise = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(0.3 + 0.3 * noise.normal(size=p.shape), p.dtype), shapes)


def with_start(params, model, inputs):
    """The parameters of a model without recalibration, and the psrp of a new model with it."""
    fresh = nn.unbox(jax.jit(model.init)(jax.random.key(0), *inputs))["params"]
    added, _ = partition(fresh, ".*psrp.*")
    _, kept = partition(fresh, ".*psrp.*")
    old = dict(leaves_with_paths(params))
    assert set(old) == {path for path, _ in leaves_with_paths(kept)}
    kept = jax.tree.unflatten(jax.tree.structure(kept), [old[path] for path, _ in leaves_with_paths(kept)])
    return combine(added, kept)


@pytest.mark.parametrize("options", [{}, {"dtype": jnp.bfloat16}, {"scan": False}], ids=str)
@MODELS
def test_a_model_with_new_recalibration_gives_the_same_bits(make, options):
    plain, inputs = make(**options)
    recalibrated, _ = make(**options, recalibration=RANK2)
    params = moved(plain, inputs)
    both = with_start(params, recalibrated, inputs)
    want = jax.jit(plain.apply)({"params": params}, *inputs)
    np.testing.assert_array_equal(jax.jit(recalibrated.apply)({"params": both}, *inputs), want)


@MODELS
def test_recalibration_adds_nothing_but_its_matrices_in_every_layer(make):
    def shapes(**options):
        model, inputs = make(**options)
        params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), *inputs))["params"]
        return {path: leaf.shape for path, leaf in leaves_with_paths(params)}

    plain, recalibrated = shapes(), shapes(recalibration=RANK2)
    added = {path: shape for path, shape in recalibrated.items() if path not in plain}
    assert added == {
        "layers/psrp/down/kernel": (2, 8, 2),
        "layers/psrp/scale/kernel": (2, 2, 8),
        "layers/psrp/shift/kernel": (2, 2, 8),
    }
    assert {path: shape for path, shape in recalibrated.items() if path in plain} == plain


LAYER = {
    "heads": 2,
    "mlp_width": 12,
    "activation": "gelu",
    "dropout": 0.0,
    "norm_eps": 1e-6,
    "attention": None,
}
LAYER |= {"train": False, "dtype": jnp.float32, "param_dtype": jnp.float32, "recalibration": RANK2}


def layer_norm(params, x):
    return nn.LayerNorm(1e-6, use_fast_variance=False).apply({"params": params}, x)


def observed(layer, *inputs):
    """Parameters away from their start, the layer's output and the outputs of its parts, by name."""
    params = moved(layer, inputs)
    output, state = layer.apply(
        {"params": params}, *inputs, capture_intermediates=True, mutable=["intermediates"]
    )
    parts = {name: tree["__call__"][0] for name, tree in state["intermediates"].items() if name != "__call__"}
    return params, output, parts


def test_vit_reads_the_stream_after_attention_and_before_the_norm():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 8)), jnp.float32)
    layer = ViTLayer(**LAYER, layer_scale=0.5, drop_path=False)
    params, output, parts = observed(layer, x, jnp.float32(0))
    middle = x + params["attn_scale"][None, None] * parts["attn"]
    scale, shift = PSRP(rank=2).apply({"params": params["psrp"]}, middle)
    residual = params["mlp_scale"][None, None] * parts["mlp"]
    np.testing.assert_allclose(output, middle + shift + (1 + scale) * residual, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(
        parts["mlp_norm"], layer_norm(params["mlp_norm"], middle), rtol=1e-4, atol=1e-5
    )


def test_bert_recalibrates_between_its_two_norms():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(2, 3, 8)), jnp.float32)
    params, output, parts = observed(BertLayer(**LAYER), x, None)
    middle = parts["attn_norm"]
    scale, shift = PSRP(rank=2).apply({"params": params["psrp"]}, middle)
    want = layer_norm(params["mlp_norm"], middle + shift + (1 + scale) * parts["mlp"])
    np.testing.assert_allclose(output, want, rtol=1e-4, atol=1e-5)


def values(model, params, inputs):
    """Logits, and the gradient of a function of them by the recalibration and the head alone."""
    trained, frozen = partition(params, ".*(psrp|head).*")

    def loss(trained):
        logits = model.apply({"params": combine(trained, frozen)}, *inputs)
        return jnp.sum(jnp.sin(logits)), logits

    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(trained)
    return logits, gradient


@MODELS
def test_recalibration_and_head_are_trained_alone(make):
    model, inputs = make(recalibration=RANK2)
    _, gradient = values(model, moved(model, inputs), inputs)
    paths = [path for path, leaf in leaves_with_paths(gradient) if np.any(leaf)]
    assert paths == [
        "head/bias",
        "head/kernel",
        "layers/psrp/down/kernel",
        "layers/psrp/scale/kernel",
        "layers/psrp/shift/kernel",
    ]


@pytest.mark.parametrize("options", [{"remat": "full"}, {"remat": "dots", "scan": False}], ids=str)
@MODELS
def test_scanned_unrolled_and_rematerialized_layers_compute_the_same(make, options):
    model, inputs = make(recalibration=RANK2)
    params = moved(model, inputs)
    logits, gradient = values(model, params, inputs)
    other, _ = make(recalibration=RANK2, **options)
    unrolled = not options.get("scan", True)
    got, got_gradient = values(other, unstack_layers(params) if unrolled else params, inputs)
    np.testing.assert_allclose(got, logits, rtol=1e-4, atol=1e-5)
    expected = dict(leaves_with_paths(unstack_layers(gradient) if unrolled else gradient))
    for path, leaf in leaves_with_paths(got_gradient):
        np.testing.assert_allclose(leaf, expected[path], rtol=1e-3, atol=1e-4, err_msg=path)


@MODELS
def test_parameters_stay_float32_and_named_with_bf16_computation(make):
    model, inputs = make(recalibration=RANK2, dtype=jnp.bfloat16)
    variables = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    psrp = variables["params"]["layers"]["psrp"]
    assert {leaf.dtype for leaf in jax.tree.leaves(psrp)} == {jnp.dtype(jnp.float32)}
    assert psrp["down"]["kernel"].names == ("layers", "embed", None)


@pytest.mark.parametrize(
    "wrong, message",
    [
        (PSRP(rank=2), r"must make modules, got a PSRP: pass functools.partial\(PSRP, ...\)"),
        ("psrp", r"must be None or make a module, got 'psrp': pass functools.partial\(PSRP, rank=16\)"),
    ],
)
@MODELS
def test_what_makes_no_module_is_refused_at_construction(make, wrong, message):
    with pytest.raises(TypeError, match=message):
        make(recalibration=wrong)
