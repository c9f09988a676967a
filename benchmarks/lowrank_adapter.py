"""A training step of an adapted decoder: RAC-LoRA against LoRA on a frozen base, and PyTorch + PEFT.

The steps alternate in one process on the CPU; the medians of wall time and of processor time are printed with
their ratios.

    python benchmarks/lowrank_adapter.py [--layers 4 --width 256 --batch 8 --length 128 --rank 8]
    python benchmarks/lowrank_adapter.py --peft     # also PEFT: needs torch, transformers and peft

Expected: rac / lora at most 1.02 in both; PEFT / lora above 1.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (
        ("layers", 4),
        ("width", 256),
        ("heads", 4),
        ("mlp-width", 704),
        ("vocab", 256),
        ("batch", 8),
        ("length", 128),
        ("rank", 8),
        ("rounds", 8),
        ("steps", 3),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--peft", action="store_true", help="time PyTorch + PEFT too")
    return parser.parse_args()


def jax_step(args: argparse.Namespace, method: str, **settings: Any) -> Callable[[], None]:
    """One step of Adam on the factors of all linear layers; the frozen base never moves."""
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import optax

    from odjax.core import combine, partition
    from odjax.lowrank.adapt import adapt
    from odjax.lowrank.methods import FACTORS
    from odjax.models import Decoder

    model = adapt(
        Decoder(
            vocab=args.vocab,
            layers=args.layers,
            width=args.width,
            heads=args.heads,
            mlp_width=args.mlp_width,
            max_length=args.length,
        ),
        rank=args.rank,
        method=method,
        where="layers/.*kernel",
        **settings,
    )
    tokens = jax.random.randint(jax.random.key(1), (args.batch, args.length), 0, args.vocab)
    params = nn.unbox(jax.jit(model.init)(jax.random.key(0), tokens)["params"])
    free, frozen = partition(params, FACTORS)
    optimizer = optax.adam(1e-3)
    state = optimizer.init(free)

    @jax.jit
    def step(free: Any, state: Any) -> tuple[Any, Any]:
        def loss(free: Any) -> jax.Array:
            logits = model.apply({"params": combine(free, frozen)}, tokens)[:, :-1]
            return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]))

        updates, state = optimizer.update(jax.grad(loss)(free), state, free)
        return optax.apply_updates(free, updates), state

    carry = [(free, state)]

    def once() -> None:
        carry[0] = jax.block_until_ready(step(*carry[0]))

    return once


def peft_step(args: argparse.Namespace) -> Callable[[], None]:
    """The same step of a Llama of the same size in PyTorch, adapted by PEFT."""
    import peft
    import torch
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.mlp_width,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        max_position_embeddings=args.length,
        use_cache=False,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = peft.LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=names)
    model = peft.get_peft_model(transformers.LlamaForCausalLM(config), lora)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    tokens = torch.randint(0, args.vocab, (args.batch, args.length))

    def once() -> None:
        optimizer.zero_grad(set_to_none=True)
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return once


def main() -> None:
    args = arguments()
    steps = {
        "lora": jax_step(args, "lora"),
        "rac": jax_step(args, "rac"),
        "rac, cached sketches": jax_step(args, "rac", cache_sketch=True),
    }
    if args.peft:
        steps["peft"] = peft_step(args)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in steps}
    for step in steps.values():
        step()
        step()
    for _ in range(args.rounds):
        for name, step in steps.items():
            for _ in range(args.steps):
                wall, cpu = time.perf_counter(), time.process_time()
                step()
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    for name, (wall, cpu) in medians.items():
        wall_ratio, cpu_ratio = wall / medians["lora"][0], cpu / medians["lora"][1]
        print(
            f"{name:22s} wall {wall * 1e3:8.1f} ms ({wall_ratio:.3f} of lora)   "
            f"processor {cpu * 1e3:8.1f} ms ({cpu_ratio:.3f})"
        )


if __name__ == "__main__":
    main()
