"""`odjax plan` without a TPU compiler: what it counts is exact, what is wrong is said, a search goes on."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from odjax.core import leaves_with_paths
from odjax.models import decoder
from odjax.models.decoder import flops_per_token
from odjax_kernels import aot
from odjax_train import cli, report
from odjax_train import config as configs
from odjax_train.errors import UserError
from odjax_train.flags import PlanFlags
from odjax_train.plan import child, measure, model, planner, search
from odjax_train.plan.chips import TPUS, parse_topology
from odjax_train.plan.flops import model_flops, plain, product_flops
from odjax_train.plan.memory import saved_bytes, state_memory
from odjax_train.plan.parts import Part, Plan, from_json, to_json
from odjax_train.plan.table import duration, render, verdict

CONFIG = """
import jax, optax
from odjax.lowrank import FACTORS, adapt, restart
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer


def experiment(batch: int = 8, remat: str = "none", accumulate: int = 1, adapted: bool = False,
               tokenizer: str = "byte", width: int = 96) -> Experiment:
    \"\"\"A tiny decoder.\"\"\"
    model = decoder("tiny", max_length=64, remat=remat, width=width, mlp_width=256)
    more = {}
    if adapted:
        model = adapt(model, method="rac", rank=4, where=r".*(attn|mlp).*/kernel")
        more = {"trainable": FACTORS, "edits": (restart(model, every=5),)}
    return Experiment(
        model=model, task=language_model(), data=Text(source="nowhere:x", length=64, tokenizer=load_tokenizer(tokenizer)),
        optimizer=optax.sgd(0.1), steps=6, batch=batch, accumulate=accumulate, **more)
