"""Linear probes on the frozen features of networks that were trained below different heads.

The head is dropped, the backbone frozen, and a logistic regression learns new labels from few images. The
paper trains on ImageNet and probes fine-grained sets, which needs accelerators. Toys do not settle which head
transfers best: what comes out here is reported, and no head is claimed to win. So far it speaks against more
collapse being better: dot regression, which collapses most, came out last in every transfer.
"""

import zipfile
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from odjax_train.proofs.etf_head_training import Data, Trained, features

OMNIGLOT = "omniglot/images_background_small1.zip"


class Target(NamedTuple):
    """What frozen features are probed on.

    Attributes:
        pool: images and labels that the labelled ones are drawn from.
        test: images and labels to be judged on.
        labels: labelled images of every class.
        classes: how many classes are drawn a seed; None: all.
    """

    pool: Data
    test: Data
    labels: int
    classes: int | None = None


class Transfer(NamedTuple):
    """What a network is trained on, and what its features are then probed on.

    Attributes:
        how: from what to what, in words.
        images: to train the network on, and their labels.
        classes: how many there are.
        target: of the probe.
    """

    how: str
    images: Data
    classes: int
    target: Target


def of_classes(data: Data, classes: range) -> Data:
    """The images of some classes, which are numbered anew from 0."""
    x, y = data
    rows = np.flatnonzero((np.asarray(y) >= classes.start) & (np.asarray(y) < classes.stop))
    return x[rows], y[rows] - classes.start


def turned(data: Data, side: int) -> Data:
    """Images [n, side * side] mirrored and then transposed, which is a quarter turn."""
    x, y = data
    images = jnp.reshape(x, (-1, side, side))[:, :, ::-1].swapaxes(1, 2)
    return jnp.reshape(images, x.shape), y


def shrunk(data: Data) -> Data:
    """MNIST [n, 784] as 8x8 images like scikit-learn's digits: the middle 24x24, in means of 3x3 pixels."""
    x, y = data
    middle = jnp.reshape(x, (-1, 28, 28))[:, 2:26, 2:26]
    return jnp.reshape(jnp.mean(jnp.reshape(middle, (-1, 8, 3, 8, 3)), axis=(2, 4)), (-1, 64)), y


def omniglot(path: Path, drawers: int = 10) -> tuple[Data, Data]:
    """Handwritten characters, white on black, 28x28: those of some drawers, and those of the others.

    Args:
        path: a zip file of Omniglot, of PNG images 105x105 with names that end in `_<drawer>.png`.
        drawers: whose images go into the first part.

    Returns:
        Two times images [n, 784] in 0..1 and labels [n], characters numbered by name.
    """
    from PIL import Image

    parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    labels: tuple[list[int], list[int]] = ([], [])
    characters: dict[str, int] = {}
    with zipfile.ZipFile(path) as archive:
        for name in sorted(name for name in archive.namelist() if name.endswith(".png")):
            character = characters.setdefault(name.rsplit("/", 1)[0], len(characters))
            drawer = int(name.rsplit("_", 1)[1].removesuffix(".png"))
            with archive.open(name) as file:
                ink = 1.0 - np.asarray(Image.open(file).convert("L"), np.float32) / 255
            image = np.pad(ink, ((3, 4), (3, 4))).reshape(28, 4, 28, 4).mean((1, 3))
            parts[drawer > drawers].append(image.reshape(784))
            labels[drawer > drawers].append(character)
    first, second = (
        (jnp.asarray(np.stack(x)), jnp.asarray(y, jnp.int32)) for x, y in zip(parts, labels, strict=True)
    )
    return first, second


def digits_transfers(train: Data, test: Data) -> dict[str, Transfer]:
    """Two ways to leave scikit-learn's digits: to classes never seen, and to images never seen like that.

    Args:
        train: to learn from.
        test: to be judged on.

    Returns:
        Name -> the transfer.
    """
    seen, new = range(7), range(7, 10)
    unseen = Target(of_classes(train, new), of_classes(test, new), 20)
    return {
        "new classes": Transfer(
            "digits 0 to 6, then 7 to 9 with 60 labels", of_classes(train, seen), len(seen), unseen
        ),
        "another domain": Transfer(
            "digits, then mirrored and transposed ones with 200 labels",
            *(train, 10, Target(turned(train, 8), turned(test, 8), 20)),
        ),
    }


def probe(trained: Trained, target: Target, seed: int) -> np.ndarray:
    """Test accuracy of a logistic regression on frozen features.

    The features are those of the backbone, before any normalization, less the mean of the labelled ones and
    divided by one number, so that the penalty means the same for every network.

    Args:
        trained: networks of several seeds.
        target: what they are probed on.
        seed: draws the labelled images: the same for all heads, others for every seed of the networks.

    Returns:
        Per cent, [seeds].
    """
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    pools, tests = (
        np.asarray(features(trained.model, trained.variables, x), np.float64)
        for x in (target.pool[0], target.test[0])
    )
    y, y_test = np.asarray(target.pool[1]), np.asarray(target.test[1])
    found = []
    for i, (h, h_test) in enumerate(zip(pools, tests, strict=True)):
        draw = np.random.default_rng((seed, i))
        classes = np.unique(y)
        if target.classes is not None:
            classes = draw.choice(classes, target.classes, replace=False)
        rows = np.concatenate([draw.choice(np.flatnonzero(y == k), target.labels, False) for k in classes])
        judged = np.isin(y_test, classes)
        mean = h[rows].mean(0)
        size = np.sqrt(np.mean((h[rows] - mean) ** 2))
        # Problems this small are ten times slower on several threads of a busy machine.
        with threadpool_limits(1):
            model = LogisticRegression(max_iter=5000).fit((h[rows] - mean) / size, y[rows])
            found.append(100 * model.score((h_test[judged] - mean) / size, y_test[judged]))
    return np.asarray(found)
