"""`odjax plan` with the GPU compiler and without a GPU, where JAX's CUDA plugin is installed (`make aot`)."""

import pathlib

import pytest

from odjax.models import decoder
from odjax.models.decoder import flops_per_token
from odjax_train.config import load, parse
from odjax_train.flags import PlanFlags
from odjax_train.plan import gpu
from odjax_train.plan.chips import GPUS, parse_topology
from odjax_train.plan.planner import ask

needs_plugin = pytest.mark.skipif(
    not gpu.is_available(), reason="JAX's CUDA plugin is not installed (pip install 'odjax[gpu-aot]')"
)
CONFIG = pathlib.Path(__file__).parents[2] / "configs" / "lm_7b.py"
FLAGS = (
    "--preset",
    "tiny",
    "--batch",
    "16",
    "--length",
    "128",
    "--tokenizer",
    "vocab:256",
    "--remat",
    "none",
)


@needs_plugin
def test_the_gpu_compilers_program_has_the_models_operations():
    config = parse(load(CONFIG), PlanFlags, FLAGS, "odjax plan")[0]
    plan = ask(config, parse_topology("h100:8"), "2,2,2", parts=("step", "evaluate"))
    step = plan.part("step")
    assert [part.error for part in plan.parts] == ["", ""]
    needed = 16 * 128 // 8 * flops_per_token(decoder("tiny"), 128)
    assert step.model_flops == needed
    assert step.flops == needed
    assert {traffic.axis for traffic in step.traffic} >= {"fsdp", "tensor"}
    assert step.seconds > needed / GPUS["h100"].flops
    assert "CUDA plugin" in plan.versions
