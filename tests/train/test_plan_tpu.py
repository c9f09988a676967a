"""`odjax plan` with the TPU compiler, where it is installed: estimates between the bounds of the roofline."""

import json
import pathlib

import pytest

from odjax.models import decoder
from odjax.models.decoder import flops_per_token
from odjax_kernels import aot
from odjax_train.config import load, parse
from odjax_train.flags import PlanFlags
from odjax_train.plan.chips import TPUS, parse_topology
from odjax_train.plan.planner import ask

pytestmark = pytest.mark.skipif(
    not aot.is_available(), reason="libtpu is not installed (pip install 'odjax[aot]')"
)

SIZE, LAYERS, WIDTH, HIDDEN, LENGTH, BATCH = 2048, 2, 512, 1024, 256, 16

CONFIG = f"""
import optax
from odjax.core import Edit
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer


def shrink(key, step, params, opt_state):
    return {{**params, "norm": {{"scale": params["norm"]["scale"] * 0.5}}}}, opt_state


def experiment(batch: int = {BATCH}, remat: str = "full", length: int = {LENGTH}, layers: int = {LAYERS}) -> Experiment:
    \"\"\"A small decoder.\"\"\"
    model = decoder("tiny", vocab=512, width={WIDTH}, mlp_width={HIDDEN}, heads=4, kv_heads=4, layers=layers,
                    max_length=length, tied=False, remat=remat, dtype="bfloat16", param_dtype="bfloat16")
    return Experiment(
        model=model, task=language_model(), optimizer=optax.sgd(0.1), steps=6, batch=batch,
        data=Text(source="nowhere:x", length=length, tokenizer=load_tokenizer("vocab:512")),
        edits=(Edit(shrink, every=3, name="shrink"),))
"""


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """The small decoder on eight chips, sharded over all of them."""
    path = tmp_path_factory.mktemp("tpu") / "small.py"
    path.write_text(CONFIG)
    config = parse(load(path), PlanFlags, [], "odjax plan")[0]
    return ask(config, parse_topology("v5e:2x4"), "1,8,1")


def test_a_row_for_every_function(planned):
    assert {part.name: part.error for part in planned.parts} == dict.fromkeys(
        ("init", "step", "evaluate", "shrink"), ""
    )
    assert planned.fits
    assert planned.tokens == BATCH * LENGTH


def test_operations_are_exact_and_the_time_is_above_the_floor(planned):
    step = planned.part("step")
    model = decoder(
        "tiny", vocab=512, width=WIDTH, mlp_width=HIDDEN, heads=4, kv_heads=4, layers=LAYERS, tied=False
    )
    tokens = BATCH * LENGTH // 8
    needed = tokens * flops_per_token(model, LENGTH)
    forward = tokens * flops_per_token(model, LENGTH, training=False)
    # Of a layer all is computed again but its last product; the head is not.
    again = forward - tokens * 2 * (WIDTH * 512 + LAYERS * HIDDEN * WIDTH)
    assert step.model_flops == needed
    assert step.flops == needed + again
    chip = TPUS["v5e"]
    assert step.use["compute"] > step.flops / chip.flops
    assert 0 < step.utilization(chip) < 1
    assert step.seconds == pytest.approx(sum(step.use.values()))


def test_gathers_are_of_one_layer(planned):
    step = planned.part("step")
    stacked = LAYERS * WIDTH * HIDDEN * 2
    assert {traffic.axis for traffic in step.traffic} == {"fsdp"}
    assert all(traffic.largest < stacked for traffic in step.traffic if traffic.kind == "all-gather")


PRODUCT = """
import json, sys
import jax, jax.numpy as jnp, numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from odjax_kernels import hlo, hlo_flops
from odjax_train.plan.chips import parse_topology
from odjax_train.plan.schedule import play

found = {}
for name in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    devices = topologies.get_topology_desc(platform="tpu", topology_name=name).devices
    mesh = Mesh(np.array(devices[:1]).reshape(1, 1, 1), ("data", "fsdp", "tensor"))
    x = jax.ShapeDtypeStruct((SIZE, SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
    for times in (1, 5, 10):
        w = jax.ShapeDtypeStruct((times, SIZE, SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, P()))
        loop = lambda a, w: jax.lax.scan(lambda a, b: (a @ b, None), a, w)[0]
        program = hlo.parse(jax.jit(loop).lower(x, w).compile().as_text())
        seconds = play(program, mesh, parse_topology(name)).use.seconds
        found.setdefault(name, {})[times] = [hlo_flops.flops(program), seconds]
print(json.dumps(found))
""".replace("SIZE", str(SIZE))


def test_a_product_takes_between_the_floor_and_twice_of_it_and_a_loop_as_often_as_it_runs():
    for name, runs in json.loads(aot.run_script(PRODUCT)).items():
        chip = TPUS[name.partition(":")[0]]
        floor = max(2 * SIZE**3 / chip.flops, 3 * 2 * SIZE**2 / chip.bandwidth)
        assert {times: flops for times, (flops, _) in runs.items()} == {
            times: int(times) * 2 * SIZE**3 for times in runs
        }, name
        once, five, ten = (runs[times][1] for times in ("1", "5", "10"))
        assert floor <= once <= 2 * floor, name
        assert five >= 5 * floor, name
        assert ten - five == pytest.approx(five, rel=0.2), name


@pytest.mark.every_chip
def test_the_change_of_links_of_the_sparse_llama_compiles_for_sixteen_chips():
    # The compiler once died of the words of a mask fused with the mask.
    file = pathlib.Path(__file__).parents[2] / "configs" / "llama_60m_chts.py"
    config = parse(load(file), PlanFlags, ["--tokenizer", "vocab:32000"], "odjax plan")[0]
    change = ask(config, parse_topology("v5e:4x4"), "1,16,1", parts=("topology",)).part("topology")
    assert change.error == ""
    assert change.temporaries < change.arguments


def test_what_does_not_fit_says_by_how_much_and_what_is_large(planned):
    config = parse(
        load(pathlib.Path(planned.config)),
        PlanFlags,
        ["--remat", "none", "--batch", "4096", "--layers", "32"],
        "plan",
    )[0]
    plan = ask(config, parse_topology("v5e:2x2"), "1,4,1", parts=("step",))
    step = plan.part("step")
    assert not plan.fits
    assert step.error == "does not fit into the memory"
    assert step.short > 2**30


def test_a_federated_round_is_one_sum_over_the_chips():
    config = pathlib.Path(__file__).parents[2] / "configs" / "fed_digits.py"
    flags = ["--clients", "16", "--cohort", "8", "--epsilon", "8", "--steps", "4", "--delta", "0.01"]
    plan = ask(parse(load(config), PlanFlags, flags, "odjax plan")[0], parse_topology("v5e:2x2"), "4,1,1")
    assert {part.name: part.error for part in plan.parts} == dict.fromkeys(("init", "step", "evaluate"), "")
    step = next(part for part in plan.parts if part.name == "step")
    assert [(each.kind, each.axis, each.count) for each in step.traffic] == [("all-reduce", "data", 1)]
