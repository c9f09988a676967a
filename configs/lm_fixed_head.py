"""A byte-level language model whose output vectors are fixed: a Hadamard code that is never stored.

    odjax train configs/lm_fixed_head.py
    odjax train configs/lm_fixed_head.py --head learned --run runs/lm_learned_head

`odjax reproduce etf-head-lm` compares the two on one text.
"""

from typing import Literal

import optax

from odjax.heads import FixedHead
from odjax.models import Decoder
from odjax_train import Experiment, Sample, language_model
from odjax_train.data import Text, load_tokenizer


def experiment(
    steps: int = 260,
    batch: int = 32,
    length: int = 128,
    layers: int = 4,
    width: int = 128,
    head: Literal["hadamard", "sphere", "gaussian", "learned"] = "hadamard",
    bias: bool = True,
    scale: float = 4.0,
    chunk: int = 8192,
    learning_rate: float = 3e-3,
    warmup: int = 40,
    weight_decay: float = 0.1,
    clip: float = 1.0,
    source: str = "stdlib",
    tokenizer: str = "byte",
    dtype: str = "float32",
    attention: str | None = "blocked",
    scan: bool = False,
    seed: int = 0,
) -> Experiment:
    """A byte-level language model whose output vectors are fixed.

    Args:
        steps: optimizer steps.
        batch: sequences in a step.
        length: tokens in a sequence.
        layers: depth of the decoder.
        width: of the residual stream; a power of two for a Hadamard code.
        head: the code of the output vectors, or a learned matrix.
        bias: a trainable number a class beside the fixed vectors.
        scale: of the logits of a fixed head, at the start (the last norm learns it).
        chunk: classes at a time in the loss of a fixed head.
        learning_rate: highest, after the warm-up.
        warmup: steps over which the learning rate rises.
        weight_decay: of AdamW.
        clip: largest norm of a gradient.
        source: the text, `stdlib`, `text:<file or glob>` or `arrayrecord:<glob>`.
        tokenizer: a `tokenizer.json`, or `byte`.
        dtype: of the computation; bfloat16 on accelerators.
        attention: how it is computed: `blocked` is fastest on CPUs; `xla`, `cudnn` or None on accelerators.
        scan: scan the layers (faster to compile) instead of unrolling them (faster on CPUs).
        seed: of everything random but the code, which is always the same.
    """
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), end_value=0.1 * learning_rate
    )
    text = load_tokenizer(tokenizer)
    fixed = None
    if head != "learned":
        fixed = FixedHead(
            text.vocab, head, scale=scale, norm="none", bias=bias, stored=False, chunk=chunk, dtype=dtype
        )
    model = Decoder(
        vocab=text.vocab,
        layers=layers,
        width=width,
        heads=max(1, width // 32),
        mlp_width=8 * width // 3,
        max_length=max(length, 512),
        head=fixed,
        dtype=dtype,
        attention=attention,
        scan=scan,
    )
    return Experiment(
        model=model,
        task=language_model(head_losses=fixed is not None),
        data=Text(source=source, length=length, tokenizer=text),
        optimizer=optax.chain(
            optax.clip_by_global_norm(clip), optax.adamw(schedule, b2=0.98, weight_decay=weight_decay)
        ),
        schedule=schedule,
        steps=steps,
        batch=batch,
        seed=seed,
        eval_every=100,
        eval_batches=16,
        checkpoint_every=100,
        sample=Sample("def read(", length=300),
    )
