"""What a ResNet-20 that was trained on CIFAR-10 sees in MNIST: the frozen features of two proofs.

The weights are `resnet20_cifar10/resnet20.th` in the folder of the environment variable ODJAX_DATA_DIR, read
without PyTorch and kept as safetensors in the proof's folder; CIFAR-10 is `cifar10_jpeg.npz`, MNIST
`mnist.npz`. A digit of 28x28 is brought to the 32x32 colour images of the network by two black pixels on
every side and three equal channels. Quick proofs take a network with random weights and scikit-learn's
digits.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from odjax.io import load_resnet, load_torch_checkpoint, save_safetensors
from odjax.models import ResNet, resnet
from odjax_train.data.sources import open_source
from odjax_train.errors import UserError
from odjax_train.proofs.figure import save_figure
from odjax_train.proofs.proof import Claim

MEAN = np.asarray((0.485, 0.456, 0.406), np.float32)
STD = np.asarray((0.229, 0.224, 0.225), np.float32)
FILES = ("resnet20_cifar10/resnet20.th", "cifar10_jpeg.npz", "mnist.npz")
LABELLED, DEV = 1000, 2000  # training images a seed, and held out to choose a learning rate
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1)


class Maps(NamedTuple):
    """Features of digits: every seed learns from images of its own, all are judged on the same.

    Attributes:
        train: a seed's tokens [n, N, D], without negative entries, one array a seed.
        train_labels: a seed's labels [n].
        dev: [k, N, D], to choose a learning rate on; nothing is learned from them.
        dev_labels: [k].
        test: [m, N, D].
        test_labels: [m].
    """

    train: Sequence[jax.Array]
    train_labels: Sequence[jax.Array]
    dev: jax.Array
    dev_labels: jax.Array
    test: jax.Array
    test_labels: jax.Array


class Fitted(NamedTuple):
    """A trained probe of every seed: test accuracy in per cent [seeds], parameters, and how many it has."""

    accuracy: np.ndarray
    params: Any
    size: int


def data_folder() -> Path:
    """The folder of the data, with all that the full proofs read.

    Returns:
        The folder.

    Raises:
        UserError: a file is missing.
    """
    folder = Path(os.environ.get("ODJAX_DATA_DIR", "."))
    for name in FILES:
        if not (folder / name).is_file():
            raise UserError(
                f"{folder / name} is missing: set ODJAX_DATA_DIR to a folder with {', '.join(FILES)}, or run "
                "the quick proof"
            )
    return folder


def normalized(images: np.ndarray) -> np.ndarray:
    """Images as the network was trained on them.

    Args:
        images: [n, H, W, 3] uint8.

    Returns:
        [n, H, W, 3] float32: 0 to 1, less the mean of a channel, divided by its standard deviation.

    >>> normalized(np.full((1, 1, 1, 3), 255, np.uint8)).round(3)
    array([[[[2.249, 2.429, 2.64 ]]]], dtype=float32)
    """
    return (images.astype(np.float32) / np.float32(255) - MEAN) / STD


def as_colour(digits: np.ndarray) -> np.ndarray:
    """Grey digits as the colour images of the network: black around them, three equal channels.

    Args:
        digits: [n, 28, 28] uint8.

    Returns:
        [n, 32, 32, 3] float32, normalized.

    >>> as_colour(np.zeros((2, 28, 28), np.uint8)).shape
    (2, 32, 32, 3)
    """
    padded = np.pad(digits, ((0, 0), (2, 2), (2, 2)))
    return normalized(np.repeat(padded[..., None], 3, -1))


def network(data: Path, folder: Path) -> tuple[ResNet, Any]:
    """The trained network; its weights are converted into the folder the first time.

    Args:
        data: as from `data_folder`.
        folder: of the proof.

    Returns:
        The model and its variables.
    """
    path = folder / "resnet20.safetensors"
    if not path.is_file():
        state = load_torch_checkpoint(data / FILES[0])["state_dict"]
        save_safetensors(path, state, {"format": "pt"})
    model, variables = load_resnet(path)
    return model, jax.tree.map(jnp.asarray, variables)


def in_batches(run: Callable[[jax.Array], jax.Array], images: np.ndarray, batch: int = 250) -> np.ndarray:
    """A function of images, batch by batch.

    Args:
        run: [batch, ...] -> [batch, ...].
        images: [n, ...]; the last batch is filled up with zeros.
        batch: images at a time.

    Returns:
        [n, ...] on the host.
    """
    fast, parts = jax.jit(run), []
    for start in range(0, len(images), batch):
        part = images[start : start + batch]
        filled = np.pad(part, ((0, batch - len(part)), *((0, 0),) * (images.ndim - 1)))
        parts.append(np.asarray(fast(jnp.asarray(filled)))[: len(part)])
    return np.concatenate(parts)


def tokens_of(model: ResNet, variables: Any, images: np.ndarray) -> np.ndarray:
    """The pixels of the last map, [n, h w, D], of images [n, H, W, C]."""
    maps = in_batches(partial(model.apply, variables, method="features"), images)
    return maps.reshape(len(maps), -1, maps.shape[-1])


def cifar_claim(data: Path, model: ResNet, variables: Any) -> Claim:
    """The network names the images of CIFAR-10's test set.

    Args:
        data: as from `data_folder`.
        model: the network.
        variables: of the network.

    Returns:
        The claim. The images were stored anew as JPEG, which costs the network ten points.
    """
    test = open_source(f"npz:{data / FILES[1]}", "test").columns
    found = in_batches(lambda x: model.apply(variables, x).argmax(-1), normalized(test["image"]))
    accuracy = 100 * float(np.mean(found == test["label"]))
    return Claim(
        "ResNet-20 with the weights of the PyTorch checkpoint names CIFAR-10's test images.",
        "between 80 and 82 % (91.8 % is published for the original pixels; these were stored anew as JPEG)",
        f"{accuracy:.2f} % of {len(found):,} images",
        80 <= accuracy <= 82,
    )


def mnist_maps(data: Path, model: ResNet, variables: Any, seeds: int, seed: int) -> Maps:
    """Features of MNIST: LABELLED training images a seed, none twice, DEV others, the 10,000 of the test set.

    Args:
        data: as from `data_folder`.
        model: the network.
        variables: of the network.
        seeds: number of trainings.
        seed: draws the training images.

    Returns:
        64 tokens of 64 channels an image.
    """
    with np.load(data / FILES[2]) as file:
        rows = np.random.default_rng(seed).permutation(len(file["y_train"]))[: seeds * LABELLED + DEV]
        images = np.concatenate([file["x_train"][rows], file["x_test"]])
        labels = jnp.asarray(np.concatenate([file["y_train"][rows], file["y_test"]]), jnp.int32)
    tokens = jnp.asarray(tokens_of(model, variables, as_colour(images)))
    return _split(tokens, labels, [LABELLED] * seeds + [DEV])


def digits_maps(seed: int) -> Maps:
    """Features of scikit-learn's digits in a network with random weights, no data folder needed.

    Args:
        seed: of the weights and of the split.

    Returns:
        16 tokens of 64 channels an image, one seed, 500 images to learn from and 500 to judge.
    """
    from sklearn.datasets import load_digits

    raw = load_digits()
    order = np.random.default_rng(seed).permutation(len(raw.target))[:1100]
    images = (raw.images[order, ..., None] / 16).astype(np.float32).repeat(2, 1).repeat(2, 2)
    # Norms take the statistics of the digits, as those of a trained network would be of its data.
    init = partial(resnet("resnet8", channels=1).init_with_output, method="features", train=True)
    maps, _ = jax.jit(init)(jax.random.key(seed), jnp.asarray(images))
    tokens = jnp.reshape(maps, (len(images), -1, maps.shape[-1]))
    return _split(tokens, jnp.asarray(raw.target[order], jnp.int32), [500, 100])


def _split(tokens: jax.Array, labels: jax.Array, sizes: Sequence[int]) -> Maps:
    """The images of each seed, those to choose on, and the rest."""
    at = np.cumsum(sizes).tolist()
    x, y = jnp.split(tokens, at), jnp.split(labels, at)
    return Maps(x[:-2], y[:-2], x[-2], y[-2], x[-1], y[-1])


class Recipe(NamedTuple):
    """How a model is trained: AdamW, its rate falling to zero by a cosine.

    Attributes:
        steps: number of updates.
        rate: the first learning rate.
        batch: images of an update, drawn with replacement.
        decay: weight decay, of matrices and kernels alone: not of exponents, scales and biases.
    """

    steps: int
    rate: float
    batch: int = 100
    decay: float = 0.05


def fit(model: nn.Module, maps: Maps, recipe: Recipe, seed: int) -> Fitted:
    """Trains a model once a seed.

    Args:
        model: tokens (or images) -> logits.
        maps: to learn from and to be judged on.
        recipe: how.
        seed: of the initial values and batches; the same for every model.

    Returns:
        Accuracy and parameters of every seed.
    """
    optimizer = optax.adamw(
        optax.cosine_decay_schedule(recipe.rate, recipe.steps),
        weight_decay=recipe.decay,
        mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
    )

    def loss(params: Any, x: jax.Array, y: jax.Array) -> jax.Array:
        logits = model.apply({"params": params}, x)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    @jax.jit
    def train(key: jax.Array, x: jax.Array, y: jax.Array) -> Any:
        params = nn.unbox(model.init(key, x[:2])["params"])

        def step(carry: Any, key: jax.Array) -> tuple[Any, None]:
            params, state = carry
            rows = jax.random.randint(key, (recipe.batch,), 0, x.shape[0])
            gradient = jax.grad(loss)(params, x[rows], y[rows])
            with jax.numpy_dtype_promotion("standard"):
                updates, state = optimizer.update(gradient, state, params)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.fold_in(key, 1), recipe.steps)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[0][0]

    trained, accuracies = [], []
    test, labels = np.asarray(maps.test), np.asarray(maps.test_labels)
    answer = jax.jit(lambda params, x: jnp.argmax(model.apply({"params": params}, x), -1))
    for i, (x, y) in enumerate(zip(maps.train, maps.train_labels, strict=True)):
        trained.append(train(jax.random.fold_in(jax.random.key(seed), i), x, y))
        found = in_batches(partial(answer, trained[-1]), test)
        accuracies.append(100 * float(np.mean(found == labels)))
    size = sum(leaf.size for leaf in jax.tree.leaves(trained[0]))
    return Fitted(np.asarray(accuracies), trained, size)


def best_rate(
    model: nn.Module, maps: Maps, recipe: Recipe, seed: int, rates: Sequence[float] = RATES
) -> float:
    """The rate whose training on the first seed's images is the best on `maps.dev`.

    Args:
        model: as for `fit`.
        maps: as for `fit`.
        recipe: as for `fit`; its rate is not used.
        seed: as for `fit`.
        rates: to choose from.

    Returns:
        The rate.
    """
    first = Maps(maps.train[:1], maps.train_labels[:1], maps.dev, maps.dev_labels, maps.dev, maps.dev_labels)
    found = {rate: fit(model, first, recipe._replace(rate=rate), seed).accuracy[0] for rate in rates}
    return max(found, key=lambda rate: found[rate])


class PooledProbe(nn.Module):
    """A pooling, LayerNorm or none, and a linear classifier that begins at zero.

    Attributes:
        pool: `pool(tokens [B, N, D]) -> [B, F]`.
        norm: whether the pooled vector is normalized.
        classes: number of classes.
    """

    pool: nn.Module
    norm: bool = True
    classes: int = 10

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `tokens` [B, N, D] to logits [B, classes]."""
        x = self.pool(tokens)
        if self.norm:
            x = nn.LayerNorm(epsilon=1e-5, name="norm")(x)
        return nn.Dense(self.classes, kernel_init=nn.initializers.zeros, name="head")(x)


def spread(values: np.ndarray) -> str:
    """Mean and standard deviation of accuracies, "86.7 ± 0.2".

    >>> spread(np.asarray([86.0, 88.0]))
    '87.0 ± 1.4'
    """
    return f"{values.mean():.1f} ± {values.std(ddof=1) if len(values) > 1 else 0.0:.1f}"


def bars(path: Path, fitted: dict[str, Fitted], title: str) -> str:
    """Draws accuracies, means with standard deviations over seeds.

    Args:
        path: of the plot.
        fitted: by name.
        title: of the plot.

    Returns:
        The name of the file.
    """

    def plot(axes: Any) -> None:
        names = list(fitted)[::-1]
        means = [fitted[name].accuracy.mean() for name in names]
        errors = [fitted[name].accuracy.std(ddof=min(1, len(fitted[name].accuracy) - 1)) for name in names]
        axes.barh(names, means, xerr=errors)
        least = min(means)
        axes.set(xlabel="test accuracy (%)", title=title, xlim=(max(0, least - 5), min(100, max(means) + 3)))

    return save_figure(path, plot, (7, 4))
