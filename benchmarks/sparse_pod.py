"""The sparse Llama on a pod that is not there: the TPU compiler on its step and its change of links.

    pip install -e '.[aot]'
    python benchmarks/sparse_pod.py                       # configs/llama_60m_chts.py on 16 chips of v5e
    python benchmarks/sparse_pod.py --topology v5e:8x8 --preset 1b --batch 512 --method chtss

Bytes are those of one chip, from the compiler's `memory_analysis`. Nothing runs.
"""

import argparse
import os
import pathlib
import tempfile
import time

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
from jax.experimental import topologies
from tokenizers import Tokenizer, models

from odjax.core import leaves_with_paths
from odjax_train.config import load
from odjax_train.mesh import MeshShape, make_mesh
from odjax_train.program import build, packed_masks

CONFIG = pathlib.Path(__file__).parents[1] / "configs" / "llama_60m_chts.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--preset", default="60m")
    parser.add_argument("--method", default="chts")
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--divide", action="store_true", help="divide the scores by hand")
    options = parser.parse_args()

    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.topology).devices
    mesh = make_mesh(MeshShape(1, -1, options.tensor), devices)
    words = Tokenizer(models.WordLevel({str(i): i for i in range(options.vocab)}, "0"))
    tokenizer = pathlib.Path(tempfile.mkdtemp()) / "tokenizer.json"
    words.save(str(tokenizer))
    flags = {
        "preset": options.preset,
        "method": options.method,
        "batch": options.batch,
        "divide_scores": options.divide,
        "tokenizer": str(tokenizer),
        "source": "pydoc",
    }
    program = build(load(CONFIG, flags).experiment(), mesh)
    state = dict(leaves_with_paths(program.state.opt_state))
    words = packed_masks(program.state.opt_state)
    print(f"{options.topology}: {options.preset}, {options.method}, batch {options.batch}, mesh {mesh.shape}")
    print(
        f"  optimizer's state {sum(x.size * x.dtype.itemsize for x in state.values()) / 1e6:.1f} MB in all, "
        f"of it masks {sum(x.size * 4 for x in words.values()) / 1e6:.1f} MB"
    )
    with program.context():
        report("step", program.step.lower(program.state, program.batch))
        for edit, apply in program.edits:
            report(edit.name, apply.lower(program.state))


def report(name: str, lowered: jax.stages.Lowered) -> None:
    begin = time.perf_counter()
    compiled = lowered.compile()
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    print(
        f"  {name}: arguments {memory.argument_size_in_bytes / 1e6:.1f} MB, temporaries "
        f"{memory.temp_size_in_bytes / 1e6:.1f} MB, {cost['flops'] / 1e9:.1f} GFLOP (loop bodies once); "
        f"compiled in {time.perf_counter() - begin:.0f} s"
    )


if __name__ == "__main__":
    main()
