"""Sparse training by the name of a method: every knob of the papers' tables as one argument."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import optax

from odjax.core import Edit
from odjax.sparse import (
    PER_HEAD,
    brf_mask,
    bsw_mask,
    cht,
    chts,
    chtss,
    drawn,
    erk,
    gmp,
    granet,
    rigl,
    set_,
    static,
    topology_edit,
    uniform,
    wiring_of,
)
from odjax_train.errors import UserError

Method = Literal["dense", "static", "set", "rigl", "gmp", "granet", "cht", "chts", "chtss"]
Distribution = Literal["uniform", "erk"]
Topology = Literal["brf", "bsw", "er"]
Degrees = Literal["fixed", "uniform", "poisson"]
Predictor = Literal["CH2_L3n", "CH3_L3n", "CH3.1_L3n", "CH2_L3p", "CH3_L3p", "CH3.1_L3p"]

_METHODS = {
    "static": static,
    "set": set_,
    "rigl": rigl,
    "gmp": gmp,
    "granet": granet,
    "cht": cht,
    "chts": chts,
    "chtss": chtss,
}
HEBB = ("cht", "chts", "chtss")
GRADIENT_FREE = ("set", *HEBB)
"""Methods that look at no gradient: their changes of links are compiled apart from the step."""


def moves(method: Method) -> bool:
    """Whether links change at all, so that a learning rate may be warmed up again after each change."""
    return method not in ("dense", "static")


def sparse_optimizer(
    method: Method,
    inner: optax.GradientTransformation,
    model: nn.Module,
    inputs: Sequence[jax.ShapeDtypeStruct],
    *,
    sparsity: float,
    where: str,
    end: int,
    interval: int = 100,
    distribution: Distribution = "uniform",
    per_head: bool = False,
    topology: Topology | None = None,
    r: float = 0.25,
    degrees: Degrees = "fixed",
    zeta: float = 0.3,
    adaptive_zeta: bool = True,
    density: float = 0.5,
    decay: Literal["sigmoid", "cubic"] = "sigmoid",
    decay_end: int | None = None,
    across: bool = False,
    predictor: Predictor | None = None,
    removal: Literal["soft", "hard"] | None = None,
    regrowth: Literal["soft", "top"] | None = None,
    alpha: float = 1.0,
    temperature: tuple[float, float] = (1.0, 9.0),
    percolation: bool = True,
    row_block: int | None = None,
    exact: bool = True,
    axes: tuple[str, ...] | None = None,
    history: bool = False,
    skip_step: bool = False,
    seed: int = 0,
) -> tuple[optax.GradientTransformation, tuple[Edit, ...]]:
    """The optimizer of a sparse model, and the edits that change its links.

    Args:
        method: how links move; `dense` has all of them and is the inner optimizer.
        inner: the optimizer of the weights.
        model: whose parameters are sparse.
        inputs: shapes that `model.init` is called with.
        sparsity: share of absent links in every sparse kernel, at the end.
        where: which weights are sparse.
        end: the last step that may change links.
        interval: steps between two changes.
        distribution: the same sparsity for all kernels, or more links for small ones.
        per_head: every attention head of q, k and v is a graph of its own.
        topology: links at the start: receptive fields, a small world, or uniformly random; None: receptive
            fields for Cannistraci-Hebb methods, else random.
        r: randomness of receptive fields, from 0 (the nearest inputs) to 1 (any); share of moved links (beta)
            of a small world.
        degrees: links of each output of a receptive field.
        zeta: share of the links that a change replaces at first.
        adaptive_zeta: it falls to 0 at the end, of chts and chtss (always of rigl and granet).
        density: at the start, of chtss, granet and gmp.
        decay: how the density falls, of chtss.
        decay_end: the step at which chtss comes to its density; None: `end`.
        across: whether the density falls by the scores of all kernels together.
        predictor: of new links; None: CH2_L3n for chts and chtss, CH3_L3p for cht.
        removal: whether links that stay are drawn (soft) or ranked (hard); None: the method's.
        regrowth: whether new links are drawn (soft) or ranked (top); None: the method's.
        alpha: removal by weight magnitude (1) or relative importance (0).
        temperature: exponent of the soft removal at the start and at the end.
        percolation: links of dead neurons go too, of Cannistraci-Hebb methods.
        row_block: neurons whose communities are looked at together, for layers whose pairs of neurons do not
            fit into memory.
        exact: scores that are the same bits on any number of devices.
        axes: mesh axes over which the scores are divided by hand.
        history: a link that comes back has its last weight.
        skip_step: a change of links takes the place of an optimizer step.
        seed: of the links.

    Returns:
        (optimizer, edits): methods that look at no gradient change links in an edit of their own.

    Raises:
        UserError: an unknown method.
        ValueError: as the method.
    """
    if method not in get_args(Method):
        raise UserError(f"there is no sparse method {method!r}; there are {', '.join(get_args(Method))}")
    if method == "dense":
        return inner, ()
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    spread = uniform if distribution == "uniform" else erk
    plan = spread(params, sparsity, where=where, per_head=PER_HEAD if per_head else None)
    kind = topology or ("brf" if method in HEBB else "er")
    fields = {"brf": partial(brf_mask, r=r, degrees=degrees), "bsw": partial(bsw_mask, beta=r)}
    options: dict[str, Any] = {"masks": drawn(fields[kind]) if kind in fields else None}
    by_edit = method in GRADIENT_FREE and not skip_step
    if moves(method):
        options |= {"interval": interval, "end": end, "init_new": "history" if history else "zero"}
        options |= {"by_edit": True} if by_edit else {"skip_step": skip_step}
        if method != "gmp":
            options["zeta"] = zeta
    if method in HEBB:
        rules = {"predictor": predictor, "removal_rule": removal, "regrowth_rule": regrowth}
        options |= {name: rule for name, rule in rules.items() if rule is not None}
        options |= {"alpha": alpha, "wiring": wiring_of(model) if percolation else None}
        options |= {"row_block": row_block, "exact": exact, "axes": axes}
    if method in ("chts", "chtss"):
        options |= {"temperature": temperature, "adaptive_zeta": adaptive_zeta}
    if method == "chtss":
        options |= {"density": density, "decay": decay, "decay_end": decay_end}
    if method in ("granet", "gmp"):
        options["density"] = density
    if across:
        options["across"] = True
    optimizer = _METHODS[method](inner, plan, key=jax.random.key(seed), **options)
    edits = (topology_edit(optimizer, every=interval, end=end),) if by_edit else ()
    return optimizer, edits
