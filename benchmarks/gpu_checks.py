"""What `gpu.py` checks before it times: the same functions on the GPU and on the CPU, and against PyTorch.

Every check returns the figures that it compared, or raises an AssertionError. Values that integers make are
compared bit for bit; where a division, a logarithm or another order of a sum comes in, within its rounding.
"""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from gpu_jax import END, LAYERS, job
from gpu_row import B1, B2, DECAY, EPS, LEARNING_RATE, Setting, first_line

from odjax.core import combine, gumbel_top_k_mask, partition, top_k_mask
from odjax.lowrank import FACTORS, adapt, next_block
from odjax.models import decoder, unstack_layers
from odjax.models.attention import attend
from odjax.sparse import ch_scores, links, pack, unpack
from odjax_kernels.block_sparse import BlockLists, block_gradient_reference, block_matmul_reference
from odjax_kernels.link_scores import link_scores_reference
from odjax_kernels.masked_gradient import masked_weight_gradient
from odjax_kernels.threshold import gumbel_threshold_mask_reference, threefry_2x32

TINY = {"preset": "tiny", "width": 128, "max_length": 64}


def on_cpu(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a compiled function gives on the CPU, as NumPy arrays; arguments are NumPy arrays."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def on_device(function: Callable[..., Any], *arguments: Any) -> Any:
    """The same on the first device."""
    return jax.tree.map(np.asarray, jax.jit(function)(*arguments))


def distance(found: Any, wanted: Any) -> float:
    """Norm of the difference of two trees over the norm of the second."""
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True))
    differences = sum(np.sum((np.float64(a) - np.float64(b)) ** 2) for a, b in pairs)
    return float(np.sqrt(differences / sum(np.sum(np.float64(b) ** 2) for _, b in pairs)))


def near(found: Any, wanted: Any, tolerance: float) -> str:
    error = distance(found, wanted)
    assert error <= tolerance, f"relative error {error:.1e}, at most {tolerance:.0e}"
    return f"relative error {error:.1e}"


def same(found: Any, wanted: Any, what: str) -> str:
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert np.array_equal(a, b), f"{what}: {np.sum(a != b)} of {a.size} entries differ"
    return f"{what}: equal"


