"""The rows of `gpu.py` that odjax runs: one training step of the decoder, and the edit of a method."""

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from gpu_row import B1, B2, DECAY, EPS, FACTOR_RATE, LEARNING_RATE, Edit, Setting, loss_problems, timed

from odjax.core import Edit as LibraryEdit
from odjax.core import combine, leaves_with_paths, partition, run_edit
from odjax.lowrank import FACTORS, adapt, restart
from odjax.models import Decoder
from odjax.sparse import LeafPlan, apply_masks, brf_mask, chtss, drawn, links, topology_edit, uniform

LAYERS = "layers.*kernel"
START_DENSITY = 0.5
INTERVAL, END = 100, 10_000


class State(NamedTuple):
    """Trained parameters, the optimizer's state, and the parameters that stay."""

    free: Any
    opt_state: Any
    frozen: Any


class Job(NamedTuple):
    """The functions of a row, not yet compiled.

    Attributes:
        init: `() -> State`.
        step: `(free, opt_state, frozen, tokens) -> (free, opt_state, loss)`.
        edit: `(State, update number) -> State`, or None.
        edit_name: of it.
        plan: of a sparse method, by path.
    """

    init: Callable[[], State]
    step: Callable[..., Any]
    edit: Callable[[State, jax.Array], State] | None = None
    edit_name: str = ""
    plan: dict[str, LeafPlan] | None = None


