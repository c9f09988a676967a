"""The GPU compiler without a GPU: JAX's CUDA plugin compiles for a GPU that is described to it.

The plugin (`pip install 'odjax[gpu-aot]'`, the version of jax itself) needs neither a driver nor a GPU for
that. It cannot try out which of its kernels is fastest, so it takes its defaults.
"""

import importlib.metadata
import importlib.util
import os

import jax

from odjax_train.plan.chips import SWITCHED, Topology

_PLUGINS = ("jax_plugins.xla_cuda13", "jax_plugins.xla_cuda12")
_PACKAGES = ("jax-cuda13-plugin", "jax-cuda12-plugin")

# NVIDIA's data sheets and CUDA's table of compute capabilities, SXM forms: multiprocessors, units of one,
# bytes of shared memory of one and of a block at most, bytes of the second cache, GHz, compute capability.
_SHEETS = {
    "a100": (108, 64, 167936, 166912, 40 * 2**20, 1.41, (8, 0)),
    "h100": (132, 128, 233472, 232448, 50 * 2**20, 1.98, (9, 0)),
    "h200": (132, 128, 233472, 232448, 50 * 2**20, 1.98, (9, 0)),
}


def is_available() -> bool:
    """Whether JAX's CUDA plugin is installed."""
    return version() is not None and any(_found(name) for name in _PLUGINS)


def version() -> str | None:
    """The plugin's version, None without one."""
    for name in _PACKAGES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


def _found(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def compiler_environment() -> dict[str, str]:
    """The environment of a process that compiles for GPUs which are not there."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


def devices(topology: Topology) -> list[jax.Device]:
    """Descriptions of the GPUs of a topology, on equal hosts of up to eight, to compile for."""
    from jax.experimental import topologies

    least = -(-topology.devices // SWITCHED)
    hosts = next(n for n in range(least, topology.devices + 1) if topology.devices % n == 0)
    described = topologies.get_topology_desc(
        platform="cuda",
        topology_name=topology.chip.name,
        topology=f"1x{hosts}x{topology.devices // hosts}",
        target_config=_target(topology),
    )
    return list(described.devices)


def _target(topology: Topology) -> str:
    """The text of XLA's `GpuTargetConfigProto`."""
    chip = topology.chip
    cores, units, shared, most, cache, clock, (major, minor) = _SHEETS[chip.name]
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {shared} shared_memory_per_block_optin: {most} threads_per_core_limit: 2048
  core_count: {cores} fpus_per_core: {units} block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: {int(chip.bandwidth)} l2_cache_size: {cache}
  clock_rate_ghz: {clock} device_memory_size: {chip.memory} registers_per_core_limit: 65536
  registers_per_block_limit: 65536 cuda_compute_capability {{ major: {major} minor: {minor} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 13 patch: 0 }}
runtime_version {{ major: 13 minor: 0 patch: 0 }}
device_description_str: "NVIDIA {chip.name.upper()}"
"""