"""


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("plan") / "tiny.py"
    path.write_text(CONFIG)
    return path


def parsed(path, *flags):
    return configs.parse(configs.load(path), PlanFlags, flags, "odjax plan")[0]


def answered(path, *flags, mesh="2,2,2", parts=("head", "init", "step", "evaluate", "restart")):
    request = {
        "config": str(path),
        "flags": list(flags),
        "topology": "here",
        "slices": 1,
        "mesh": mesh,
        "parts": list(parts),
    }
    return dict(child.answers(request))


@pytest.fixture(scope="module")
def adapted(config_file):
    with pytest.MonkeyPatch.context() as patch, jax.numpy_dtype_promotion("standard"):
        patch.setattr(measure, "LONGEST", 0.0)
        return answered(config_file, "--adapted")


def test_every_function_of_a_run_is_a_part(adapted):
    assert adapted["head"]["parts"] == ["init", "step", "evaluate", "restart"]
    assert [record["error"] for name, record in adapted.items() if name != "head"] == [""] * 4
    assert all(adapted[name]["seconds"] > 0 and adapted[name]["measured"] for name in ("step", "restart"))


def test_the_memory_of_the_state_is_what_a_device_holds(config_file, program_of, adapted):
    program = program_of(parsed(config_file, "--adapted").experiment(), 2, 2, 2)
    state = program.init()
    held = {path: leaf.addressable_shards[0].data.nbytes for path, leaf in leaves_with_paths(state.params)}
    memory = adapted["head"]["memory"]
    trained = sum(size for path, size in held.items() if path.rpartition("/")[2] in ("lora_a", "lora_b"))
    assert memory["parameters"] == trained
    assert memory["frozen parameters"] == sum(held.values()) - trained
    assert memory["batch"] == sum(int(np.prod(leaf.shape)) * 4 // 4 for leaf in program.batch.values())
    _, largest = state_memory(program)
    assert largest[0].bytes == max(held.values())


def test_operations_of_a_decoder_are_those_of_the_closed_form(config_file, program_of):
    program = program_of(parsed(config_file).experiment(), 1, 1, 1)
    step, evaluation = model_flops(program.experiment, program.state, program.batch)
    tiny = decoder("tiny", max_length=64)
    tokens = 8 * 64
    assert step == tokens * flops_per_token(tiny, 64)
    assert evaluation == tokens * flops_per_token(tiny, 64, training=False)


def test_frozen_weights_have_no_gradient_to_compute(config_file, program_of):
    program = program_of(parsed(config_file, "--adapted").experiment(), 1, 1, 1)
    step, evaluation = model_flops(program.experiment, program.state, program.batch)
    whole = 8 * 64 * flops_per_token(decoder("tiny", max_length=64), 64)
    assert 2 / 3 * whole < step < 0.85 * whole
    assert evaluation < 1.15 * whole / 3


@pytest.mark.parametrize("remat", ["none", "full"])
def test_the_compiled_step_computes_that_and_what_is_computed_again(config_file, remat, monkeypatch):
    monkeypatch.setattr(measure, "seconds", lambda *_: 1.0)
    with jax.numpy_dtype_promotion("standard"):
        step = answered(config_file, "--remat", remat, mesh="8,1,1", parts=["step"])["step"]
    model = decoder("tiny", max_length=64)
    tokens, width, hidden = 64, model.width, model.mlp_width
    needed = tokens * flops_per_token(model, 64)
    # Everything of a layer again but the last product, whose result nothing needs; the first layer's input needs no gradient
    # beyond the embedding's, which is a lookup.
    head = 2 * width * model.vocab
    again = tokens * (flops_per_token(model, 64, training=False) - head - 2 * model.layers * hidden * width)
    assert step["model_flops"] == needed
    assert step["flops"] == needed + (again if remat == "full" else 0)


def test_rematerialization_keeps_less(config_file, program_of):
    kept = [
        saved_bytes(experiment, program_of(experiment, 1, 1, 1))[0]
        for experiment in (parsed(config_file, "--remat", remat).experiment() for remat in ("none", "full"))
    ]
    assert kept[1] < 0.5 * kept[0]


def test_a_plan_opens_no_data(config_file, adapted):
    # The configuration's source is none at all.
    with pytest.raises(UserError, match="nowhere"):
        parsed(config_file).experiment().data.describe()
    assert adapted["step"]["error"] == ""


def test_the_size_of_a_vocabulary_is_enough(config_file):
    assert parsed(config_file, "--tokenizer", "vocab:250").experiment().data.tokenizer.vocab == 250
    with pytest.raises(UserError, match="vocab:250 is the size of a vocabulary"):
        parsed(config_file, "--tokenizer", "vocab:250").experiment().data.tokenizer.encode("a")
    with pytest.raises(UserError, match="such as vocab:32000"):
        parsed(config_file, "--tokenizer", "missing.json").experiment()


def test_plain_models_lose_what_changes_only_how_they_run(config_file):
    model = parsed(config_file, "--adapted", "--remat", "full").experiment().model
    assert (plain(model).inner.remat, plain(model).inner.attention) == ("none", "xla")


def test_a_gradient_of_a_depthwise_convolution_has_the_operations_of_the_convolution():
    def convolved(x, w):
        dimensions = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=dimensions, feature_group_count=3
        ).sum()

    shapes = [jax.ShapeDtypeStruct(shape, np.float32) for shape in ((2, 8, 8, 3), (3, 3, 1, 3))]
    forward, both = (
        product_flops(jax.make_jaxpr(f)(*shapes).jaxpr) for f in (convolved, jax.grad(convolved, argnums=1))
    )
    assert forward == 2 * (2 * 8 * 8 * 3) * 9
    assert both == 2 * forward


@pytest.mark.parametrize(
    "topology, message",
    [
        ("v9:2x2", "'v9:2x2' is not known; there are TPU: v4:2x2x4, v5e:2x4"),
        ("v5e:3x3", "its hosts have 2x2 chips"),
        ("v5e:4x4x4", "a v5e has 2 dimensions"),
        ("v5e-7", "is sold as v5e-4, v5e-8"),
        ("v5e:", "is not known"),
        ("h100", "is not known"),
        ("", "is not known"),
    ],
)
def test_topologies_that_are_none_are_refused(topology, message):
    with pytest.raises(UserError, match=message):
        parse_topology(topology)


@pytest.mark.parametrize(
    "topology, devices, kind",
    [
        ("v5e-256", 256, "tpu"),
        ("v5p-512", 256, "tpu"),
        ("v4:2x2x4", 32, "tpu"),
        ("h100:16", 16, "gpu"),
        ("cpu:8", 8, "here"),
    ],
)
def test_topologies_are_read_as_they_are_sold_or_by_their_sizes(topology, devices, kind):
    found = parse_topology(topology)
    assert (found.devices, found.kind) == (devices, kind)


def said(capsys, *arguments):
    status = cli.run(["plan", *map(str, arguments)])
    return status, capsys.readouterr()


def test_what_is_missing_is_said_in_one_line(config_file, capsys, monkeypatch):
    monkeypatch.setattr(aot, "libtpu", lambda: None)
    status, heard = said(capsys, config_file, "--topology", "v5e:2x4")
    assert (status, heard.out) == (2, "")
    assert heard.err == "odjax: libtpu, the TPU compiler, is not installed: pip install 'odjax[aot]'\n"


def test_a_compiler_that_jax_does_not_go_with_is_refused(monkeypatch):
    monkeypatch.setattr(aot, "is_available", lambda: True)
    monkeypatch.setattr(aot, "libtpu_version", lambda: "0.0.51")
    with pytest.raises(UserError, match=r"libtpu 0\.0\.51 does not go with jax .*pip install 'libtpu=="):
        planner.check_compiler()


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--topology", "cpu:4", "--mesh", "3,1,1"), "mesh 3,1,1 (data,fsdp,tensor) needs 3 devices"),
        (("--topology", "v6x:8"), "'v6x:8' is not known"),
        (("--topology", "cpu:4", "--batch", "6"), "batch 6 does not divide by the 4 parts"),
        (("--topology", "cpu:4", "--tokenizer", "x.json"), "tokenizer x.json: no such file"),
        (("--topology", "cpu:4", "--search", "--mesh", "4,1,1"), "--search tries meshes"),
        (("--topology", "cpu:4", "--search", "--compiles", "0"), "--compiles must be at least 1"),
        (("--slices", "0"), "--slices must be at least 1"),
        (
            ("--topology", "cpu:4", "--out", "/proc/none/plan.json"),
            "--out /proc/none/plan.json: cannot be written",
        ),
        (("--slices", "2", "--topology", "h100:8"), "only TPUs have slices"),
        (("--timeout", "0"), "--timeout must be at least 1"),
        (("--out", "."), "--out . is a folder"),
    ],
)
def test_mistakes_are_one_line(config_file, capsys, flags, message):
    status, heard = said(capsys, config_file, *flags)
    assert (status, heard.out) == (2, "")
    assert message in heard.err
    assert heard.err.count("\n") == 1


def test_candidates_are_meshes_times_the_flags_that_are_left_open(config_file):
    topology = parse_topology("cpu:4")
    every = search.candidates(parsed(config_file, "--remat", "full"), topology)
    assert {each.mesh for each in every} == set(search.meshes(4))
    assert {dict(each.flags)["accumulate"] for each in every} == {"1", "2", "4", "8"}
    assert all("remat" not in dict(each.flags) for each in every)
    assert len(every) == 6 * 4


def test_what_a_configuration_has_itself_is_among_the_candidates(tmp_path):
    path = tmp_path / "other.py"
    path.write_text(
        "from typing import Literal\nfrom odjax_train import Experiment\n\n\n"
        'def experiment(attention: Literal["xla", "splash"] = "xla", remat: bool = False, '
        "accumulate: int | None = None) -> Experiment:\n"
        '    """Flags of other types."""\n'
    )
    every = search.candidates(parsed(path), parse_topology("v5e-4"))
    assert {each.flags for each in every} == {(("attention", "xla"),), (("attention", "splash"),)}


def test_facts_are_those_of_a_whole_batch_and_name_what_cannot_be(config_file):
    request = {
        "config": str(config_file),
        "flags": ["--accumulate", "4"],
        "topology": "here",
        "slices": 1,
        "meshes": ["8,1,1", "3,1,1", "1,2,4"],
        "settings": [["--remat", "full"], ["--remat", "all"]],
        "parts": ["mesh 0", "mesh 1", "setting 0", "setting 1"],
    }
    found = dict(child.facts(request))
    assert list(found) == request["parts"]
    assert found["mesh 0"]["state"] > found["mesh 0"]["gradient"] > 0  # 2 rows do not divide by 8, 8 rows do
    assert "needs 3 devices" in found["mesh 1"]["error"]
    assert (found["setting 0"]["batch"], found["setting 0"]["accumulate"]) == (8, 4)
    assert "remat" in found["setting 1"]["error"]


def test_microbatches_that_were_typed_count_in_the_estimates(config_file, tmp_path, monkeypatch):
    place = {"state": 100, "gradient": 10}
    flags = dict.fromkeys(model.Setting._fields, 100) | {"batch": 8, "accumulate": 4}
    monkeypatch.setattr(search, "ask_facts", lambda c, t, m, s, timeout: ([place] * len(m), [flags] * len(s)))
    config, topology = parsed(config_file, "--accumulate", "4", "--remat", "none"), parse_topology("v5e-4")
    every = search.candidates(config, topology)
    known, reason = search.estimates(config, topology, every, tmp_path, 1.0)
    assert {each.mesh for each in known} == {"1,2,2", "2,1,2", "1,1,4"}
    assert reason == "batch 8 in 4 microbatches does not divide by 4"
    assert known[search.Candidate("1,1,4")].bytes == 100 + 10 + (100 + 200) / 4


def test_what_failed_is_tried_again_with_more_time_alone(config_file, tmp_path, monkeypatch):
    asked = []

    def ask(config, topology, mesh, *, flags, parts, timeout):
        asked.append(timeout)
        return made_up_plan(1.0, 2**30, "not compiled within 1 s" if timeout < 2.0 else "")

    monkeypatch.setattr(search, "ask", ask)
    config, topology = parsed(config_file), parse_topology("v5e-4")
    candidate, estimate = search.Candidate("1,4,1"), search.Estimate(0, 0)
    errors = [
        search._compiled(config, topology, candidate, estimate, tmp_path, timeout).error
        for timeout in (1.0, 1.0, 2.0, 3.0)
    ]
    assert errors == ["not compiled within 1 s", "not compiled within 1 s", "", ""]
    assert asked == [1.0, 2.0]


def made_up_plan(seconds, peak, error="", mesh=(1, 4, 1)):
    part = Part("step", error=error, seconds=seconds, arguments=peak, model_flops=1e12, flops=2 * 10**12)
    chip = parse_topology("v5e-4").chip
    return Plan("c.py", (), "v5e:2x2", chip, 4, mesh, 8, 512, {"parameters": 5}, (), (part,), {"jax": "0"})


def test_a_search_compiles_the_promising_ones_and_goes_on_where_it_was(config_file, tmp_path, monkeypatch):
    asked = []

    def facts(config, topology, meshes, settings, *, timeout):
        return [{"state": 100, "gradient": 10}] * len(meshes), [
            {
                "flops": 10**9,
                "saved": 100,
                "largest": 10,
                "weights": 1000,
                "trained": 10,
                "tokens": 512,
                "stream": 10,
                "batch": 8,
                "accumulate": 1,
            }
        ] * len(settings)

    def ask(config, topology, mesh, *, flags, parts, timeout):
        asked.append((mesh, tuple(flags)))
        if len(asked) == 2:
            raise RuntimeError("the compiler's process ended with 6\nmore")
        fit = len(asked) != 3
        return made_up_plan(
            1.0 / len(asked), 2**30 * (10 - len(asked)), "" if fit else "does not fit into the memory"
        )

    monkeypatch.setattr(search, "ask_facts", facts)
    monkeypatch.setattr(search, "ask", ask)
    config, topology = parsed(config_file), parse_topology("v5e-4")
    tried = search.search(config, topology, compiles=4, timeout=1.0, cache=tmp_path)
    assert len(asked) == 4
    errors = sorted(each.error for each in tried)
    assert errors == ["", "", "does not fit into the memory", "the compiler's process ended with 6"]
    assert [each.seconds for each in tried[:2]] == [0.25, 1.0]
    assert search.pareto(tried) == tried[:1]
    again = search.search(config, topology, compiles=5, timeout=1.0, cache=tmp_path)
    assert len(asked) == 5
    assert {each.candidate for each in tried} < {each.candidate for each in again}


def test_the_model_of_a_step_knows_what_costs():
    place = model.OnMesh(state=2**30, gradient=2**28)
    flags = model.Setting(
        flops=10**15,
        saved=2**36,
        largest=2**30,
        weights=10**9,
        trained=10**9,
        tokens=2**20,
        stream=2**30,
        batch=2**10,
        accumulate=1,
    )
    topology = parse_topology("v5e-16")

    def of(mesh=(1, 16, 1), accumulate=1, **changes):
        return model.expected(place, flags._replace(**changes), mesh, accumulate, topology)

    peak, seconds = of()
    assert peak == 2**30 + 2**28 + (2**36 + 2**31) / 16
    assert seconds >= 10**15 / 16 / TPUS["v5e"].flops
    assert of(accumulate=4)[0] < peak
    assert of(accumulate=4)[1] >= seconds
    assert of(flops=4 * 10**15 // 3)[1] > seconds  # what is computed again
    assert of(tokens=2**10)[1] > seconds  # 64 rows a chip
    assert of(mesh=(1, 1, 16), stream=2**36)[1] > seconds  # the residual stream crosses the links


def test_what_is_faster_or_smaller_than_everything_else_is_on_the_front():
    tried = [
        search.Tried(search.Candidate(f"{i},1,1"), search.Estimate(0, 0), made_up_plan(s, p))
        for i, (s, p) in enumerate([(3.0, 1), (1.0, 3), (2.0, 2), (2.5, 2), (4.0, 5)], start=1)
    ]
    assert [each.candidate.mesh[0] for each in search.pareto(tried)] == ["2", "3", "1"]


def test_plans_come_back_from_json():
    plan = made_up_plan(0.5, 2**30)
    document = json.loads(json.dumps(to_json(plan)))
    assert from_json(document) == plan
    assert document["parts"][0]["utilization"] == pytest.approx(1e12 / (0.5 * 197e12))
    assert document["parts"][0]["tokens_per_second"] == 1024


def test_the_verdict_says_by_how_much_it_does_not_fit():
    plan = made_up_plan(0.5, 2**30)
    assert verdict(plan).startswith("fits: 1.0 GiB of 15.8 GiB a device; a step takes 500.0 ms (estimated)")
    assert "20.2 GiB a device too much" in verdict(made_up_plan(0.5, 36 * 2**30))
    short = dataclasses.replace(plan.parts[0], error="does not fit into the memory", short=3 * 2**30)
    assert "does not fit: 3.0 GiB" in verdict(dataclasses.replace(plan, parts=(short,)))
    assert render(plan).renderables


def test_an_error_of_the_compiler_about_memory_names_what_is_large():
    text = (
        "JaxRuntimeError: RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
        "Used 25.53G of 15.75G hbm. Exceeded hbm capacity by 9.79G. Largest program allocations in hbm: "
        '1. Size: 2.00G Operator: op_name="jit(step)/layers/mlp/dot_general" Shape: bf16[2,4096] Unpadded size: 2.00G'
    )
    part = planner._explained(Part("step", error=text))
    assert part.error == "does not fit into the memory"
    assert part.short == int(9.79 * 2**30)
    assert part.largest[0] == ("layers/mlp/dot_general", 2 * 2**30, "bf16[2,4096]")


def test_a_plan_in_a_runs_folder_is_in_its_report(tmp_path):
    from odjax_train.plan import page

    assert page.section(tmp_path) == ""
    (tmp_path / "plan.json").write_text(json.dumps(to_json(made_up_plan(0.5, 2**30))))
    shown = page.section(tmp_path)
    assert "Plan for v5e:2x2" in shown
    assert "500.0 ms" in shown
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json is no plan"):
        page.section(tmp_path)
    assert report.plan_page is page


def test_durations_have_a_unit():
    assert [duration(x) for x in (2.0, 0.5, 2e-5, 0.0)] == ["2.0 s", "500.0 ms", "20.0 us", "0"]
