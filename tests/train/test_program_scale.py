"""What must hold for a stack of layers of any size: it is never moved whole, whatever function runs."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from odjax.core import leaves_with_paths
from odjax.lowrank import FACTORS, adapt, restart
from odjax.models import decoder
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer
from odjax_train.mesh import MeshShape, in_force, make_mesh
from odjax_train.program import TPU_OPTIONS, build, compiler_options
from odjax_train.sparse import sparse_optimizer

from .test_plan_schedule import mesh_of

KERNELS = r"layers.*/(attn|mlp)/.*/kernel"
LAYERS, LENGTH = 5, 32  # layers unlike every other size
KINDS = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute|ragged-all-to-all"


def adapted(model):
    model = adapt(model, method="rac", rank=4, where=KERNELS)
    edit = restart(model, every=5, stochastic=True)
    return {"model": model, "optimizer": optax.adam(1e-3), "trainable": FACTORS, "edits": (edit,)}


def sparse(model):
    optimizer, edits = sparse_optimizer(
        "chtss",
        optax.adam(1e-3),
        model,
        [jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)],
        sparsity=0.7,
        where=r"layers/mlp/down/kernel",
        end=10,
        interval=2,
        exact=False,
        percolation=False,
    )
    return {"model": model, "optimizer": optimizer, "edits": edits}


def full(model):
    return {"model": model, "optimizer": optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))}


def moved(text):
    """Elements of every array that a collective gives or takes."""
    found = []
    for line in text.splitlines():
        if match := re.search(rf"= (.*?) (?:{KINDS})(?:-start)?\(", line):
            found += re.findall(r"\w+\[([\d,]*)\]", match[1])
    return [tuple(map(int, shape.split(","))) if shape else () for shape in found]


@pytest.mark.parametrize(
    "method, function",
    [(full, "step"), (adapted, "restart"), (adapted, "evaluate"), (sparse, "topology")],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_no_function_moves_a_stack_of_weights(method, function):
    model = decoder("tiny", layers=LAYERS, width=64, heads=8, kv_heads=8, max_length=LENGTH)
    program = build(
        Experiment(
            task=language_model(),
            data=Text(source="pydoc", length=LENGTH, tokenizer=load_tokenizer("byte")),
            steps=10,
            batch=8,
            **method(model),
        ),
        make_mesh(MeshShape(1, 8, 1)),
    )
    state = program.state
    with program.context(), jax.numpy_dtype_promotion("standard"):  # optax promotes
        lowered = {
            "step": lambda: program.step.lower(state, program.batch),
            "evaluate": lambda: program.evaluate.lower(state.params, state.collections, program.batch),
            **{edit.name: lambda apply=apply: apply.lower(state) for edit, apply in program.edits},
        }[function]()
        shapes = moved(lowered.compile().as_text())
    stacks = [leaf for path, leaf in leaves_with_paths(state.params) if path.endswith("kernel")]
    smallest = min(leaf.size for leaf in stacks)
    assert shapes, "a device holds a part of every weight, so that something must move"
    large = [shape for shape in shapes if LAYERS in shape and jnp.prod(jnp.asarray(shape)) >= smallest]
    assert not large


def test_options_for_the_compiler_go_to_tpus_alone():
    assert compiler_options(make_mesh(MeshShape(1, 8, 1))) == {}
    assert compiler_options(mesh_of(1, 16, 1)) == TPU_OPTIONS
    more = compiler_options(mesh_of(1, 16, 1, kind="TPU v6 lite"))
    assert more == {**TPU_OPTIONS, "xla_tpu_scoped_vmem_limit_kib": 65_536}


def test_what_is_computed_while_tracing_runs_where_there_are_devices():
    def traced(x):
        with jax.ensure_compile_time_eval():
            three = int(jnp.asarray(1) + 2)
        return x * three

    for mesh in (make_mesh(MeshShape(1, 8, 1)), mesh_of(1, 16, 1)):
        with in_force(mesh):
            assert jax.eval_shape(traced, jnp.int32(1)).dtype == jnp.int32
            assert jax.sharding.get_abstract_mesh().shape["fsdp"] == mesh.shape["fsdp"]
