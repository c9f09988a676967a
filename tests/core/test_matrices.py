import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from odjax.core.matrices import MatrixView, check_patterns, from_matrices, to_matrices, view_of
from odjax.core.paths import leaves_with_paths
from odjax.models import decoder


@settings(max_examples=12)
@given(st.permutations(range(4)), st.integers(0, 2), st.integers(1, 3))
def test_from_matrices_inverts_to_matrices_for_any_order_of_axes(order, batch, inputs):
    inputs = min(inputs, 3 - batch)
    view = MatrixView(
        tuple(order[:batch]), tuple(order[batch : batch + inputs]), tuple(order[batch + inputs :])
    )
    x = np.arange(120.0).reshape(2, 3, 4, 5)
    matrices = to_matrices(jnp.asarray(x), view)
    size = lambda axes: int(np.prod([x.shape[a] for a in axes], dtype=int))  # noqa: E731
    assert matrices.shape == (*(x.shape[a] for a in view.batch), size(view.inputs), size(view.outputs))
    np.testing.assert_array_equal(from_matrices(matrices, view, x.shape), x)


def test_the_matrix_of_an_attention_kernel_is_the_linear_map_that_the_layer_applies():
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(5, 6)), rng.normal(size=(6, 2, 3))
    view = view_of("attn/query/kernel", w.shape)
    np.testing.assert_allclose(
        x @ np.asarray(to_matrices(jnp.asarray(w), view), np.float64),
        np.einsum("td,dhk->thk", x, w).reshape(5, 6),
        rtol=1e-5,
        atol=1e-5,
    )
    y, o = rng.normal(size=(5, 2, 3)), rng.normal(size=(2, 3, 6))
    view = view_of("attn/out/kernel", o.shape)
    np.testing.assert_allclose(
        y.reshape(5, 6) @ np.asarray(to_matrices(jnp.asarray(o), view), np.float64),
        np.einsum("thk,hkd->td", y, o),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("scan", [True, False])
def test_every_kernel_of_the_decoder_is_seen_as_inputs_by_outputs(scan):
    model = decoder(
        *("tiny",), vocab=32, layers=2, width=16, heads=4, kv_heads=2, head_dim=6, mlp_width=24, scan=scan
    )
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((1, 4), jnp.int32))["params"]
    expected = {"q": (16, 24), "k": (16, 12), "v": (16, 12), "o": (24, 16), "down": (24, 16), "up": (16, 24)}
    seen = set()
    for path, leaf in leaves_with_paths(params):
        name = path.split("/")[-2]
        if path.endswith("kernel") and name in expected:
            seen.add(name)
            view = view_of(path, leaf.shape)
            assert view.batch == ((0,) if scan else ())
            size = lambda axes, leaf=leaf: int(np.prod([leaf.shape[a] for a in axes]))  # noqa: E731
            assert (size(view.inputs), size(view.outputs)) == expected[name]
    assert seen == set(expected)


@pytest.mark.parametrize(
    "path,shape,view",
    [
        ("w", (3, 4), MatrixView((), (0,), (1,))),
        ("layers/0/kernel", (3, 4), MatrixView((), (0,), (1,))),
        ("enc/layers/mlp/kernel", (2, 3, 4), MatrixView((0,), (1,), (2,))),
        ("Conv_0/kernel", (3, 3, 4, 8), MatrixView((), (0, 1, 2), (3,))),
        ("conv/kernel", (3, 4, 8), MatrixView((), (0, 1), (2,))),
        ("patch/kernel", (2, 2, 1, 16), MatrixView((), (0, 1, 2), (3,))),
    ],
)
def test_the_default_view_of(path, shape, view):
    assert view_of(path, shape) == view


def test_dimension_numbers_by_pattern_and_by_function_replace_the_default():
    view = MatrixView((0,), (1,), (-1,))
    assert view_of("moe/kernel", (4, 3, 5), {"moe/.*": view}) == MatrixView((0,), (1,), (2,))
    assert view_of("moe/kernel", (4, 3, 5), lambda path, shape: view) == MatrixView((0,), (1,), (2,))
    assert view_of("w", (3, 5), {"moe/.*": view}) == MatrixView((), (0,), (1,))


@pytest.mark.parametrize(
    "call,error,message",
    [
        (lambda: view_of("b", (3,)), ValueError, "'b' of shape \\(3,\\) is no matrix: narrow where="),
        (lambda: view_of("layers/norm/scale", (2, 3)), ValueError, "is a stack of vectors"),
        (
            lambda: view_of("moe/kernel", (4, 3, 5)),
            ValueError,
            "could be several matrices: say which axes are which with dimension_numbers=\\{'moe/kernel': MatrixView",
        ),
        (lambda: view_of("w", (3, 4), {"w": MatrixView((), (0,), (0,))}), ValueError, "exactly once"),
        (lambda: view_of("w", (3, 4), {"w": MatrixView((), (0,), (2,))}), ValueError, "exactly once"),
        (
            lambda: view_of("w", (3, 4), {"w": MatrixView((0,), (), (1,))}),
            ValueError,
            "at least one input and one output",
        ),
        (lambda: view_of("w", (3, 4), {"w": (0, 1)}), TypeError, "must be a MatrixView, got \\(0, 1\\)"),
        (
            lambda: view_of("w", (3, 4), {"w": MatrixView((), (0,), (1,)), "w+": MatrixView((), (1,), (0,))}),
            ValueError,
            "different dimension numbers by the patterns 'w' and 'w\\+'",
        ),
        (
            lambda: check_patterns({"v": MatrixView((), (0,), (1,))}, ["w"]),
            ValueError,
            "dimension_numbers has 'v', which matches no path such as 'w'",
        ),
    ],
)
def test_a_view_that_cannot_be_is_an_error_with_the_remedy(call, error, message):
    with pytest.raises(error, match=message):
        call()
