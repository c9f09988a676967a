"""Residual networks from files with PyTorch's names: every tensor has its place, and the real weights see."""

import io

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from odjax.io import RESNET, load_resnet, load_torch_checkpoint, save_safetensors, to_tensors
from odjax.models import ResNet
from odjax_train.proofs.cifar_features import normalized


def tensors(blocks=1, width=4, channels=2, classes=3, projection=False):
    """What the state_dict of such a network has: names and shapes as PyTorch writes them, random values."""
    rng = np.random.default_rng(0)
    found = {}

    def conv(name, out, inside, size):
        found[f"{name}.weight"] = rng.normal(size=(out, inside, size, size)).astype(np.float32)

    def norm(name, size):
        for part in ("weight", "bias", "running_mean", "running_var"):
            found[f"{name}.{part}"] = rng.uniform(0.5, 1, size).astype(np.float32)
        found[f"{name}.num_batches_tracked"] = np.asarray(5)

    conv("conv1", width, channels, 3)
    norm("bn1", width)
    inside = width
    for stage in range(1, 4):
        for block in range(blocks):
            out = width << (stage - 1)
            name = f"layer{stage}.{block}"
            conv(f"{name}.conv1", out, inside, 3)
            norm(f"{name}.bn1", out)
            conv(f"{name}.conv2", out, out, 3)
            norm(f"{name}.bn2", out)
            if projection and out != inside:
                conv(f"{name}.shortcut.0", out, inside, 1)
                norm(f"{name}.shortcut.1", out)
            inside = out
    if classes:
        found["linear.weight"] = rng.normal(size=(classes, inside)).astype(np.float32)
        found["linear.bias"] = rng.normal(size=classes).astype(np.float32)
    return found


def saved(tmp_path, state, prefix=""):
    path = tmp_path / "model.safetensors"
    save_safetensors(path, {prefix + name: tensor for name, tensor in state.items()})
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("blocks, projection", [(1, False), (2, True)])
def test_every_tensor_has_its_place_and_goes_back_to_it(tmp_path, blocks, projection, prefix):
    state = tensors(blocks, projection=projection)
    model, variables = load_resnet(saved(tmp_path, state, prefix))
    assert (model.depth, model.width, model.channels, model.classes) == (6 * blocks + 2, 4, 2, 3)
    assert model.shortcut == ("projection" if projection else "pad")
    back = to_tensors(variables, RESNET)
    counted = {name for name in state if name.endswith("num_batches_tracked")}
    assert set(back) == set(state) - counted
    for name, tensor in back.items():
        np.testing.assert_array_equal(tensor, state[name])


def test_a_convolution_of_the_file_is_the_convolution_of_the_model(tmp_path):
    state = tensors()
    _, variables = load_resnet(saved(tmp_path, state))
    kernel = variables["params"]["stage_2_block_0"]["conv_1"]["kernel"]
    assert kernel.shape == (3, 3, 4, 8)
    assert kernel[0, 2, 3, 5] == state["layer2.0.conv1.weight"][5, 3, 0, 2]
    mean = variables["batch_stats"]["stage_2_block_0"]["norm_1"]["mean"]
    np.testing.assert_array_equal(mean, state["layer2.0.bn1.running_mean"])


def test_another_number_of_classes_is_a_new_head_of_zeros_and_none_leaves_it_out(tmp_path):
    path = saved(tmp_path, tensors())
    model, variables = load_resnet(path, classes=7)
    assert model.classes == 7
    np.testing.assert_array_equal(variables["params"]["head"]["kernel"], np.zeros((16, 7)))
    model, variables = load_resnet(path, classes=None)
    assert "head" not in variables["params"]
    without = tensors(classes=None)
    model, variables = load_resnet(saved(tmp_path, without))
    assert model.classes is None


class Scaled(nn.Module):
    """A pool that has a random parameter."""

    @nn.compact
    def __call__(self, tokens, *, cls=None, mask=None):
        scale = self.param("scale", nn.initializers.normal(), (tokens.shape[-1],))
        return tokens.mean(1) * scale[None]


def test_a_pool_with_parameters_starts_from_the_key_and_the_rest_is_of_the_file(tmp_path):
    state = tensors()
    path = saved(tmp_path, state)
    drawn = []
    for key in (None, jax.random.key(0), jax.random.key(1)):
        _, variables = load_resnet(path, pool=Scaled(), key=key)
        drawn.append(variables["params"].pop("pool")["scale"])
        np.testing.assert_array_equal(variables["params"]["head"]["bias"], state["linear.bias"])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


def test_param_dtype_converts_the_parameters_and_not_the_statistics(tmp_path):
    _, variables = load_resnet(saved(tmp_path, tensors()), param_dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables["batch_stats"])} == {np.dtype(np.float32)}


def test_tensors_that_are_missing_or_too_many_are_named(tmp_path):
    state = tensors()
    extra = {**state, "layer1.0.conv3.weight": np.zeros((4, 4, 3, 3), np.float32)}
    with pytest.raises(ValueError, match=r"layer1.0.conv3.weight \[4, 4, 3, 3\] has no place"):
        load_resnet(saved(tmp_path, extra))
    missing = {name: tensor for name, tensor in state.items() if name != "layer3.0.bn2.running_var"}
    with pytest.raises(ValueError, match="no tensor for: batch_stats/stage_3_block_0/norm_2/var"):
        load_resnet(saved(tmp_path, missing))
    other = {**state, "bn1.weight": np.zeros(5, np.float32)}
    with pytest.raises(ValueError, match=r"bn1.weight \[5\] does not fit params/stem_norm/scale \[4\]"):
        load_resnet(saved(tmp_path, other))


def test_other_networks_are_an_error_that_says_what_is_needed(tmp_path):
    uneven = {**tensors(), "layer2.1.conv1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    fourth = {**tensors(), "layer4.0.conv1.weight": np.zeros((8, 8, 3, 3), np.float32)}
    for state in ({}, {"encoder.weight": np.zeros(2, np.float32)}, uneven, fourth):
        with pytest.raises(ValueError, match="is no residual network of the CIFAR family: needed are conv1"):
            load_resnet(saved(tmp_path, state))


@pytest.fixture(scope="module")
def real_network(real_data, tmp_path_factory):
    file = real_data / "resnet20_cifar10" / "resnet20.th"
    if not file.is_file():
        pytest.skip("no resnet20_cifar10/resnet20.th in the data folder")
    path = tmp_path_factory.mktemp("resnet") / "resnet20.safetensors"
    save_safetensors(path, load_torch_checkpoint(file)["state_dict"])
    return load_resnet(path)


def test_the_real_weights_are_the_network_of_the_paper(real_network):
    model, variables = real_network
    assert model == ResNet(20, classes=10, param_dtype=np.dtype(np.float32))
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == 269_722


def test_the_real_weights_name_most_of_200_test_images_rightly(real_network, real_data):
    image = pytest.importorskip("PIL.Image")
    path = real_data / "cifar10_jpeg.npz"
    if not path.is_file():
        pytest.skip("no cifar10_jpeg.npz in the data folder")
    model, variables = real_network
    with np.load(path) as file:
        data, offsets, labels = file["jpeg_test"], file["offset_test"], file["y_test"][:200]
    pixels = [
        np.asarray(image.open(io.BytesIO(data[offsets[i] : offsets[i + 1]].tobytes()))) for i in range(200)
    ]
    logits = jax.jit(model.apply)(variables, jnp.asarray(normalized(np.stack(pixels))))
    assert np.mean(np.argmax(np.asarray(logits), -1) == labels) > 0.7