def job(method: str, attention: str | None, setting: Setting, dtype: Any = jnp.bfloat16) -> Job:
    """Builds a row: `full`, `lora`, `rac` or `chtss`.

    Trained parameters and moments are float32; what an adapter freezes has the dtype of the computation.

    Args:
        method: what is trained.
        attention: see `odjax.models.attention.attend`.
        setting: of the table.
        dtype: of the computation.
    """
    adapted = method in ("lora", "rac")
    model: Any = Decoder(
        **setting.sizes,
        max_length=setting.length,
        attention=attention,
        remat=setting.remat if attention is None else "none",
        dtype=dtype,
        param_dtype=dtype if adapted else jnp.float32,
    )
    rate, trained = (FACTOR_RATE, FACTORS) if adapted else (LEARNING_RATE, ".*")
    optimizer = optax.adamw(rate, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    edit, plan = None, None
    if adapted:
        model = adapt(model, rank=setting.rank, method=method, where=LAYERS)
        edit = restart(model, every=INTERVAL) if method == "rac" else None
    tokens = jnp.zeros((1, min(8, setting.length)), jnp.int32)
    if method == "chtss":
        plan = uniform(
            jax.eval_shape(model.init, jax.random.key(0), tokens)["params"], setting.sparsity, where=LAYERS
        )
        optimizer = chtss(
            optimizer,
            plan,
            key=jax.random.key(2),
            end=END,
            interval=INTERVAL,
            density=max(START_DENSITY, 1 - setting.sparsity),
            zeta=0.1,
            masks=drawn(functools.partial(brf_mask, r=0.1)),
            exact=False,
            by_edit=True,
        )
        edit = topology_edit(optimizer, every=INTERVAL, end=END)

    def init() -> State:
        params = nn.unbox(model.init(jax.random.key(0), tokens)["params"])
        free, frozen = partition(params, trained)
        opt_state = optimizer.init(free)
        if plan is not None:
            free = apply_masks(free, opt_state.masks)
        return State(free, opt_state, frozen)

    def step(free: Any, opt_state: Any, frozen: Any, tokens: jax.Array) -> tuple[Any, Any, jax.Array]:
        def loss(free: Any) -> jax.Array:
            logits = model.apply({"params": combine(free, frozen)}, tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        value, gradients = jax.value_and_grad(loss)(free)
        updates, opt_state = optimizer.update(gradients, opt_state, free)
        return optax.apply_updates(free, updates), opt_state, value

    return Job(init, step, _applied(edit, trained), edit.name if edit else "", plan)


def _applied(edit: LibraryEdit | None, trained: str) -> Callable[[State, jax.Array], State] | None:
    if edit is None:
        return None

    def apply(state: State, number: jax.Array) -> State:
        params = combine(state.free, state.frozen)
        params, opt_state = run_edit(edit, jax.random.key(3), number, params, state.opt_state)
        free, frozen = partition(params, trained)
        return State(free, opt_state, frozen)

    return apply


def peak_bytes() -> int | None:
    """Bytes of the first device that were ever in use; None where it does not say (CPUs)."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def density(state: State, plan: dict[str, LeafPlan]) -> tuple[float, int]:
    """Share of links in all sparse leaves, and the number of weights that are not 0 where there is none."""
    weights = dict(leaves_with_paths(state.free))
    present = sum(int(links(state.opt_state.masks[path])) for path in plan)
    kept = apply_masks(state.free, state.opt_state.masks)
    stray = sum(
        int(jnp.sum(weights[path] != kept_leaf))
        for path, kept_leaf in leaves_with_paths(kept)
        if path in plan
    )
    return present / sum(leaf.size * leaf.slices for leaf in plan.values()), stray


def measured(method: str, attention: str | None, setting: Setting) -> dict[str, Any]:
    """Compiles, checks and times a row."""
    if setting.cache:
        jax.config.update("jax_compilation_cache_dir", setting.cache)
    job_of = job(method, attention, setting)
    tokens = jax.random.randint(
        jax.random.key(1), (setting.batch, setting.length + 1), 0, setting.sizes["vocab"]
    )
    begin = time.perf_counter()
    shapes = jax.eval_shape(job_of.init)
    step = jax.jit(job_of.step, donate_argnums=(0, 1)).lower(*shapes, tokens).compile()
    compile_seconds = time.perf_counter() - begin
    edit, edit_compile_seconds = None, None
    state = [jax.block_until_ready(jax.jit(job_of.init)())]
    init_peak = peak_bytes()
    if job_of.edit is not None:
        begin = time.perf_counter()
        number = jnp.int32(INTERVAL)
        change = jax.jit(job_of.edit, donate_argnums=0).lower(shapes, number).compile()
        edit_compile_seconds = time.perf_counter() - begin

        def run() -> None:
            state[0] = change(state[0], number)

        edit = Edit(job_of.edit_name, run)

    def once() -> jax.Array:
        free, opt_state, loss = step(*state[0], tokens)
        state[0] = State(free, opt_state, state[0].frozen)
        return loss

    def wait() -> None:
        jax.block_until_ready(state[0])

    found = timed(once, wait, peak_bytes, setting, edit)
    problems = loss_problems(found.losses, setting.sizes["vocab"])
    facts: dict[str, Any] = {}
    if job_of.plan is not None:
        facts["density"], stray = density(state[0], job_of.plan)
        low, high = 1 - setting.sparsity, max(START_DENSITY, 1 - setting.sparsity)
        if not low - 1e-3 <= facts["density"] <= high + 1e-3:
            problems.append(f"density {facts['density']:.4f} is not between {low:.4f} and {high:.4f}")
        if stray:
            problems.append(f"{stray} weights are not 0 where there is no link")
    memory = step.memory_analysis()
    return {
        **found._asdict(),
        **facts,
        "edit_name": job_of.edit_name,
        "compile_seconds": compile_seconds,
        "edit_compile_seconds": edit_compile_seconds,
        "init_peak": init_peak,
        "compiled_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes if memory else None,
        "problems": problems,
        "versions": f"jax {jax.__version__}",
    }


def device(setting: Setting) -> dict[str, Any]:
    """The first device, and the rates that it reaches: a bfloat16 matrix product and a copy."""
    del setting
    first = jax.local_devices()[0]
    on_gpu = first.platform == "gpu"
    size, numbers = (8192, 1 << 29) if on_gpu else (512, 1 << 20)
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    x = jax.random.normal(jax.random.key(2), (numbers,), jnp.float32)

    def rate(function: Callable[..., jax.Array], *arguments: jax.Array) -> float:
        compiled = jax.jit(function)
        jax.block_until_ready(compiled(*arguments))
        seconds = []
        for _ in range(5):
            begin = time.perf_counter()
            for _ in range(8):
                out = compiled(*arguments)
            jax.block_until_ready(out)
            seconds.append((time.perf_counter() - begin) / 8)
        return sorted(seconds)[2]

    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "memory": (first.memory_stats() or {}).get("bytes_limit"),
        "product_flops": 2 * size**3 / rate(jnp.matmul, a, b),
        "copy_bytes": 8 * numbers / rate(jnp.negative, x),
        "versions": f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}",
    }