def tokens_of(vocab: int, shape: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(0).integers(0, vocab, shape, dtype=np.int32)


def adapter_gradient() -> str:
    """Gradients of LoRA's factors, which start at zero, away from it."""
    model = adapt(decoder(**TINY), rank=4, where=LAYERS)
    tokens = tokens_of(256, (2, 65))
    params = on_cpu(lambda: nn.unbox(model.init(jax.random.key(0), jnp.asarray(tokens[:, :-1]))["params"]))
    free, frozen = partition(params, FACTORS)
    random = np.random.default_rng(1)
    free = jax.tree.map(lambda x: random.normal(0, 0.1, x.shape).astype(x.dtype), free)

    def gradient(free: Any, frozen: Any, tokens: jax.Array) -> Any:
        def loss(free: Any) -> jax.Array:
            logits = model.apply({"params": combine(free, frozen)}, tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        with jax.default_matmul_precision("highest"):
            return jax.grad(loss)(free)

    return near(on_device(gradient, free, frozen, tokens), on_cpu(gradient, free, frozen, tokens), 1e-4)


def restart_keeps_the_function() -> str:
    """Logits of RAC-LoRA before and after a restart."""
    model = adapt(decoder(**TINY), rank=4, method="rac", where=LAYERS)
    tokens = jnp.asarray(tokens_of(256, (2, 64)))
    params = jax.jit(lambda: nn.unbox(model.init(jax.random.key(0), tokens)["params"]))()
    free, frozen = partition(params, FACTORS)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    free = jax.tree.map(lambda x: 0.01 * jax.random.normal(next(keys), x.shape, x.dtype), free)

    def logits(params: Any) -> jax.Array:
        with jax.default_matmul_precision("highest"):
            return model.apply({"params": params}, tokens)

    def restarted(params: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return next_block(model, params, jax.random.key(2))

    before = combine(free, frozen)
    base = jax.jit(lambda: logits(combine(jax.tree.map(jnp.zeros_like, free), frozen)))()
    first = on_device(logits, before)
    moved = distance(first, base)
    assert moved > 1e-3, f"the update changes the logits by {moved:.1e} only"
    return near(on_device(logits, jax.jit(restarted)(before)), first, 1e-4)


def half_precision() -> str:
    """Loss in bfloat16 on the device beside that in float32 on the CPU."""
    tokens = tokens_of(256, (2, 65))

    def loss_in(dtype: Any) -> Callable[..., jax.Array]:
        model = decoder(**TINY, dtype=dtype)

        def loss(params: Any, tokens: jax.Array) -> jax.Array:
            logits = model.apply({"params": params}, tokens[:, :-1])
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        return loss

    params = on_cpu(
        lambda: nn.unbox(decoder(**TINY).init(jax.random.key(0), jnp.asarray(tokens[:, :-1]))["params"])
    )
    return near(
        on_device(loss_in(jnp.bfloat16), params, tokens), on_cpu(loss_in(jnp.float32), params, tokens), 1e-2
    )


def density_after_changes() -> str:
    """Links of CHTss at the start, and exactly those of the plan after the last change."""
    sizes = {
        "vocab": 256, "layers": 2, "width": 128, "heads": 4, "kv_heads": 2, "mlp_width": 256, "tied": True
    }  # fmt: skip
    setting = Setting("tiny", sizes, 2, 64, 4, 0.7, 1, 1, "none")
    made = job("chtss", None, setting, jnp.float32)
    state = jax.jit(made.init)()
    places = sum(leaf.size * leaf.slices for leaf in made.plan.values())
    start = sum(int(links(words)) for words in state.opt_state.masks.values()) / places
    assert abs(start - 0.5) < 0.01, f"density {start:.4f} at the start, not 0.5"
    last = state.opt_state._replace(count=jnp.int32(END))
    state = jax.jit(made.edit)(state._replace(opt_state=last), jnp.int32(END))
    for path, leaf in made.plan.items():
        found = np.asarray(links(state.opt_state.masks[path], batch_dims=len(leaf.batch_shape)))
        assert np.all(found == leaf.links), f"{path}: {found.tolist()} links, planned {leaf.links}"
    end = sum(int(links(words)) for words in state.opt_state.masks.values()) / places
    return f"density {start:.4f}, then {end:.4f} as planned"


def selections() -> str:
    """The k largest, and a draw of exactly k."""
    scores = np.random.default_rng(0).integers(0, 1000, (300, 500)).astype(np.float32)
    k = 30_000
    found = on_device(lambda x: top_k_mask(x, k), scores)
    drawn = on_device(lambda x: gumbel_top_k_mask(jax.random.key(0), jnp.log1p(x), k), scores)
    assert drawn.sum() == k, f"{drawn.sum()} entries drawn, asked for {k}"
    return same(found, on_cpu(lambda x: top_k_mask(x, k), scores), "with ties")


def packed_masks() -> str:
    """Packing and unpacking, and the random words behind the draws."""
    mask = np.random.default_rng(0).random((600, 70)) < 0.3
    both = on_device(lambda m: unpack(pack(m), m.shape), mask)
    words = np.arange(1000, dtype=np.uint32)

    def random(words: jax.Array) -> tuple[jax.Array, jax.Array]:
        return threefry_2x32((jnp.uint32(1), jnp.uint32(2)), (words, words))

    same(on_device(random, words), on_cpu(random, words), "random words")
    return same(both, mask, "masks and random words")


def link_scores() -> str:
    """Scores from packed masks are the library's bit for bit; those of the CPU but for a division."""
    mask = np.random.default_rng(0).random((300, 500)) < 0.1

    def library(mask: jax.Array) -> jax.Array:
        return ch_scores(mask)

    found = on_device(library, mask)
    same(on_device(lambda m: link_scores_reference(pack(m), m.shape), mask), found, "packed")
    wanted = on_cpu(library, mask)
    same(found > 0, wanted > 0, "links with a score")
    return f"packed: equal; from the CPU's {near(found, wanted, 1e-6)}"


def threshold_draw() -> str:
    """A draw with its own noise: exactly k, and nearly all of those that the CPU draws."""
    weights = np.random.default_rng(0).normal(size=(300, 500)).astype(np.float32)

    def draw(weights: jax.Array) -> jax.Array:
        return gumbel_threshold_mask_reference(jax.random.key(0), weights, 30_000)

    found, wanted = (np.unpackbits(run(draw, weights).view(np.uint8)) for run in (on_device, on_cpu))
    common = int((found & wanted).sum())
    assert found.sum() == 30_000, f"{found.sum()} entries drawn, asked for 30000"
    assert common >= 29_970, f"{common} of 30000 are those of the CPU"
    return f"30000 drawn, {common} as on the CPU"


def masked_gradients() -> str:
    """Masked weight gradients of integers."""
    random = np.random.default_rng(0)
    x, dy = (random.integers(-3, 4, (140, size)).astype(np.float32) for size in (300, 130))
    mask = random.random((300, 130)) < 0.3
    wanted = np.where(mask, x.T @ dy, 0)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = on_device(
            lambda x, dy, m, dtype=dtype: masked_weight_gradient(x.astype(dtype), dy.astype(dtype), pack(m)),
            x, dy, mask,
        )  # fmt: skip
        same(found, wanted, jnp.dtype(dtype).name)
    return "float32, bfloat16: equal"


def block_products() -> str:
    """Products with a matrix of blocks, of integers: y = x W, and the blocks of dW."""
    random = np.random.default_rng(0)
    x, dy = (random.integers(-3, 4, (64, size)).astype(np.float32) for size in (384, 256))
    blocks = random.integers(-3, 4, (3, 128, 128)).astype(np.float32)
    row, column = np.array([0, 2, 1], np.int32), np.array([0, 0, 1], np.int32)
    lists = BlockLists(
        np.array([2, 1], np.int32), np.array([[0, 2], [1, 1]], np.int32), np.array([[0, 1], [2, 2]], np.int32)
    )
    dense = np.zeros((384, 256), np.float32)
    for block, i, j in zip(blocks, row, column, strict=True):
        dense[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] = block
    same(on_device(block_matmul_reference, x, blocks, lists), x @ dense, "y")

    def gradient(x: jax.Array, dy: jax.Array, row: jax.Array, column: jax.Array) -> jax.Array:
        return block_gradient_reference(x, dy, row, column, jnp.int32(3), (128, 128))

    whole = x.T @ dy
    wanted = [
        whole[i * 128 : (i + 1) * 128, j * 128 : (j + 1) * 128] for i, j in zip(row, column, strict=True)
    ]
    return same(on_device(gradient, x, dy, row, column), np.stack(wanted), "y and dW")


def fused_attention() -> str:
    """The fused kernel beside plain attention in float32, forward and backward."""
    if jax.default_backend() != "gpu":
        return "left out: needs a GPU"
    random = np.random.default_rng(0)
    q, k, v, dy = (
        jnp.asarray(random.normal(size=(2, 256, heads, 64)), jnp.bfloat16) for heads in (8, 2, 2, 8)
    )

    def both(implementation: str, dtype: Any) -> Callable[..., Any]:
        def run(*arrays: jax.Array) -> Any:
            q, k, v, dy = (x.astype(dtype) for x in arrays)
            with jax.default_matmul_precision("highest"):
                y, pull = jax.vjp(
                    lambda q, k, v: attend(q, k, v, causal=True, implementation=implementation), q, k, v
                )
                return jax.tree.map(lambda x: x.astype(jnp.float32), (y, *pull(dy)))

        return run

    wanted = on_device(both("xla", jnp.float32), q, k, v, dy)
    errors = [distance(on_device(both(name, jnp.bfloat16), q, k, v, dy), wanted) for name in ("cudnn", "xla")]
    assert errors[0] <= 2e-2, f"relative error {errors[0]:.1e} (of plain attention {errors[1]:.1e})"
    return f"relative error {errors[0]:.1e}, of plain attention {errors[1]:.1e}"


CHECKS: dict[str, dict[str, Callable[[], str]]] = {
    "checks-methods": {
        "LoRA's gradient": adapter_gradient,
        "RAC-LoRA's restart keeps the logits": restart_keeps_the_function,
        "loss in bfloat16": half_precision,
        "fused attention": fused_attention,
    },
    "checks-sparse": {"CHTss: density": density_after_changes, "selections": selections},
    "checks-kernels": {
        "packed masks": packed_masks,
        "link scores": link_scores,
        "threshold draw": threshold_draw,
        "masked weight gradient": masked_gradients,
        "block-sparse products": block_products,
    },
}


def checked(checks: dict[str, Callable[[], str]]) -> list[dict[str, Any]]:
    """Runs checks, each by itself: name, whether it holds, figures or what is wrong, seconds."""
    rows = []
    for name, check in checks.items():
        begin = time.perf_counter()
        try:
            holds, figures = True, check()
        except Exception as error:  # the next check may still say something
            holds, figures = False, first_line(error)
        rows.append(
            {"name": name, "holds": holds, "figures": figures, "seconds": time.perf_counter() - begin}
        )
    return rows


def same_as_torch(kind: str) -> str:
    """Losses of the first steps of JAX on the CPU and PyTorch on the device, in float32.

    Args:
        kind: device of PyTorch: "cuda" or "cpu".
    """
    import torch
    from torch_decoder import Decoder, Sizes, adamw, load, loss_of

    model = decoder(**TINY)
    tokens = tokens_of(256, (2, 65))
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    optimizer = optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    params = on_cpu(lambda: nn.unbox(model.init(jax.random.key(0), jnp.asarray(inputs))["params"]))
    moments = optimizer.init(params)
    theirs = Decoder(Sizes(256, 2, 128, 4, 2, 256, tied=True), 64)
    load(theirs, jax.tree.map(np.array, unstack_layers(params)))
    theirs = theirs.to(kind)
    torch_optimizer = adamw(theirs.parameters(), LEARNING_RATE, B1, B2, EPS, DECAY)

    @jax.jit
    def step(params: Any, moments: Any) -> tuple[Any, Any, jax.Array]:
        def loss(params: Any) -> jax.Array:
            logits = model.apply({"params": params}, jnp.asarray(inputs))
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(targets)))

        value, gradients = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(gradients, moments, params)
        return optax.apply_updates(params, updates), moments, value

    x, y = (torch.from_numpy(a).long().to(kind) for a in (inputs, targets))
    losses = []
    for _ in range(4):
        params, moments, value = step(params, moments)
        torch_optimizer.zero_grad(set_to_none=True)
        loss = loss_of(theirs(x), y)
        loss.backward()
        torch_optimizer.step()
        losses.append((float(value), loss.item()))
    worst = max(abs(a / b - 1) for a, b in losses)
    assert worst < 1e-4, f"losses differ by {worst:.1e}: {losses}"
    return f"losses of {len(losses)} steps within {worst:.1e}"
