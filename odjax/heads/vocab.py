"""Cross-entropy over vocabularies: classes in chunks, chunks over a mesh axis, no logit kept.

A fixed code has no gradient, so all that a training step needs of its K logits a token are the log-sum-exp,
the target's logit, and the gradient of the features. Both passes go over the classes in chunks and make the
logits of a chunk (and the columns of the code, where there are any) anew: memory is that of one chunk instead
of tokens x K. On a mesh axis every shard has its own range of classes, built from its index; what crosses the
axis are the maximum, the sum of exponentials and the target's logit of a token, and the sum of the gradients
of the features (Shoeybi et al. 2019, "Megatron-LM", section 3).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh
from jax.sharding import PartitionSpec as P

from odjax.core import statistics_dtype
from odjax.heads.checks import check_features, check_labels, check_scale
from odjax.heads.codes import ClassCode
from odjax.heads.hadamard import range_features, range_logits, range_width

CHUNK = 8192


class TokenLosses(NamedTuple):
    """Of every token: cross-entropy in nats, and whether the target has the largest logit (bool).

    Losses are float32 (float64 for float64 features). A target that is no class (which a traced label may be)
    has the log-sum-exp for its loss, and is never correct.

    Where several classes have the largest logit, the first one is taken for the answer.
    """

    loss: jax.Array
    correct: jax.Array


class _Plan(NamedTuple):
    """What is static: the code, the scale, and how the classes are cut up."""

    code: ClassCode
    scale: float
    shards: int
    steps: int
    chunk: int
    width: int
    mesh: Mesh | AbstractMesh | None
    axis: str | None


def code_cross_entropy(
    features: jax.Array,
    labels: jax.Array,
    code: ClassCode,
    *,
    bias: jax.Array | None = None,
    scale: float = 1.0,
    chunk: int = CHUNK,
    mesh: Mesh | AbstractMesh | None = None,
    axis: str | None = None,
) -> TokenLosses:
    """Softmax cross-entropy of scale * features . code + bias for a code that is made while it is used.

    Args:
      features: [..., d] floating point, in the dtype in which products are multiplied (sums are float32).
      labels: integers [...], in [0, K). Traced ones are not checked: outside, the loss is the log-sum-exp.
      code: whose columns can be made from their numbers (`ClassCode.by_number`).
      bias: a number a class, [K] float32, or None for 0.
      scale: inverse temperature.
      chunk: classes at a time, of one shard; about as many, at most.
      mesh: of `axis`; None: the mesh in force, of `jax.set_mesh`.
      axis: mesh axis that the classes are divided over, of type Auto; it must divide their number. None: no
        division.

    Returns:
      Loss and correctness, [...]. Features and bias have a gradient (in reverse mode; there is no `jax.jvp`);
      on a mesh axis that of the bias is divided over it.

    Raises:
      TypeError: labels that are no integers, features that are not floating point.
      ValueError: features or a bias that do not fit the code or the labels, labels outside [0, K), a scale or
        a chunk that is not positive, a code whose vectors are made together, an axis that the mesh does not
        have or that does not divide the classes.

    Source: Shoeybi et al. 2019, arXiv 1909.08053, section 3, for the division of the loss; that nothing is
      stored is ours.

    Example:
      >>> code = ClassCode(1000, 64, "hadamard")
      >>> code_cross_entropy(jnp.zeros((2, 64)), jnp.array([0, 999]), code).loss
      Array([6.9077554, 6.9077554], dtype=float32)
    """
    check_features(features, code.dim)
    check_labels(labels, code.num_classes, features)
    check_scale(scale)
    if bias is not None and bias.shape != (code.num_classes,):
        raise ValueError(f"bias must be [{code.num_classes}], one number a class, got shape {bias.shape}")
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1, got {chunk}")
    if not code.by_number:
        raise ValueError(f"the vectors of {code} are made together: take the logits of its matrix()")
    shards = 1
    if axis is not None:
        mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
        shards = _size(mesh, axis, code.num_classes)
    mine = code.num_classes // shards
    width = range_width(mine, code.dim, features.dtype) if code.kind == "hadamard" else 1
    # Ranges of classes start at multiples of the width: those of a shard may start before its own classes.
    reach = mine if shards == 1 else mine + width - math.gcd(mine, width)
    steps = -(-reach // max(chunk // width * width, width))
    size = -(-reach // (steps * width)) * width
    plan = _Plan(code, float(scale), shards, steps, size, width, mesh, axis)
    flat = jnp.reshape(features, (math.prod(labels.shape), code.dim))
    loss, correct = _losses(plan, flat, bias, jnp.reshape(labels, (-1,)).astype(jnp.int32))
    return TokenLosses(jnp.reshape(loss, labels.shape), jnp.reshape(correct, labels.shape))


def _size(mesh: Mesh | AbstractMesh, axis: str, classes: int) -> int:
    if mesh.empty or axis not in mesh.shape:
        have = "no mesh is in force" if mesh.empty else f"it has {', '.join(map(repr, mesh.shape))}"
        raise ValueError(f"the mesh has no axis {axis!r} ({have}): type mesh=, or jax.set_mesh(mesh)")
    kind = mesh.axis_types[mesh.axis_names.index(axis)]
    if kind == AxisType.Explicit:
        raise ValueError(f"the mesh axis {axis!r} must be of type Auto, got {kind.name}")
    if classes % mesh.shape[axis]:
        raise ValueError(f"the {mesh.shape[axis]} shards of axis {axis!r} do not divide {classes} classes")
    return mesh.shape[axis]


def _chunk(
    plan: _Plan, h: jax.Array, shard: jax.Array, step: jax.Array
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], jax.Array]]:
    """Logits float32 [n, chunk] of a chunk of a shard's classes without the scale, and their numbers [chunk].

    Numbers of classes that are not the shard's are -1. The last part is the transpose, float32 [n, chunk] ->
    [n, d].
    """
    code = plan.code
    mine = code.num_classes // plan.shards
    own = shard * mine
    first = own // plan.width * plan.width + step * plan.chunk
    classes = first + jnp.arange(plan.chunk, dtype=jnp.int32)
    kept = jnp.where((classes >= own) & (classes < own + mine), classes, -1)
    if code.kind == "hadamard":
        logits = range_logits(code.key, h, first, plan.chunk, plan.width)
        return logits, kept, lambda shares: range_features(code.key, shares, first, plan.width, h)
    columns = code.columns(jnp.maximum(kept, 0)).astype(h.dtype)

    def product(equation: str, x: jax.Array) -> jax.Array:
        return jnp.einsum(
            equation, x, columns, preferred_element_type=statistics_dtype(h), precision=_exact(h)
        )

    return product("nd,cd->nc", h), kept, lambda shares: product("nc,cd->nd", shares.astype(h.dtype))


def _exact(h: jax.Array) -> jax.lax.Precision | None:
    return None if h.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def _scaled(
    plan: _Plan, logits: jax.Array, bias: jax.Array | None, places: jax.Array, kept: jax.Array
) -> jax.Array:
    """Logits with scale and bias; -inf for classes of others."""
    logits = logits * jnp.asarray(plan.scale, logits.dtype)
    if bias is not None:
        logits = logits + bias.astype(logits.dtype)[places][None]
    return jnp.where(kept[None], logits, -jnp.inf)


def _places(plan: _Plan, classes: jax.Array, shard: jax.Array) -> jax.Array:
    """Where the classes of a chunk stand among those of the shard; 0 for those of others."""
    return jnp.maximum(classes - shard * (plan.code.num_classes // plan.shards), 0)


class _Seen(NamedTuple):
    """What the chunks so far say of every token [n]."""

    largest: jax.Array
    answer: jax.Array  # the first class with the largest logit
    total: jax.Array  # sum of exp(logit - largest)
    target: jax.Array  # the target's logit; 0 before its chunk


def _observe(plan: _Plan, shard: jax.Array, h: jax.Array, bias: jax.Array | None, labels: jax.Array) -> _Seen:
    """The classes of one shard."""
    wide = statistics_dtype(h)

    def add(seen: _Seen, step: jax.Array) -> tuple[_Seen, None]:
        logits, classes, _ = _chunk(plan, h, shard, step)
        logits = _scaled(plan, logits, bias, _places(plan, classes, shard), classes >= 0)
        best = jnp.argmax(logits, axis=1)
        high = jnp.max(logits, axis=1)
        largest = jnp.maximum(seen.largest, high)
        fresh = jnp.sum(jnp.exp(logits - largest[:, None]), axis=1)
        hit = (classes[None] == labels[:, None]) & (classes >= 0)[None]
        return _Seen(
            largest,
            jnp.where(high > seen.largest, classes[best], seen.answer),
            seen.total * jnp.exp(seen.largest - largest) + fresh,
            seen.target + jnp.sum(jnp.where(hit, logits, 0), axis=1),
        ), None

    none = jnp.full(labels.shape, -jnp.inf, wide)
    zero = jnp.zeros(labels.shape, wide)
    start = _Seen(none, jnp.full(labels.shape, -1, jnp.int32), zero, zero)
    return _over_chunks(plan, add, start)


def _over_chunks(plan: _Plan, add: Callable[[Any, jax.Array], tuple[Any, None]], start: Any) -> Any:
    if plan.steps == 1:
        return add(start, jnp.int32(0))[0]
    return jax.lax.scan(add, start, jnp.arange(plan.steps, dtype=jnp.int32))[0]


def _divided(plan: _Plan, body: Callable[..., Any], in_specs: Any, out_specs: Any) -> Callable[..., Any]:
    """The function with the number of the shard as its first argument, on every shard of the axis."""
    if plan.axis is None:
        return functools.partial(body, jnp.int32(0))
    return jax.shard_map(
        lambda *arrays: body(jax.lax.axis_index(plan.axis), *arrays),
        mesh=plan.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names={plan.axis},
        check_vma=False,
    )


@functools.partial(jax.jit, static_argnums=0)
def _summary(
    plan: _Plan, h: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-sum-exp, target's logit and answer of every token."""

    def body(shard: jax.Array, *arrays: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
        seen = _observe(plan, shard, *arrays)
        if plan.axis is None:
            return seen.largest + jnp.log(seen.total), seen.target, seen.answer
        largest = jax.lax.pmax(seen.largest, plan.axis)
        total = jax.lax.psum(seen.total * jnp.exp(seen.largest - largest), plan.axis)
        # The first class with the largest logit, over all shards.
        none = jnp.int32(plan.code.num_classes)
        answer = jax.lax.pmin(jnp.where(seen.largest == largest, seen.answer, none), plan.axis)
        return largest + jnp.log(total), jax.lax.psum(seen.target, plan.axis), answer

    return _divided(plan, body, (P(), P(plan.axis), P()), P())(h, bias, labels)


@functools.partial(jax.jit, static_argnums=0)
def _gradients(
    plan: _Plan,
    h: jax.Array,
    bias: jax.Array | None,
    labels: jax.Array,
    normalizer: jax.Array,
    weight: jax.Array,
) -> tuple[jax.Array, jax.Array | None]:
    """Of sum_i weight_i loss_i with respect to the features and the bias."""
    wide = statistics_dtype(h)

    def body(
        shard: jax.Array,
        h: jax.Array,
        bias: jax.Array | None,
        labels: jax.Array,
        normalizer: jax.Array,
        weight: jax.Array,
    ) -> tuple[jax.Array, jax.Array | None]:
        def add(sums: tuple[jax.Array, Any], step: jax.Array) -> tuple[tuple[jax.Array, Any], None]:
            of_h, of_bias = sums
            logits, classes, back = _chunk(plan, h, shard, step)
            places = _places(plan, classes, shard)
            share = jnp.exp(_scaled(plan, logits, bias, places, classes >= 0) - normalizer[:, None])
            hit = ((classes[None] == labels[:, None]) & (classes >= 0)[None]).astype(wide)
            shares = (share - hit) * weight[:, None]
            if of_bias is not None:
                of_bias = of_bias.at[places].add(jnp.sum(shares, axis=0))
            return (of_h + back(shares * jnp.asarray(plan.scale, wide)), of_bias), None

        zeros = None if bias is None else jnp.zeros(bias.shape, wide)
        of_h, of_bias = _over_chunks(plan, add, (jnp.zeros(h.shape, wide), zeros))
        return of_h if plan.axis is None else jax.lax.psum(of_h, plan.axis), of_bias

    specs = (P(), P(plan.axis), P(), P(), P())
    of_h, of_bias = _divided(plan, body, specs, (P(), P(plan.axis)))(h, bias, labels, normalizer, weight)
    return of_h.astype(h.dtype), None if bias is None else of_bias.astype(bias.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _losses(
    plan: _Plan, h: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return _forward(plan, h, bias, labels)[0]


def _forward(
    plan: _Plan, h: jax.Array, bias: jax.Array | None, labels: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], Any]:
    normalizer, target, answer = _summary(plan, h, bias, labels)
    return (normalizer - target, answer == labels), (h, bias, labels, normalizer)


def _backward(
    plan: _Plan, kept: Any, cotangents: tuple[jax.Array, Any]
) -> tuple[jax.Array, jax.Array | None, None]:
    return *_gradients(plan, *kept, cotangents[0]), None


_losses.defvjp(_forward, _backward)
