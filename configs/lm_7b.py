r"""A Llama-2-7B-sized language model, for a pod.

    odjax train configs/lm_7b.py --source 'arrayrecord:/data/text-*.array_record' \
      --tokenizer tokenizer.json --mesh 1,256,1

In float32 the parameters and Adam's moments take 81 GB: over 256 chips 0.3 GB each, before activations.
"""

from typing import Literal

import optax

from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer
from odjax_train.mesh import MeshShape


def experiment(
    steps: int = 100_000,
    batch: int = 1024,
    length: int = 2048,
    preset: str = "7b",
    learning_rate: float = 3e-4,
    warmup: int = 2000,
    weight_decay: float = 0.1,
    accumulate: int = 1,
    remat: str = "full",
    attention: Literal["xla", "cudnn", "blocked", "splash"] | None = None,
    source: str = "arrayrecord:data/*.array_record",
    tokenizer: str = "tokenizer.json",
    seed: int = 0,
) -> Experiment:
    """A Llama-2-7B-sized language model, for a pod.

    Args:
        steps: optimizer steps.
        batch: sequences in a step.
        length: tokens in a sequence.
        preset: size of the decoder.
        learning_rate: highest, after the warm-up.
        warmup: steps over which the learning rate rises.
        weight_decay: of AdamW.
        accumulate: microbatches a step.
        remat: what is kept of a layer's activations for the backward pass.
        attention: implementation; None: JAX's choice. `splash` is a kernel for TPUs, `cudnn` one for GPUs.
        source: the text.
        tokenizer: a `tokenizer.json`, `byte`, or for a plan the size alone, `vocab:32000`.
        seed: of everything random.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), end_value=0.1 * learning_rate
    )
    return Experiment(
        model=decoder(preset, max_length=length, dtype="bfloat16", remat=remat, attention=attention),
        task=language_model(z_loss=1e-4),
        data=Text(source=source, length=length, tokenizer=load_tokenizer(tokenizer)),
        optimizer=optax.chain(
            optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=weight_decay)
        ),
        schedule=schedule,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        mesh=MeshShape(data=1, fsdp=-1, tensor=1),
        eval_every=1000,
        eval_batches=50,
        checkpoint_every=1000,
    )
