"""What the README shows is true."""

import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from odjax.core import leaves_with_paths
from odjax_train.errors import UserError
from odjax_train.readme import with_table

README = pathlib.Path(__file__).parents[2] / "README.md"


def test_the_table_of_methods_is_the_registrys():
    text = README.read_text()
    assert with_table(text) == text, "run `make methods`"


def test_a_text_without_a_place_for_the_table_is_refused():
    with pytest.raises(UserError, match="<!-- methods -->"):
        with_table("# odjax\n")


def test_the_example_runs_and_its_optimizer_updates():
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    params = {"kernel": jnp.ones((2, 2))}
    for name in ("optimizer", "sparse"):
        with jax.numpy_dtype_promotion("standard"):
            state = names[name].init(params)
            updates, _ = jax.jit(names[name].update)(params, state, params)
        assert float(jnp.abs(updates["kernel"]).sum()) > 0


def test_the_example_of_low_rank_adaptation_runs():
    (code,) = re.findall(r"```python\n(.*?)```", (README.parent / "docs/lowrank.md").read_text(), re.DOTALL)
    names = {}
    exec(code, names)
    assert sorted(path for path, _ in leaves_with_paths(names["grads"])) == ["lora_a"]
    assert jax.tree.structure(names["weights"]) == jax.tree.structure(names["base"])
    assert names["edit"].due(100)


def test_the_examples_of_heads_run():
    code = re.findall(r"```python\n(.*?)```", (README.parent / "docs/heads.md").read_text(), re.DOTALL)
    names = {}
    for each in code:
        exec(each, names)
    assert names["loss"].shape == (8,)
    assert "constants" not in names["variables"]
    assert names["measures"][0].name == "collapse"
    assert float(names["moments"].variance[0]) > 0


def test_every_file_that_is_linked_exists():
    for page in [README, *README.parent.glob("docs/*.md"), README.parent / "CONTRIBUTING.md"]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name} links to {link}"
