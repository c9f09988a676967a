"""A sparse run reports its links: what is logged is what counting by hand gives, also on a mesh and after a break."""

import io
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from rich.console import Console

from odjax.core import leaves_with_paths
from odjax.core.matrices import MatrixView
from odjax.models import MLP, decoder
from odjax.sparse import pack, set_, uniform, unpack
from odjax_train import topology_page
from odjax_train.metrics import Recorder, read
from odjax_train.topology import NPZ, Topology, _view, packed_masks

PACK = jax.jit(lambda masks: {path: pack(mask) for path, mask in masks.items()})


def sparse(model, *inputs, where=None):
    """A sparse optimizer for a model, wrapped as people wrap theirs."""
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)["params"]
    plan = uniform(params, 0.8, where=where)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1))
    return plan, set_(inner, plan, key=jax.random.key(1), interval=2)


@pytest.fixture(scope="module")
def program(lm, program_of):
    """A scanned decoder with sparse layers, in pieces on eight devices."""
    model = decoder("tiny", max_length=64)
    _, optimizer = sparse(model, jnp.zeros((1, 4), jnp.int32), where="layers/(attn|mlp)/.*/kernel")
    return program_of(lm(model=model, optimizer=optimizer), 2, 2, 2)


@pytest.fixture(scope="module")
def states(program):
    """Three states with other links each; of everything else there are the shapes."""
    masks = program.state.opt_state.masks
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(program.state.params) if path in masks}
    rng = np.random.default_rng(0)
    found = []
    for density in (0.2, 0.2, 0.01):
        drawn = {path: rng.random(shape) < density for path, shape in shapes.items()}
        places = program.shardings.opt_state.masks
        words = {path: jax.device_put(words, places[path]) for path, words in PACK(drawn).items()}
        found.append(program.state._replace(opt_state=program.state.opt_state._replace(masks=words)))
    return found


def recorder(folder):
    return Recorder(folder, 10, "tokens", Console(file=io.StringIO()), active=True)


def looks(folder, program, *states):
    """Looks at one state after the other, as one run; its log."""
    log = recorder(folder)
    topology = Topology(folder, program, log)
    for step, state in states:
        topology.look(state, step)
    log.close()
    return read(folder)[0]["topology"]


def flags(state):
    shapes = {path: leaf.shape for path, leaf in leaves_with_paths(state.params)}
    return {path: np.array(unpack(words, shapes[path])) for path, words in state.opt_state.masks.items()}


def test_what_is_logged_is_what_counting_gives(tmp_path, program, states):
    assert any(not mask.sharding.is_fully_replicated for mask in states[0].opt_state.masks.values())
    found = looks(tmp_path, program, *enumerate(states))
    masks = [flags(state) for state in states]
    places = sum(mask.size for mask in masks[0].values())
    ever = {path: np.zeros(mask.shape, bool) for path, mask in masks[0].items()}
    for step, now in enumerate(masks):
        links = sum(mask.sum() for mask in now.values())
        ever = {path: ever[path] | now[path] for path in now}
        assert found[step]["density"] == pytest.approx(links / places)
        assert found[step]["explored"] == pytest.approx(sum(m.sum() for m in ever.values()) / places)
        if step:
            new = sum((now[path] & ~masks[step - 1][path]).sum() for path in now)
            assert found[step]["moved"] == pytest.approx(new / links)
        for path, share in found[step]["leaves"].items():
            inputs = (1, 2) if "/o/" in path else (1,)
            outputs = tuple(axis for axis in range(1, now[path].ndim) if axis not in inputs)
            assert share["in"] == pytest.approx(now[path].any(axis=outputs).mean())
            assert share["out"] == pytest.approx(now[path].any(axis=inputs).mean())
    assert "moved" not in found[0]
    newest = topology_page.read(tmp_path)["newest"]
    for leaf in newest["leaves"]:
        degrees, often = leaf["degrees"]["in"]
        assert sum(often) == leaf["n_in"]
        assert sum(d * n for d, n in zip(degrees, often, strict=True)) == leaf["links"]
        assert leaf["seen"] == ever[leaf["path"]].sum()


