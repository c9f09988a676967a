"""The benchmark of a GPU at a tiny size: its rows run on a CPU, and its table says what they found."""

import pathlib
import types

import jax
import pytest

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
H100 = {
    "kind": "NVIDIA H100 80GB HBM3",
    "memory": 2**36,
    "product_flops": 7e14,
    "copy_bytes": 3e12,
    "versions": "jax",
}


@pytest.fixture
def gpu(monkeypatch) -> types.ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.fixture
def tables(gpu) -> types.ModuleType:
    import gpu_table

    return gpu_table


@pytest.fixture
def setting(gpu, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu.py", "--preset", "tiny", "--layers", "1"])
    args = gpu.arguments()
    args.batch, args.length, args.rank = 1, 8, 2
    args.steps, args.rounds, args.remat = 1, 2, "none"
    return gpu.setting_of(args)


def test_rows_are_checked_and_timed_on_a_cpu_and_stand_in_the_table(gpu, tables, setting):
    names = ("full-cudnn", "full-plain", "rac-plain")
    with jax.numpy_dtype_promotion("standard"):  # optax mixes them
        found = {name: gpu.run_row(name, setting, on_gpu=False) for name in names}
    assert found["full-cudnn"] == {"left_out": "needs a GPU"}
    for name in ("full-plain", "rac-plain"):
        row = found[name]
        assert not row["problems"]
        assert len(row["steps"]) == setting.rounds
        assert row["losses"][-1] < row["losses"][0]
    head, full, rac, restart = tables.table(H100, found, setting)
    assert [full[0], rac[0], restart[0]] == ["full-plain", "rac-plain", "  its restart"]
    assert full[head.index("MFU")].endswith("%")
    assert tables.remarks(found) == ([], ["full-cudnn: left out, needs a GPU"])


def test_frozen_weights_save_a_third_of_their_products(tables, setting):
    full, lora = (tables.flops_of(name, setting) for name in ("full-cudnn", "lora-cudnn"))
    attention = full - tables.flops_of("full-cudnn", setting._replace(length=0))
    assert lora - attention == (full - attention) * 2 // 3
    assert tables.flops_of("torch-llama-peft", setting) == lora


def test_ratios_are_those_of_the_medians_and_repeats_are_taken_together(tables, setting):
    row = {"edits": [], "peak": 5, "edit_peak": 5, "compile_seconds": 1.0, "problems": []}
    ours = tables.merged({**row, "steps": [0.1, 0.3]}, {**row, "steps": [0.2], "peak": 7})
    assert (ours["steps"], ours["peak"]) == ([0.1, 0.3, 0.2], 7)
    lines = tables.table(H100, {"full-cudnn": ours, "torch-full": {**row, "steps": [0.3]}}, setting)
    assert lines[1][1:4] == ["200.0 (150.0 to 250.0)", "1.50", ""]
    assert tables.lines_of(lines, markdown=True)[2].startswith(
        "| full-cudnn | 200.0 (150.0 to 250.0) | 1.50 |"
    )


def test_what_failed_is_told_apart_from_what_was_left_out(tables):
    checks = [
        {"name": "a", "holds": True, "figures": "equal"},
        {"name": "b", "holds": False, "figures": "no"},
    ]
    failed, noted = tables.remarks(
        {"checks-sparse": {"checks": checks}, "lora-cudnn": {"error": "out of memory"}}
    )
    assert failed == ["b: no", "lora-cudnn: out of memory"]
    assert noted == ["check: a: equal"]


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA GeForce RTX 4090", 165e12),
        ("NVIDIA L40S", None),
        ("NVIDIA H100 PCIe", None),
        ("cpu", None),
    ],
)
def test_only_known_devices_have_a_data_sheet(tables, kind, peak):
    assert tables.peak_of(kind) == peak
