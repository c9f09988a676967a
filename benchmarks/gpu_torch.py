"""The rows of `gpu.py` that PyTorch runs: the same decoder, whole or adapted by PEFT."""

import contextlib
import functools
import importlib.metadata
import importlib.util
from typing import Any

import torch
from gpu_row import B1, B2, DECAY, EPS, FACTOR_RATE, LEARNING_RATE, Setting, loss_problems, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch_decoder import Decoder, Sizes, adamw, llama, loss_of, with_lora

NEEDED = {
    "full": ("torch",),
    "peft": ("torch", "peft", "transformers"),
    "llama": ("torch", "peft", "transformers"),
}
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION]


def left_out(method: str, *, on_gpu: bool) -> str:
    """Why a row cannot run here; "" if it can."""
    missing = [name for name in NEEDED[method] if importlib.util.find_spec(name) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return "PyTorch sees no GPU" if on_gpu and not torch.cuda.is_available() else ""


def measured(method: str, setting: Setting, *, compiled: bool, on_gpu: bool) -> dict[str, Any]:
    """Checks and times a row: `full`, `peft` (PEFT on the same decoder) or `llama` (on that of transformers).

    What is trained is float32 under bfloat16 autocast; what an adapter freezes is bfloat16.
    """
    reason = left_out(method, on_gpu=on_gpu)
    if reason:
        return {"left_out": reason}
    kind, sizes = ("cuda" if on_gpu else "cpu"), Sizes(**setting.sizes)
    torch.manual_seed(0)
    with torch.device(kind):
        model = (
            llama(sizes, setting.length)
            if method == "llama"
            else Decoder(sizes, setting.length, torch.bfloat16)
        )
        tokens = torch.randint(0, sizes.vocab, (setting.batch, setting.length + 1))
    if method != "full":
        model = with_lora(model.to(torch.bfloat16), setting.rank)
    model = model.to(kind).train()
    rate = LEARNING_RATE if method == "full" else FACTOR_RATE
    optimizer = adamw(model.parameters(), rate, B1, B2, EPS, DECAY)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    forward = torch.compile(model) if compiled else model

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        with attention(), torch.autocast(kind, torch.bfloat16):
            out = forward(inputs)
            loss = loss_of(out if method != "llama" else out.logits, targets)
        loss.backward()
        optimizer.step()
        return loss.detach()

    fused = on_gpu and method != "llama"  # transformers chooses by itself
    attention = functools.partial(sdpa_kernel, FUSED) if fused else contextlib.nullcontext
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    peak = torch.cuda.max_memory_allocated if on_gpu else lambda: None
    found = timed(step, wait, peak, setting)
    return {
        **found._asdict(),
        # Nothing is compiled ahead: it is what the first step took longer.
        "compile_seconds": max(0.0, found.first - min(found.steps)),
        "problems": loss_problems(found.losses, sizes.vocab),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in NEEDED[method]),
    }
