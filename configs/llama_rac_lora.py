r"""Pretrained Llama weights, adapted to a text by low-rank updates; for accelerators.

    odjax train configs/llama_rac_lora.py --base Llama-3.2-1B --source 'text:books/*.txt' --mesh 1,-1,1
    odjax merge runs/llama_rac_lora-<code> --names torch        # or --method lora and: odjax export RUN

`--base` is a folder of Hugging Face: config.json, tokenizer.json and safetensors, in one file or in shards.
The frozen weights are bfloat16; a chain merges its blocks into them with stochastic rounding.
"""

from pathlib import Path
from typing import Literal

import optax

from odjax.lowrank import FACTORS, adapt, restart
from odjax.lowrank.methods import CHAINS
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer
from odjax_train.mesh import MeshShape


def experiment(
    base: Path,
    source: str,
    preset: str = "1b",
    tokenizer: str | None = None,
    method: Literal["rac", "lora", "rslora", "lora_fa", "cola", "dora"] = "rac",
    rank: int = 16,
    alpha: float | None = None,
    where: str = r".*(attn|mlp).*/kernel",
    block: int = 200,
    steps: int = 2000,
    batch: int = 64,
    length: int = 2048,
    learning_rate: float = 3e-4,
    warmup: int = 50,
    accumulate: int = 1,
    remat: str = "full",
    attention: Literal["xla", "cudnn", "blocked", "splash"] | None = None,
    seed: int = 0,
) -> Experiment:
    """Pretrained Llama weights, adapted to a text by low-rank updates.

    Args:
        base: folder with the weights and the tokenizer.
        source: the text, `text:<file or glob>` or `arrayrecord:<glob>`.
        preset: the size that the weights have: `1b`, `7b`, `8b`, `70b`.
        tokenizer: another than the one in that folder.
        method: how the weights are adapted.
        rank: of the update of every matrix.
        alpha: the update is scaled by alpha / rank; None for a scale of 1.
        where: which weights are adapted.
        block: steps between two merges, for the chains `rac` and `cola`.
        steps: optimizer steps.
        batch: sequences in a step.
        length: tokens in a sequence.
        learning_rate: highest, after the warm-up.
        warmup: steps over which the learning rate rises.
        accumulate: microbatches a step.
        remat: what is kept of a layer's activations for the backward pass.
        attention: implementation; None: JAX's choice. `splash` is a kernel for TPUs, `cudnn` one for GPUs.
        seed: of everything random.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), 0.1 * learning_rate
    )
    weights = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    model = decoder(preset, max_length=length, remat=remat, attention=attention, **weights)
    model = adapt(model, method=method, rank=rank, alpha=alpha, where=where)
    return Experiment(
        model=model,
        task=language_model(),
        data=Text(source=source, length=length, tokenizer=load_tokenizer(tokenizer or str(base))),
        optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        schedule=schedule,
        trainable=FACTORS,
        start_from=base,
        edits=(restart(model, every=block, stochastic=True),) if method in CHAINS else (),
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        mesh=MeshShape(data=1, fsdp=-1, tensor=1),
        eval_every=200,
        eval_batches=50,
        checkpoint_every=50,
    )