def test_a_run_that_goes_on_remembers_all_links_and_repeats_no_look(tmp_path, program, states):
    first, second, third = states
    (whole := tmp_path / "whole").mkdir()
    (broken := tmp_path / "broken").mkdir()
    want = looks(whole, program, (0, first), (1, second), (2, third))
    looks(broken, program, (0, first), (1, second))
    # From an older checkpoint, so that step 1 comes again.
    got = looks(broken, program, (0, first), (1, third), (2, third))
    for step, look in want.items():
        assert {**got[step], "time": 0} == {**look, "time": 0}
    assert (broken / "topology.json").read_text() == (whole / "topology.json").read_text()
    (broken / NPZ).write_bytes(b"damaged")
    again = looks(broken, program, (3, first))
    assert again[3]["explored"] == again[3]["density"]


def test_masks_are_found_in_any_optimizer_and_dense_runs_have_none(tmp_path, images, program_of):
    model, image = MLP((8, 10)), jnp.zeros((1, 8, 8, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    plan, optimizer = sparse(model, image)
    with jax.numpy_dtype_promotion("standard"):
        nested = optax.chain(
            optax.partition({"all": optax.apply_if_finite(optimizer, 3)}, "all"), optax.scale(1.0)
        )
        found = packed_masks(jax.eval_shape(nested.init, params))
    assert set(found) == set(plan) == {"dense_0/kernel", "dense_1/kernel"}
    program = program_of(images(model=model), 1, 1, 1)
    assert looks(tmp_path, program, (0, program.state)) == {}
    assert topology_page.read(tmp_path) == {}
    assert topology_page.links(tmp_path) == topology_page.curves({"run": {}}) == ""


def test_leaves_of_other_models_are_read_by_their_last_axis():
    assert _view("layers/mixer/core", (2, 3, 4, 5, 6, 7)) == MatrixView((0,), (1, 2, 3, 4), (5,))
    assert _view("body/qkv/kernel", (3, 4, 5)) == MatrixView((), (0, 1), (2,))
    assert _view("layers/attn/o/kernel", (2, 3, 4, 5)) == MatrixView((0,), (1, 2), (3,))


def test_the_page_of_a_sparse_run_has_its_table_and_its_plots(tmp_path, program, states):
    found = looks(tmp_path, program, (0, states[0]), (5, states[2]))
    page = topology_page.links(tmp_path)
    assert page.count("<svg") == len(states[0].opt_state.masks) == 7
    assert "Links at step 5" in page
    mask = flags(states[2])["layers/mlp/up/kernel"]
    row = re.search(r"<tr><th>layers/mlp/up/kernel</th>(.*?)</tr>", page)[1]
    assert f"<td>{mask.sum():,}</td>" in row
    assert "2 × 96 × 256" in row
    assert topology_page.curves({"run": found}).count("<svg") == 5
    several = topology_page.curves({"one": found, "dense": {}, "other": found})
    assert several.count("<svg") == 5


def test_a_run_trains_a_sparse_model_and_reports_its_links(odjax, tmp_path):
    config = tmp_path / "sparse.py"
    config.write_text(
        '''\
"""A sparse perceptron."""
import jax, optax
import jax.numpy as jnp
from odjax.models import MLP
from odjax.sparse import set_, uniform
from odjax_train import Experiment, classification
from odjax_train.data import Images

def experiment(steps: int = 6) -> Experiment:
    """A sparse perceptron."""
    model = MLP((10,))
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    optimizer = set_(optax.sgd(0.1), uniform(params, 0.9), key=jax.random.key(0), interval=2)
    return Experiment(model=model, task=classification(), data=Images(source="digits"), optimizer=optimizer,
                      steps=steps, batch=8, eval_every=3, eval_batches=1, checkpoint_every=3)
'''
    )
    status, _, err = odjax("train", config, "--run", tmp_path / "run")
    assert status == 0, err
    found = read(tmp_path / "run")[0]["topology"]
    assert list(found) == [0, 3, 6]
    assert found[6]["moved"] > 0
    assert found[6]["explored"] > found[0]["explored"] == found[6]["density"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Links over time" in page
    assert "<th>dense_0/kernel</th>" in page
    assert json.loads((tmp_path / "run" / "topology.json").read_text())["first"]["step"] == 0
