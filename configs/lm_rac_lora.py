"""The main job's language model, adapted from Python source to English prose.

    odjax train configs/lm_stdlib.py        # first: what is adapted
    odjax train configs/lm_rac_lora.py      # a RAC-LoRA chain; --method lora, cola, full and others beside it

Where nothing but factors is trained, a checkpoint holds the factors; the weights are written when a block has
been merged into them.
"""

from pathlib import Path
from typing import Literal

import optax

from odjax.lowrank import FACTORS, adapt, jagged_cosine, restart
from odjax.lowrank.methods import CHAINS
from odjax.models import decoder
from odjax_train import Experiment, Sample, language_model
from odjax_train.data import Text

# Largest learning rates: the best of three to five each for full, rac and lora, whose rate the others have.
RATES = {"full": 3e-3, "rac": 2e-3}


def experiment(
    method: Literal[
        "rac", "lora", "rslora", "asym", "lora_fa", "cola", "relora", "dora", "pissa", "dylora", "full"
    ] = "rac",
    start_from: Path = Path("runs/lm_stdlib"),
    steps: int = 160,
    batch: int = 32,
    length: int = 128,
    preset: str = "byte-small",
    rank: int = 8,
    alpha: float | None = None,
    where: str = r".*(attn|mlp).*/kernel",
    block: int = 40,
    side: Literal["auto", "left", "right"] = "auto",
    learning_rate: float | None = None,
    warmup: int = 10,
    rewarm: int = 10,
    clip: float = 1.0,
    source: str = "pydoc",
    held_out: float = 0.15,
    dtype: str = "float32",
    attention: str | None = "blocked",
    scan: bool = False,
    seed: int = 0,
) -> Experiment:
    """The main job's language model, adapted to other text by low-rank updates.

    Args:
        method: how it is adapted; `full` trains all weights.
        start_from: the run to adapt, or a file that `odjax merge` wrote.
        steps: optimizer steps.
        batch: sequences in a step.
        length: bytes in a sequence.
        preset: size of the decoder, as in that run.
        rank: of the update of every matrix.
        alpha: the update is scaled by alpha / rank; None for a scale of 1.
        where: which weights are adapted.
        block: steps between two merges, for the chains `rac`, `cola` and `relora`.
        side: of the random factor, for `rac` and `asym`.
        learning_rate: highest, after the warm-up; None takes the method's own.
        warmup: steps over which the learning rate rises.
        rewarm: steps over which a chain's learning rate rises again after a merge.
        clip: largest norm of a gradient.
        source: the text, `pydoc`, `text:<file or glob>` or `arrayrecord:<glob>`.
        held_out: the part of it to judge on.
        dtype: of the computation; bfloat16 on accelerators.
        attention: how it is computed: `blocked` is fastest on CPUs; `xla`, `cudnn` or None on accelerators.
        scan: whether that run scanned its layers.
        seed: of everything random.
    """
    peak = RATES.get(method, 1.2e-2) if learning_rate is None else learning_rate
    warmup = min(warmup, steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, 1), 0.1 * peak)
    if method in CHAINS and block < steps:
        schedule = jagged_cosine(peak, steps, block, warmup=warmup, rewarm=min(rewarm, block))
    model = decoder(preset, max_length=max(length, 512), dtype=dtype, attention=attention, scan=scan)
    edits = ()
    if method != "full":
        sided = {"side": side} if method in ("rac", "asym") else {}
        model = adapt(model, method=method, rank=rank, alpha=alpha, where=where, **sided)
        edits = (restart(model, every=block),) if method in CHAINS else ()
    return Experiment(
        model=model,
        task=language_model(),
        data=Text(source=source, length=length, held_out=held_out),
        optimizer=optax.chain(optax.clip_by_global_norm(clip), optax.adam(schedule, b2=0.98)),
        schedule=schedule,
        trainable=".*" if method == "full" else FACTORS,
        start_from=start_from,
        edits=edits,
        steps=steps,
        batch=batch,
        seed=seed,
        eval_every=40,
        checkpoint_every=20,
        sample=Sample("The statement ", length=300),
    )
