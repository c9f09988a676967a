"""Importing odjax costs nothing that it does not use, and an import never points against the layers."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

import odjax

ROOT = pathlib.Path(odjax.__file__).parents[1]
HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib", "orbax", "grain", "sklearn", "odjax_train")


def loaded(program: str) -> list[str]:
    script = f"{program}\nimport sys, json\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_odjax_loads_only_itself():
    modules = loaded("import odjax")
    assert "jax" not in modules
    assert [m for m in modules if m.startswith("odjax")] == ["odjax", "odjax.version"]


def test_touching_every_public_name_loads_nothing_heavy_and_nnx_neither():
    modules = loaded("import odjax\nfor name in odjax.__all__: getattr(odjax, name)")
    assert "odjax.core.selection" in modules
    assert not [m for m in modules if m.split(".")[0] in HEAVY]
    assert "flax.nnx" not in modules


def test_every_public_name_exists_and_is_listed():
    assert set(odjax.__all__) <= set(dir(odjax))
    for name in odjax.__all__:
        assert getattr(odjax, name) is not None
    assert odjax.top_k_mask is odjax.core.top_k_mask


def test_the_names_for_type_checkers_are_the_names_at_run_time():
    tree = ast.parse(pathlib.Path(odjax.__file__).read_text())
    block = next(
        node
        for node in tree.body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    )
    shown = {(node.module, alias.name) for node in block.body for alias in node.names}
    assert {name for _, name in shown} | {"registry"} == set(odjax.__all__)
    for module, name in shown - {("odjax", family) for family in odjax._FAMILIES}:
        assert odjax._MODULE_OF[name] == module


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'odjax' has no attribute 'top_k'"):
        odjax.top_k  # noqa: B018


LAYERS = {
    "kernels/odjax_kernels": ("odjax", "odjax_train"),
    "odjax": ("odjax_train",),
}


def imports(file: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_down_the_layers(folder):
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    for file in files:
        upward = [name for name in imports(file) if name.split(".")[0] in LAYERS[folder]]
        assert not upward, f"{file} imports {upward}"


def test_the_core_imports_nothing_else_of_odjax():
    for file in sorted((ROOT / "odjax" / "core").rglob("*.py")):
        other = [n for n in imports(file) if n.split(".")[0] == "odjax" and not n.startswith("odjax.core")]
        assert not other, f"{file} imports {other}"


def test_only_public_api_of_jax_and_flax_is_used():
    for folder in ("odjax", "kernels", "train"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            private = [n for n in imports(file) if "._" in n]
            assert not private, f"{file} imports {private}"


def test_the_library_reads_no_environment_variable():
    for file in sorted((ROOT / "odjax").rglob("*.py")):
        assert "os" not in imports(file), f"{file} imports os"
