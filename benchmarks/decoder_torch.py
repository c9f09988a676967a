"""A training step of the decoder against the same model in PyTorch, both on the CPU in float32.

Same weights, same batch, same optimizer: the losses of the first steps are compared before anything is timed.
The two alternate in one process, and the ratio of the medians is printed, of wall time and of processor time
(which other work on the machine disturbs less).

    pip install odjax[bench]
    python benchmarks/decoder_torch.py [--layers 4 --width 256 --heads 4 --batch 8 --length 256]

docs/performance.md has the figure and the machine. Other work on the machine makes PyTorch's threads wait for
one another much more than JAX's: the figure of a busy machine flatters JAX.
"""

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

LEARNING_RATE, B1, B2, EPS, DECAY = 3e-4, 0.9, 0.95, 1e-8, 0.1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--kv-heads", type=int, default=None)
    parser.add_argument("--mlp-width", type=int, default=704)
    parser.add_argument("--vocab", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=8, help="how often the two alternate")
    parser.add_argument("--steps", type=int, default=4, help="timed steps a round")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--no-scan", dest="scan", action="store_false", help="unroll the layers in JAX")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the model (needs a C++ compiler)"
    )
    parser.add_argument("--attention", default=None, help="JAX's attention: xla or blocked")
    parser.add_argument("--plain-malloc", action="store_true", help="give freed memory back to the system")
    parser.add_argument("--json", help="file to write the result to")
    args = parser.parse_args()
    args.kv_heads = args.kv_heads or args.heads
    return args


def jax_step(args: argparse.Namespace, tokens: Any) -> tuple[Callable[..., Any], Any, Any]:
    """The compiled step, its state, and the parameters it started from as unrolled NumPy arrays."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax

    from odjax.models import Decoder, unstack_layers

    model = Decoder(
        vocab=args.vocab,
        layers=args.layers,
        width=args.width,
        heads=args.heads,
        kv_heads=args.kv_heads,
        mlp_width=args.mlp_width,
        max_length=args.length,
        scan=args.scan,
        attention=args.attention,
    )
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), inputs))["params"]
    optimizer = optax.adamw(LEARNING_RATE, b1=B1, b2=B2, eps=EPS, weight_decay=DECAY)
    start = jax.tree.map(np.array, unstack_layers(params) if args.scan else params)

    def loss(params: Any) -> jax.Array:
        logits = model.apply({"params": params}, inputs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state: Any) -> tuple[Any, jax.Array]:
        params, moments = state
        value, grads = jax.value_and_grad(loss)(params)
        updates, moments = optimizer.update(grads, moments, params)
        return (optax.apply_updates(params, updates), moments), value

    return step, (params, jax.jit(optimizer.init)(params)), start


def torch_step(args: argparse.Namespace, tokens: Any, start: Any) -> Callable[[], float]:
    """The same model, weights and optimizer in PyTorch; returns a function that makes one step."""
    import torch
    from torch_decoder import Decoder, Sizes, adamw, load, loss_of

    torch.set_num_threads(args.threads)
    model = Decoder(
        Sizes(args.vocab, args.layers, args.width, args.heads, args.kv_heads, args.mlp_width), args.length
    )
    load(model, start)
    optimizer = adamw(model.parameters(), LEARNING_RATE, B1, B2, EPS, DECAY)
    inputs, targets = torch.from_numpy(tokens[:, :-1]).long(), torch.from_numpy(tokens[:, 1:]).long()
    forward = torch.compile(model) if args.compile else model

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(forward(inputs), targets)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def timed(step: Callable[[], float], steps: int) -> list[tuple[float, float]]:
    """Wall and processor seconds of each step, after a pause for sleep and one step."""
    time.sleep(0.4)
    step()
    seconds = []
    for _ in range(steps):
        wall, processor = time.perf_counter(), time.process_time()
        step()
        seconds.append((time.perf_counter() - wall, time.process_time() - processor))
    return seconds


def middle(seconds: Sequence[tuple[float, float]], kind: int) -> float:
    """The median of wall (0) or processor (1) seconds."""
    return statistics.median(pair[kind] for pair in seconds)


def main() -> None:
    args = arguments()
    if not args.plain_malloc:
        from odjax_train.cpu import keep_freed_memory

        keep_freed_memory()
    import jax

    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    import torch

    tokens = np.random.default_rng(0).integers(0, args.vocab, (args.batch, args.length + 1), dtype=np.int32)
    compiled, state, start = jax_step(args, tokens)
    holder = [state]

    def ours() -> float:
        holder[0], loss = compiled(holder[0])
        return float(loss)

    theirs = torch_step(args, tokens, start)
    losses = [(ours(), theirs()) for _ in range(4)]
    print("losses (jax, torch):", ", ".join(f"{a:.6f} {b:.6f}" for a, b in losses))
    np.testing.assert_allclose(*zip(*losses, strict=True), rtol=2e-5)

    ours_times, theirs_times, rounds = [], [], []
    for _ in range(args.rounds):
        ours_times += (a := timed(ours, args.steps))
        theirs_times += (b := timed(theirs, args.steps))
        rounds.append(middle(b, 0) / middle(a, 0))
    result = {
        "jax_ms": 1e3 * middle(ours_times, 0),
        "torch_ms": 1e3 * middle(theirs_times, 0),
        "torch_over_jax": middle(theirs_times, 0) / middle(ours_times, 0),
        "torch_over_jax_of_rounds": [min(rounds), max(rounds)],
        "torch_over_jax_processor": middle(theirs_times, 1) / middle(ours_times, 1),
        "jax": jax.__version__,
        "torch": torch.__version__,
        "threads": args.threads,
        "compiled": args.compile,
        "scan": args.scan,
        "attention": args.attention,
        "plain_malloc": args.plain_malloc,
    }
    print(
        f"jax {result['jax_ms']:.1f} ms, torch {result['torch_ms']:.1f} ms a step; above 1, JAX is faster: "
        f"torch / jax = {result['torch_over_jax']:.2f} (rounds {min(rounds):.2f} to {max(rounds):.2f}), "
        f"of processor time {result['torch_over_jax_processor']:.2f}"
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(result, file, indent=1)


if __name__ == "__main__":
    main()
