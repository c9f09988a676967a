"""The contract matrix: every public object of a kind is a row; every row of a kind gets the tests of that
kind.

Adding a method is adding a row here; adding a kind is adding one entry to `KINDS` and a test file that is
parametrised with `rows(kind)`. `test_contract_table.py` fails for a registry entry or a public object that
has no row.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from .contract_federated import FEDERATED
from .contract_row import KEY, KINDS, Row


def lenient(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """An optimizer of optax outside strict promotion (Adam raises a float to an int32 count)."""
    inner = optax.with_extra_args_support(inner)

    def update(updates, state, params=None, **extra):
        with jax.numpy_dtype_promotion("standard"):
            return inner.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _edited(optimizer: optax.GradientTransformation) -> Callable[[], optax.GradientTransformation]:
    def build():
        from odjax.continual.shrink_perturb import shrink_perturb
        from odjax.core.edits import as_transform

        return as_transform(shrink_perturb(every=2), lenient(optimizer), key=KEY)

    return build


def _shrink_perturb(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.continual.shrink_perturb import shrink_perturb

        return shrink_perturb(every=2, **options), options.get("where", ".*")

    return build


def _observations(key, n):
    x, w = jax.random.split(key)
    return 5 + jax.random.normal(x, (n, 3)), jax.random.uniform(w, (n,))


def _moments(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.core.statistics import moments

        return moments((3,), **options), _observations

    return build


def _weighted_mean():
    from odjax.core.statistics import weighted_mean

    return weighted_mean((3,)), _observations


def _labelled(key, n):
    features, weights = _observations(key, n)
    return features, jax.random.randint(jax.random.fold_in(key, 1), (n,), 0, 4), weights


def _class_moments(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.core.class_moments import class_moments

        return class_moments(4, 3, **options), _labelled

    return build


def _collapse_gram():
    from odjax.heads.collapse import collapse_gram

    means = jax.random.normal(KEY, (4, 3))
    return collapse_gram(means, classifier=means.T + 0.1), _labelled


def _product():
    from odjax.core.statistics import moments, product, weighted_mean

    return product(spread=moments((3,)), mean=weighted_mean((3,))), _observations


def _average_precision():
    from odjax.core.average_precision import average_precision_over

    def batch(key, n):
        scores = jax.random.normal(key, (n, 2))
        labels = jax.random.randint(jax.random.fold_in(key, 1), (n, 2), -1, 2)
        return scores, labels, jnp.arange(n, dtype=jnp.float32) % 3 / 2

    return average_precision_over(40, 2), batch


def _top_k():
    from odjax.core.selection import top_k_mask

    return lambda s: top_k_mask(s, 37), (jax.random.normal(KEY, (16, 8)),)


def _gumbel():
    from odjax.core.selection import gumbel_top_k_mask

    return lambda s: gumbel_top_k_mask(KEY, s, 37), (jax.random.normal(KEY, (16, 8)),)


def _guard_head():
    from odjax.lowrank.guard import GuardHead

    return GuardHead(3), (jax.random.normal(KEY, (4, 16)),)


LOW_RANK = ("lora", "rslora", "rac", "asym", "lora_fa", "cola", "relora", "dora", "pissa", "dylora")

TOKENS = jnp.arange(1, 9, dtype=jnp.int32).reshape(2, 4)
SMALL = {"layers": 2, "width": 16, "heads": 4, "mlp_width": 24}


def _decoder(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import decoder

        return decoder(
            "tiny", **{"vocab": 16, **SMALL, "kv_heads": 2, "head_dim": 4, "max_length": 8, **options}
        ), (TOKENS,)

    return build


def _vit(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import vit

        return vit("tiny-digits", classes=8, **SMALL, **options), (jnp.ones((2, 8, 8, 1)) / 3,)

    return build


def _bert(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import bert

        return bert("tiny", vocab=16, max_length=8, classes=8, **SMALL, **options), (TOKENS,)

    return build


def _encoder_decoder(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import encoder_decoder

        return encoder_decoder("tiny", vocab=16, **SMALL, **options), (TOKENS, TOKENS)

    return build


def _mlp(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import MLP

        return MLP((8, 6, 4), **options), (jnp.linspace(-1.0, 1.0, 12).reshape(2, 6),)

    return build


def _resnet(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.models import resnet

        return resnet("resnet20", depth=8, width=4, classes=8, **options), (
            jax.random.normal(KEY, (2, 8, 8, 3)),
        )

    return build


def _head(
    name: str, *arguments: Any, shape: tuple[int, ...] = (2, 6, 8), **options: Any
) -> Callable[[], Any]:
    """A module of odjax.heads on random features."""

    def build():
        from odjax import heads

        return getattr(heads, name)(*arguments, **options), (jax.random.normal(KEY, shape),)

    return build


def _of_features(name: str) -> Callable[[], Any]:
    """Functions of features, by name."""

    def build():
        from odjax import heads

        h = jax.random.normal(KEY, (16, 8))
        code, labels = heads.class_code(jax.random.key(1), 9, 8), jnp.arange(16, dtype=jnp.int32) % 9
        wide = heads.ClassCode(24, 8, "sphere")
        return {
            "class_code": (lambda h: heads.etf_logits(h, code), (h,)),
            "dot_regression_loss": (lambda h: heads.dot_regression_loss(h, labels, code), (h,)),
            "code_cross_entropy": (lambda h: heads.code_cross_entropy(h, labels, wide, chunk=8).loss, (h,)),
            "hadamard_logits": (lambda h: heads.hadamard_logits(jax.random.key(2), h, 24), (h,)),
            "one_vs_rest_margins": (lambda h: heads.one_vs_rest_margins(h, iterations=50), (h,)),
        }[name]

    return build


def _rac_lora(**options: Any) -> Callable[[], Any]:
    def build():
        from odjax.lowrank import rac_lora

        inner = lenient(optax.chain(optax.scale_by_adam(), optax.scale(-0.1)))
        return rac_lora(inner, 2, 2, key=KEY, **options)

    return build


def _adapt(method: str) -> Callable[[], Any]:
    def build():
        from odjax.lowrank.adapt import adapt
        from odjax.models import decoder

        model = decoder("tiny", vocab=16, **SMALL, kv_heads=2, head_dim=4, max_length=8)
        return adapt(model, rank=2, method=method, where="layers/.*/kernel"), (TOKENS,)

    return build


def _sparse(method: str, **options: Any) -> Callable[[], Any]:
    def build():
        from odjax import sparse

        def make(plan):
            inner = lenient(optax.adam(0.1))
            return getattr(sparse, method)(inner, plan, key=KEY, interval=2, end=8, **options)

        return sparse.planned(make, lambda params: sparse.uniform(params, 0.5))

    return build


def _masks_of(name: str) -> Callable[[], Any]:
    """Functions of masks and weights, by name."""

    def build():
        from odjax import sparse

        w, plan = jax.random.normal(KEY, (16, 8)), {"w": sparse.LeafPlan((16, 8), 37)}
        field = sparse.brf_mask(jax.random.key(1), 16, 8, 0.3, 0.25)
        return {
            "ch_scores": (lambda x: sparse.ch_scores(x > 0.5), (w,)),
            "path_scores": (lambda x: sparse.path_scores(x > 0.5, max_links=128), (w,)),
            "brf_mask": (lambda x: sparse.apply_masks({"w": x}, {"w": field}), (w,)),
            "csti_mask": (lambda x: sparse.csti_mask(x, (8, 16), 0.3), (w,)),
            "snip_masks": (lambda x: sparse.snip_masks({"w": x}, {"w": x}, plan), (w,)),
            "ste": (lambda x: sparse.ste({"w": x}, plan), (w,)),
        }[name]

    return build


ROWS: tuple[Row, ...] = (
    *FEDERATED,
    Row("odjax.core.edits.as_transform", "transform", _edited(optax.sgd(0.1, momentum=0.9)), "momentum"),
    Row("odjax.core.edits.as_transform", "transform", _edited(optax.adamw(0.1)), "adamw"),
    Row("odjax.lowrank.gradient.rac_lora", "transform", _rac_lora()),
    Row(
        "odjax.lowrank.gradient.rac_lora", "transform", _rac_lora(side="left", law="coordinate"), "coordinate"
    ),
    Row("odjax.sparse.methods.rigl", "transform", _sparse("rigl")),
    Row("odjax.sparse.cannistraci_hebb.chts", "transform", _sparse("chts")),
    Row("odjax.sparse.link_prediction.ch_scores", "function", _masks_of("ch_scores")),
    Row("odjax.sparse.path_scores.path_scores", "function", _masks_of("path_scores")),
    Row("odjax.sparse.topology.brf_mask", "function", _masks_of("brf_mask")),
    Row("odjax.sparse.topology.csti_mask", "function", _masks_of("csti_mask")),
    Row("odjax.sparse.one_shot.snip_masks", "function", _masks_of("snip_masks")),
    Row("odjax.sparse.one_shot.ste", "function", _masks_of("ste")),
    *(Row("odjax.lowrank.adapt.adapt", "adapter", _adapt(method), method) for method in LOW_RANK),
    Row("odjax.continual.shrink_perturb.shrink_perturb", "edit", _shrink_perturb()),
    Row("odjax.continual.shrink_perturb.shrink_perturb", "edit", _shrink_perturb(where="body/.*"), "where"),
    Row("odjax.core.statistics.moments", "statistic", _moments()),
    Row("odjax.core.statistics.moments", "statistic", _moments(ddof=1), "ddof"),
    Row("odjax.core.statistics.weighted_mean", "statistic", _weighted_mean),
    Row("odjax.core.statistics.product", "statistic", _product),
    Row("odjax.core.class_moments.class_moments", "statistic", _class_moments()),
    Row("odjax.core.class_moments.class_moments", "statistic", _class_moments(origin=jnp.ones(3)), "origin"),
    Row("odjax.heads.collapse.collapse_gram", "statistic", _collapse_gram),
    Row("odjax.heads.codes.class_code", "function", _of_features("class_code"), "", 1e-6),
    Row("odjax.heads.losses.dot_regression_loss", "function", _of_features("dot_regression_loss"), "", 1e-6),
    Row("odjax.heads.vocab.code_cross_entropy", "function", _of_features("code_cross_entropy"), "", 1e-6),
    Row("odjax.heads.hadamard.hadamard_logits", "function", _of_features("hadamard_logits"), "", 1e-6),
    Row("odjax.heads.margins.one_vs_rest_margins", "function", _of_features("one_vs_rest_margins"), "", 1e-4),
    Row("odjax.heads.fixed.FixedHead", "module", _head("FixedHead", 10, norm="bn+l2", shape=(4, 16))),
    Row("odjax.heads.ggem.GGeM", "module", _head("GGeM", 4)),
    Row("odjax.heads.ggem.GGeM", "module", _head("GGeM", 4, signed=True), "signed"),
    Row("odjax.heads.moment_probing.MHC3", "module", _head("MHC3", dim=28, shape=(2, 5, 6))),
    Row(
        "odjax.heads.moment_probing.MomentProbe",
        "module",
        _head("MomentProbe", 3, first_order="mean_norm", dim=28, shape=(2, 5, 6)),
    ),
    Row("odjax.heads.recalibration.PSRP", "module", _head("PSRP", rank=4)),
    Row("odjax.core.average_precision.average_precision_over", "statistic", _average_precision),
    Row("odjax.lowrank.guard.GuardHead", "module", _guard_head),
    Row("odjax.core.selection.top_k_mask", "function", _top_k),
    Row("odjax.core.selection.gumbel_top_k_mask", "function", _gumbel),
    Row("odjax.models.decoder.Decoder", "module", _decoder(), "scan"),
    Row("odjax.models.decoder.Decoder", "module", _decoder(scan=False, tied=True), "tied"),
    Row("odjax.models.vit.ViT", "module", _vit()),
    Row("odjax.models.bert.Bert", "module", _bert()),
    Row("odjax.models.encoder_decoder.EncoderDecoder", "module", _encoder_decoder()),
    Row("odjax.models.mlp.MLP", "module", _mlp()),
    Row("odjax.models.resnet.ResNet", "module", _resnet()),
)


def rows(kind: str) -> list[Row]:
    """The rows of a kind."""
    assert kind in KINDS
    return [row for row in ROWS if row.kind == kind]
