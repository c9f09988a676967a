"""Strictness for every test: eight virtual devices, no silent promotion, warnings are errors."""

import gc
import os
import pathlib
import tempfile

# Programs of tests are compiled once and run on a few numbers: the code generator need not try hard.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax
import pytest
from hypothesis import HealthCheck, settings

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Workers of one run share what they compile.
jax.config.update(
    "jax_compilation_cache_dir",
    os.path.join(
        tempfile.gettempdir(), f"odjax-test-cache-{os.environ.get('PYTEST_XDIST_TESTRUNUID', 'local')}"
    ),
)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)

settings.register_profile(
    "odjax", deadline=None, derandomize=True, max_examples=15, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("odjax")


@pytest.fixture(scope="module", autouse=True)
def forgotten_programs(request):
    """Lets go of a module's programs: each holds memory maps, of which a process may have 65,530."""
    yield
    for value in vars(request.module).values():
        if hasattr(value, "cache_clear"):
            value.cache_clear()
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def real_data() -> pathlib.Path:
    """The folder of real data sets, or a skip that says where it was looked for."""
    default = pathlib.Path(__file__).parents[2] / "shared" / "data"
    folder = pathlib.Path(os.environ.get("ODJAX_DATA_DIR", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder} (set ODJAX_DATA_DIR)")
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The modules that start processes go first, so that no worker ends long after the others."""
    items.sort(key=lambda item: "tests/train/" not in item.nodeid)
