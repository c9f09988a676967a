"""Keys depend on path and step alone."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax.core.keys import fold_path, fold_step, keys_like


def bits(key):
    return np.asarray(jax.random.key_data(key)).tolist()


@given(st.lists(st.text(max_size=12), min_size=2, max_size=30, unique=True))
def test_different_paths_have_different_keys(paths):
    key = jax.random.key(0)
    assert len({tuple(bits(fold_path(key, path))) for path in paths}) == len(paths)


def test_the_key_of_a_path_is_two_folds_of_its_blake2b_words():
    # RFC 7693 hash of "a" with an 8-byte digest, worked out with b2sum -l 64.
    import hashlib

    words = np.frombuffer(hashlib.blake2b(b"a", digest_size=8).digest(), "<u4")
    key = jax.random.key(1)
    expected = jax.random.fold_in(jax.random.fold_in(key, int(words[0])), int(words[1]))
    assert bits(fold_path(key, "a")) == bits(expected)


def test_the_key_of_a_path_is_the_same_in_another_process():
    program = (
        "import jax; jax.config.update('jax_platforms', 'cpu')\n"
        "from odjax.core.keys import fold_path\n"
        "print(jax.random.key_data(fold_path(jax.random.key(7), 'layers/é/kernel')).tolist())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONHASHSEED": "99"},
    )
    assert done.stdout.strip() == str(bits(fold_path(jax.random.key(7), "layers/é/kernel")))


@given(st.integers(0, 2**31 - 1))
def test_a_traced_step_gives_the_key_of_the_python_step(step):
    key = jax.random.key(3)
    assert bits(fold_step(key, step)) == bits(traced_fold_step(key, jnp.int32(step)))


traced_fold_step = jax.jit(fold_step)


def test_keys_of_a_tree_do_not_depend_on_the_other_leaves():
    key = jax.random.key(0)
    small = keys_like(key, {"a": {"w": jnp.ones(2)}})
    large = keys_like(key, {"a": {"w": jnp.ones(9), "b": jnp.ones(1)}, "c": jnp.ones(1)})
    assert bits(small["a"]["w"]) == bits(large["a"]["w"]) == bits(fold_path(key, "a/w"))
    assert bits(large["a"]["b"]) != bits(large["a"]["w"])


def test_draws_do_not_depend_on_the_number_of_devices():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))

    def draw(key):
        return jax.random.normal(fold_step(fold_path(key, "w"), 5), (16, 3))

    key = jax.random.key(0)
    np.testing.assert_array_equal(jax.jit(draw)(key), jax.jit(draw, out_shardings=sharding)(key))


@pytest.mark.parametrize(
    "fold", [lambda k: fold_path(k, "a"), lambda k: fold_step(k, 1), lambda k: keys_like(k, {})]
)
def test_a_legacy_key_is_an_error_that_says_what_to_type(fold):
    with pytest.raises(TypeError, match=r"legacy uint32 key: type jax\.random\.key\(seed\)"):
        fold(jax.random.PRNGKey(0))


def test_other_wrong_keys_are_errors():
    with pytest.raises(TypeError, match=r"got 3: make it with jax\.random\.key"):
        fold_path(3, "a")
    with pytest.raises(ValueError, match=r"one key, got an array of keys of shape \(2,\)"):
        fold_path(jax.random.split(jax.random.key(0)), "a")
