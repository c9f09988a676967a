"""A schedule played through, on programs written by hand: what takes how long is known."""

import dataclasses

import numpy as np
import pytest
from jax.sharding import Mesh

from odjax_kernels import hlo
from odjax_train.mesh import MeshShape, make_mesh
from odjax_train.plan.chips import DATA_CENTRE, NETWORK, TPUS, parse_topology, ring
from odjax_train.plan.collectives import HOP, collective, first_group
from odjax_train.plan.schedule import play

CYCLE = 1 / TPUS["v5e"].clock
LINK = TPUS["v5e"].link
TOPOLOGY = parse_topology("v5e:4x4")
SIZE = 4 * 2**20  # bytes of f32[1024,1024]


@dataclasses.dataclass(frozen=True)
class Device:
    """As much of a device as a mesh and a plan need."""

    id: int
    coords: tuple[int, int, int]
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"
    device_kind: str = "fake"
    process_index: int = 0


FUSED = "%f (x: f32[1024,1024]) -> f32[1024,1024] {\n  ROOT %x = f32[1024,1024]{1,0} parameter(0)\n}\n"


def mesh_of(*shape, kind="fake"):
    rows, columns = TOPOLOGY.sizes
    found = [Device(i, (i // columns, i % columns, 0), device_kind=kind) for i in range(rows * columns)]
    devices = np.empty(len(found), object)
    devices[:] = found
    return Mesh(devices.reshape(shape), ("data", "fsdp", "tensor"))


def program(*lines, more=""):
    body = "\n".join(f"  {line}" for line in lines)
    return hlo.parse(
        f"{FUSED}{more}\nENTRY %main (x: f32[1024,1024]) -> f32[] {{\n"
        f"  %x = f32[1024,1024]{{1,0}} parameter(0)\n{body}\n}}\n"
    )


def work(name, cycles):
    return (
        f"%{name} = f32[1024,1024]{{1,0}} fusion(%x), kind=kLoop, calls=%f, "
        f'backend_config={{"estimated_cycles":"{cycles}"}}'
    )


GATHER = "f32[16,1024,1024]{2,1,0} %s(%%x), channel_id=%d, replica_groups=[1,16]<=[16], dimensions={0}"
# A line of four chips in two dimensions: one link each way, no ring to close.
GATHERED = 15 * SIZE / (2 * LINK)


def test_estimates_add_up_in_cycles_of_the_clock():
    use = play(program(work("a", 1000), work("b", 500)), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.seconds == pytest.approx(1500 * CYCLE)
    assert use.compute == use.seconds


def test_a_collective_alone_is_waited_for():
    lines = (work("a", 1000), "%g = " + GATHER % ("all-gather", 1))
    use = play(program(*lines), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.compute == pytest.approx(1000 * CYCLE)
    assert use.collectives == pytest.approx(GATHERED)


@pytest.mark.parametrize("share", [0.25, 3.0])
def test_a_collective_beside_work_costs_only_what_is_longer(share):
    cycles = int(share * GATHERED / CYCLE)
    lines = (
        "%g = " + GATHER % ("all-gather-start", 1),
        work("a", cycles),
        "%d = f32[16,1024,1024]{2,1,0} all-gather-done(%g)",
    )
    use = play(program(*lines), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.seconds == pytest.approx(max(GATHERED, cycles * CYCLE), rel=1e-6)


def test_two_collectives_on_the_same_links_wait_for_each_other():
    lines = [
        *("%g" + str(i) + " = " + GATHER % ("all-gather-start", i) for i in (1, 2)),
        *(f"%d{i} = f32[16,1024,1024]{{2,1,0}} all-gather-done(%g{i})" for i in (1, 2)),
    ]
    use = play(program(*lines), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.seconds == pytest.approx(2 * GATHERED)


def test_a_loop_counts_its_time_and_its_collectives_as_often_as_it_runs():
    more = (
        "%cond (p: (s32[], f32[1024,1024])) -> pred[] {\n"
        "  %p = (s32[], f32[1024,1024]{1,0}) parameter(0)\n  %n = s32[] constant(7)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n"
        "  ROOT %c = pred[] compare(%i, %n), direction=LT\n}\n\n"
        "%body (p: (s32[], f32[1024,1024])) -> (s32[], f32[1024,1024]) {\n"
        "  %p = (s32[], f32[1024,1024]{1,0}) parameter(0)\n  %one = s32[] constant(1)\n"
        "  %i = s32[] get-tuple-element(%p), index=0\n  %next = s32[] add(%i, %one)\n"
        "  %x = f32[1024,1024]{1,0} get-tuple-element(%p), index=1\n"
        f"  {work('a', 1000)}\n  %g = {GATHER % ('all-gather', 3)}\n"
        "  ROOT %t = (s32[], f32[1024,1024]{1,0}) tuple(%next, %a)\n}\n"
    )
    lines = (
        "%zero = s32[] constant(0)",
        "%t = (s32[], f32[1024,1024]{1,0}) tuple(%zero, %x)",
        "%w = (s32[], f32[1024,1024]{1,0}) while(%t), condition=%cond, body=%body",
    )
    played = play(program(*lines, more=more), mesh_of(1, 16, 1), TOPOLOGY)
    assert played.use.compute == pytest.approx(7 * 1000 * CYCLE)
    assert played.use.collectives == pytest.approx(7 * GATHERED)
    assert [(each.kind, times) for each, times in played.collectives] == [("all-gather", 7)]
    assert played.unknown_loops == 0


def test_what_has_no_estimate_counts_by_its_bytes_and_is_named():
    played = play(
        program("%r = f32[1024,1024]{1,0} reverse(%x), dimensions={0}"), mesh_of(1, 16, 1), TOPOLOGY
    )
    assert played.use.modelled == pytest.approx(2 * SIZE / TPUS["v5e"].bandwidth)
    assert set(played.guessed) == {"reverse"}


def test_what_crosses_the_network_between_slices_is_waited_for_where_it_arrives():
    about = (
        'frontend_attributes={_xla_host_transfer_rendezvous="all-reduce.1",'
        '_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = (
        "%a = token[] after-all()",
        f"%r = (f32[1024,1024]{{1,0}}, u32[], token[]) recv(%a), {about}",
        f"%s = (f32[1024,1024]{{1,0}}, u32[], token[]) send(%x, %a), {about}",
        work("w", 1000),
        "%d = token[] send-done(%s)",
        "%e = (f32[1024,1024]{1,0}, token[]) recv-done(%r)",
    )
    played = play(program(*lines), mesh_of(1, 16, 1), TOPOLOGY)
    assert [(each.kind, each.axis, each.sent) for each, _ in played.collectives] == [
        ("all-reduce by the network", "slices", SIZE)
    ]
    assert played.use.seconds == pytest.approx(SIZE / DATA_CENTRE)


def test_where_nothing_is_estimated_an_operation_takes_its_roofline():
    h100 = parse_topology("h100:16")
    lines = (
        "%d = f32[1024,1024]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
        "%r = f32[1024,1024]{1,0} reverse(%x), dimensions={0}",
    )
    use = play(program(*lines), mesh_of(1, 16, 1), h100).use
    assert use.compute == pytest.approx(max(2 * 1024**3 / h100.chip.flops, 3 * SIZE / h100.chip.bandwidth))
    assert use.modelled == pytest.approx(2 * SIZE / h100.chip.bandwidth)


def test_a_part_written_in_place_counts_as_a_part():
    line = "%u = f32[1024,1024]{1,0} dynamic-update-slice(%x, %row, %i, %i)"
    lines = ("%i = s32[] constant(0)", "%row = f32[1,1024]{1,0} constant({...})", line)
    use = play(program(*lines), mesh_of(1, 16, 1), TOPOLOGY).use
    assert use.modelled < 5 * 4096 / TOPOLOGY.chip.bandwidth


def carried(name, mark):
    """A fusion with a piece of a collective, and 1000 cycles of work."""
    flag = '"flag_start":"-1"' if mark == "AsyncCollectiveStart" else '"flag_start":"2"'
    call = f'  ROOT %t.{name} = f32[] custom-call(%g.{name}), custom_call_target="{mark}"\n' if mark else ""
    more = (
        f"%f.{name} (x: f32[1024,1024]) -> f32[] {{\n  %x = f32[1024,1024]{{1,0}} parameter(0)\n"
        f"  %g.{name} = {GATHER % ('all-gather', 9)}, backend_config={{{flag}}}\n{call}}}\n"
    )
    return more, work(name, 1000).replace("calls=%f", f"calls=%f.{name}")


def test_a_collective_carried_through_fusions_counts_once():
    pieces = [carried("a", "AsyncCollectiveStart"), carried("b", ""), carried("c", "AsyncCollectiveDone")]
    played = play(
        program(*(line for _, line in pieces), more="\n".join(more for more, _ in pieces)),
        mesh_of(1, 16, 1),
        TOPOLOGY,
    )
    assert len(played.collectives) == 1
    assert played.use.compute == pytest.approx(3000 * CYCLE)
    assert played.use.seconds == pytest.approx(GATHERED)


@pytest.mark.parametrize(
    "kind, whole, sent",
    [("all-gather", 4, 3), ("all-reduce", 1, 1.5), ("reduce-scatter", 1, 0.75), ("all-to-all", 1, 0.75)],
)
def test_bytes_of_a_collective_along_one_axis(kind, whole, sent):
    text = f"%c = f32[1024,1024]{{1,0}} {kind}(%x), replica_groups=[4,4]<=[4,4]T(1,0), channel_id=1"
    found = collective(program(text).find("main", "c"), SIZE, mesh_of(4, 4, 1), TOPOLOGY)
    assert (found.axis, found.whole, found.sent) == ("data", whole * SIZE, sent * SIZE)
    # Four chips in a line: three hops, one link.
    ways = 4 / 4 if kind == "all-to-all" else 1
    assert found.seconds == pytest.approx(max(found.sent / LINK * ways, 3 * HOP))


def test_gpus_of_different_hosts_communicate_by_the_network():
    h100 = parse_topology("h100:16")
    across, inside = (
        collective(
            program(f"%c = f32[1024,1024]{{1,0}} all-reduce(%x), replica_groups={groups}, channel_id=1").find(
                "main", "c"
            ),
            SIZE,
            mesh_of(2, 8, 1),
            h100,
        )
        for groups in ("[8,2]<=[2,8]T(1,0)", "[2,8]<=[16]")
    )
    assert (across.axis, across.seconds) == ("data", pytest.approx(SIZE / NETWORK))
    assert (inside.axis, inside.seconds) == ("fsdp", pytest.approx(7 / 4 * SIZE / h100.chip.link))


@pytest.mark.parametrize("shape", [(1, 8, 2), (2, 8, 1), (1, 2, 8)])
def test_a_mesh_may_divide_a_dimension_of_the_torus(shape):
    # A search tries every one.
    mesh = make_mesh(MeshShape(*shape), list(mesh_of(16, 1, 1).devices.flat))
    assert mesh.devices.shape == shape
    assert len({device.id for device in mesh.devices.flat}) == 16


def test_a_permutation_takes_one_link():
    pairs = "{0,1},{1,2},{2,3},{3,0}"
    text = f"%c = f32[1024,1024]{{1,0}} collective-permute(%x), source_target_pairs={{{pairs}}}, channel_id=1"
    found = collective(program(text).find("main", "c"), SIZE, mesh_of(4, 4, 1), TOPOLOGY)
    assert (found.axis, found.sent, found.direction) == ("fsdp", SIZE, 1)
    assert found.seconds == pytest.approx(SIZE / LINK)


def test_a_group_of_one_moves_nothing():
    text = "%c = f32[1024,1024]{1,0} all-reduce(%x), replica_groups=[16,1]<=[16], channel_id=1"
    assert collective(program(text).find("main", "c"), SIZE, mesh_of(16, 1, 1), TOPOLOGY) is None


@pytest.mark.parametrize(
    "text, group",
    [
        ("replica_groups={{0,2},{1,3}}, x", (0, 2)),
        ("replica_groups=[2,2]<=[4], x", (0, 1)),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", (0, 2)),
        ("source_target_pairs={{0,3},{3,2},{2,1},{1,0}}", (0, 3, 2, 1)),
        ("source_target_pairs={{0,0},{1,2},{2,1},{3,3}}", (1, 2)),
        ("source_target_pairs={{0,0},{1,1}}", (0,)),
        ("replica_groups={}, x", (0, 1, 2, 3)),
    ],
)
def test_every_way_to_write_groups_is_read(text, group):
    assert first_group(text, 4) == group


def test_a_dimension_of_a_full_pod_is_a_ring():
    line, pod = parse_topology("v5e:4x4"), parse_topology("v5e-256")
    assert ring(line, [(i, 0, 0) for i in range(4)], [0] * 4)[1:] == (LINK, LINK, 3)
    assert ring(pod, [(i, 0, 0) for i in range(16)], [0] * 16)[1:] == (2 * LINK, LINK, 8)
    whole = [(i, j, 0) for i in range(16) for j in range(16)]
    assert ring(pod, whole, [0] * 256)[1:] == (4 * LINK, LINK, 16)
