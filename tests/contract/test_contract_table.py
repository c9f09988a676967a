"""No method and no public object of a kind is missing from the matrix; the registry tells the truth."""

import doctest
import importlib
import inspect
import pkgutil
import re

import flax.linen as nn
import optax
import pytest

import odjax
from odjax.core.edits import Edit
from odjax.core.statistics import Statistic
from odjax.federated import Algorithm
from odjax.registry import METHODS, find, methods_table_markdown

from .contract_rows import KINDS, ROWS

# Parts of models: each is in a row through the models that are made of it, and has tests of its own.
PARTS = {"Adapted", "Attention", "FeedForward", "SwiGLU", "LayerNorm", "RMSNorm"}
# They have no parameters of their own; tests/heads is theirs.
PARTS |= {"Classifier", "TokenPool"}
# They need what no row can give them: a leaf that stays; a named axis; the parameters of an adapted model; an
# optimizer to make; one that leaves the change of its links to the edit.
NOT_ALONE = {
    "odjax.heads.fixed.keep_constant",
    "odjax.lowrank.gradient.average_over",
    "odjax.lowrank.chain.restart",
    "odjax.sparse.engine.planned",
    "odjax.sparse.engine.topology_edit",
}
# Arguments of one engine: a row for each would test the same code again.
SAME_ENGINE = {
    "odjax.federated.lowrank.chain_round": "odjax.federated.algorithms.make_round",
    "odjax.sparse.engine.dst": "odjax.sparse.methods.rigl",
    **{
        f"odjax.sparse.methods.{name}": "odjax.sparse.methods.rigl"
        for name in ("set_", "mest", "gmp", "granet", "static")
    },
    **{
        f"odjax.sparse.cannistraci_hebb.{name}": "odjax.sparse.cannistraci_hebb.chts"
        for name in ("cht", "chtss")
    },
    # Called, it is its backbone; what it adds is the head.
    "odjax.lowrank.guard.Guard": "odjax.lowrank.guard.GuardHead",
}
MADE_BY = {
    Edit: "edit",
    Statistic: "statistic",
    optax.GradientTransformation: "transform",
    Algorithm: "algorithm",
}


def resolve(api: str):
    module, _, name = api.rpartition(".")
    return getattr(importlib.import_module(module), name)


def public_objects():
    """(dotted name, kind) of every public function or class of odjax whose kind its signature tells."""
    for info in pkgutil.walk_packages(odjax.__path__, "odjax."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", "") != info.name:
                continue
            if inspect.isclass(value) and issubclass(value, nn.Module):
                if name not in PARTS and name in vars(importlib.import_module(info.name.rpartition(".")[0])):
                    yield f"{info.name}.{name}", "module"
            elif inspect.isfunction(value):
                # Arguments may have types that only a type checker imports.
                result = value.__annotations__.get("return")
                result = eval(result, vars(module)) if isinstance(result, str) else result
                for made, kind in MADE_BY.items():
                    if inspect.isclass(result) and issubclass(result, made):
                        yield f"{info.name}.{name}", kind


def test_every_method_of_the_registry_has_a_row_of_its_kind():
    have = {(row.api, row.kind) for row in ROWS}
    missing = [
        (m.slug, m.api, m.kind) for m in METHODS if (SAME_ENGINE.get(m.api, m.api), m.kind) not in have
    ]
    assert not missing, f"add rows to contract_rows.py: {missing}"


def test_every_public_object_of_a_kind_has_a_row():
    objects = set(public_objects())
    assert {kind for _, kind in objects} == {
        "edit",
        "statistic",
        "transform",
        "module",
        "algorithm",
    }  # the walk finds things
    missing = {(SAME_ENGINE.get(api, api), kind) for api, kind in objects if api not in NOT_ALONE}
    missing -= {(row.api, row.kind) for row in ROWS}
    assert not missing, f"add rows to contract_rows.py: {sorted(missing)}"


def test_rows_are_of_a_kind_and_told_apart():
    assert {row.kind for row in ROWS} <= set(KINDS)
    assert len({(row.kind, row.id) for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("api", sorted({row.api for row in ROWS}))
def test_the_api_of_a_row_imports(api):
    assert callable(resolve(api))


@pytest.mark.parametrize("method", METHODS, ids=lambda m: m.slug)
def test_a_method_imports_and_its_docstring_has_a_source_and_an_example(method):
    target = resolve(method.api)
    examples = doctest.DocTestFinder(recurse=False).find(target, method.slug)
    assert sum(len(found.examples) for found in examples) > 0, "no example in the docstring"
    assert re.search(r"^ *(References|Source):", target.__doc__, re.MULTILINE)
    if method.kind == "module":
        assert "Attributes:" in target.__doc__
    else:
        assert "Args:" in target.__doc__
        assert "Returns:" in target.__doc__


def test_rows_of_the_registry_are_well_formed():
    assert len({m.slug for m in METHODS}) == len(METHODS)
    for method in METHODS:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", method.slug)
        assert method.api.startswith(f"odjax.{method.family}.")
        assert method.kind in KINDS
        assert re.fullmatch(r"arXiv \d{4}\.\d{4,5}|doi 10\.\S+", method.paper.link)
        assert method.summary.endswith(".")
        assert "|" not in "".join(map(str, method))


def test_an_unknown_slug_shows_the_closest():
    with pytest.raises(ValueError, match="no method 'shrink_perturb'; the closest are 'shrink-perturb'"):
        find("shrink_perturb")
    with pytest.raises(ValueError, match="the closest are 'chan-moments', 'gumbel-top-k'"):
        find("zzz")


def test_the_markdown_table_has_a_line_for_every_method():
    lines = methods_table_markdown().splitlines()
    assert len(lines) == len(METHODS) + 2
    assert len({line.count("|") for line in lines}) == 1
    for method in METHODS:
        assert any(f"`{method.slug}`" in line and f"`{method.api}`" in line for line in lines)
