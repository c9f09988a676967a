"""How long Pallas kernels take, which the compiler gives no time for: those of splash attention."""

import math

from odjax_kernels.hlo import Instruction
from odjax_train.plan.chips import Chip

# Cycles for 1024 queries and 1024 keys of a head of up to 128 numbers: the instruction words of the kernels'
# schedule as libtpu 0.0.42.1 compiles them, one a cycle. v5p divides the heads over its two cores.
_BLOCK = 1024
_WORDS = {
    "v4": {"fwd": 6170, "dkv": 10350, "dq": 6300},
    "v5e": {"fwd": 6170, "dkv": 10350, "dq": 6300},
    "v5p": {"fwd": 3085, "dkv": 5175, "dq": 3150},
    "v6e": {"fwd": 4133, "dkv": 6474, "dq": 3941},
}


def attention_seconds(kernel: Instruction, operands: dict[str, Instruction], chip: Chip) -> float | None:
    """Seconds of one of splash attention's kernels.

    Blocks behind the diagonal are taken to be skipped where there are as many keys as queries.

    Args:
        kernel: an instruction that runs it.
        operands: instructions by name.
        chip: it runs on.

    Returns:
        None for any other instruction, and for a chip that nothing is known of.
    """
    found = kernel.name.removeprefix("splash_mha_")
    kind = next((kind for kind in ("fwd", "dkv", "dq") if found.startswith(kind)), None)
    if found == kernel.name or kind is None or chip.name not in _WORDS:
        return None
    shapes = [shape.dims for name in kernel.operands if name in operands for shape in operands[name].shapes]
    # [heads, length, width] of queries, then of keys; under `vmap` there are sequences before them.
    wide = [dims for dims in shapes if len(dims) >= 3 and dims[-2] >= 128 and dims[-1] > 8][:2]
    if len(wide) < 2:
        return None
    (*heads, queries, width), (*_, keys, _) = wide
    blocks = queries * keys / _BLOCK**2
    if queries == keys:
        n = max(1, queries // _BLOCK)
        blocks *= (n + 1) / (2 * n)
    return math.prod(heads) * blocks * max(1.0, width / 128) * _WORDS[chip.name][kind] / chip.clock
