"""Reading images a batch at once: scaling, standardisation, random moves and mirrors."""

import dataclasses

import numpy as np

from odjax_train.data.examples import Arrays as Columns
from odjax_train.data.packing import digest
from odjax_train.data.shuffle import mix
from odjax_train.data.sources import Arrays, Source, read_many
from odjax_train.errors import UserError

# Records from storage are worth reading and decoding several batches at once.
_STORAGE_THREADS = 4


@dataclasses.dataclass(frozen=True, eq=False)
class ImageReader:
    """Labelled images by number.

    Attributes:
        spec: the source, named in errors.
        source: its records.
        shape: height, width, channels.
        classes: labels are in `[0, classes)`.
        mean: of each channel, or None.
        std: of each channel, or None.
        digest: identifies the content.
        shift: largest random move in pixels.
        flip: mirror half of the images.
    """

    spec: str
    source: Source
    shape: tuple[int, int, int]
    classes: int
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    digest: str
    shift: int = 0
    flip: bool = False

    def __len__(self) -> int:
        return len(self.source)

    @property
    def threads(self) -> int:
        """How many batches are worth reading at once."""
        return 0 if isinstance(self.source, Arrays) else _STORAGE_THREADS

    def read(self, rows: np.ndarray, draws: np.ndarray) -> Columns:
        """Examples by number.

        Args:
            rows: int64 `[B]`.
            draws: uint64 `[B]`, random bits for each.

        Returns:
            `image` float32 `[B, H, W, C]`, `label` int32 `[B]`, `weight` float32 `[B]`.

        Raises:
            UserError: an image of another shape or a label outside the classes, naming source and number.
        """
        if isinstance(self.source, Arrays):
            images, labels = self.source.columns["image"][rows], self.source.columns["label"][rows]
        else:
            read = read_many(self.source, rows)
            for row, record in zip(rows, read, strict=True):
                _check_shape(self.spec, int(row), np.shape(record["image"]), self.shape)
            images = np.stack([np.asarray(record["image"]) for record in read])
            labels = np.asarray([record["label"] for record in read])
            _check_labels(self.spec, rows, labels, self.classes)
        if self.flip or self.shift:
            images = self._augment(images.reshape(-1, *self.shape), draws)
        return {
            "image": self._scaled(images).reshape(-1, *self.shape),
            "label": labels.astype(np.int32),
            "weight": np.ones(len(rows), np.float32),
        }

    def _scaled(self, images: np.ndarray) -> np.ndarray:
        out = images.reshape(-1, *self.shape).astype(np.float32)
        if images.dtype == np.uint8:
            out /= np.float32(255)
        if self.mean is not None and self.std is not None:
            out -= np.asarray(self.mean, np.float32)
            out /= np.asarray(self.std, np.float32)
        return out

    def _augment(self, images: np.ndarray, draws: np.ndarray) -> np.ndarray:
        out = images
        if self.flip:
            mirrored = (draws & np.uint64(1)).astype(bool)
            out = np.where(mirrored[:, None, None, None], out[:, :, ::-1], out)
        if self.shift:
            room = np.uint64(2 * self.shift + 1)
            down = (mix(draws + np.uint64(1)) % room).astype(np.int64)
            right = (mix(draws + np.uint64(2)) % room).astype(np.int64)
            edge = (self.shift, self.shift)
            padded = np.pad(out, ((0, 0), edge, edge, (0, 0)))
            y = down[:, None, None] + np.arange(self.shape[0])[:, None]
            x = right[:, None, None] + np.arange(self.shape[1])
            out = padded[np.arange(len(out))[:, None, None], y, x]
        return out


def image_columns(
    spec: str,
    source: Source,
    *,
    shape: tuple[int, int, int],
    classes: int,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> ImageReader:
    """Checks a source of labelled images as far as it can be without reading it whole.

    Args:
        spec: named in errors.
        source: records with `image` and `label`.
        shape: height, width, channels that are wanted.
        classes: labels are in `[0, classes)`.
        mean: of each channel, or None.
        std: of each channel, or None.

    Returns:
        A reader. Arrays in memory are checked here, other records when they are read.

    Raises:
        UserError: no images or labels, another shape, a label outside the classes.
    """
    if not len(source):
        raise UserError(f"data source {spec!r}: it has no examples")
    first = source[0]
    for name in ("image", "label"):
        if name not in first:
            raise UserError(
                f"data source {spec!r}: its records have no {name!r}; they hold {', '.join(sorted(first))}"
            )
    _check_shape(spec, 0, np.shape(first["image"]), shape)
    if isinstance(source, Arrays):
        labels = source.columns["label"]
        if labels.ndim != 1 or labels.dtype.kind not in "iu":
            raise UserError(
                f"data source {spec!r}: labels must be integers [n], they are {labels.dtype} "
                f"{list(labels.shape)}"
            )
        _check_labels(spec, np.arange(len(labels)), labels, classes)
        content = digest(source.columns["image"], labels)
    else:
        places = np.unique(np.linspace(0, len(source) - 1, 16).astype(np.int64))
        sample = read_many(source, places)
        columns = [np.ascontiguousarray(record[name]) for record in sample for name in ("image", "label")]
        content = digest(np.array([len(source)]), *columns)
    return ImageReader(spec, source, shape, classes, mean, std, content)


def _check_shape(spec: str, number: int, found: tuple[int, ...], wanted: tuple[int, int, int]) -> None:
    if found != wanted and (*found, 1) != wanted:
        hint = f"; set shape={(*found, 1)[:3]}" if len(found) in (2, 3) else ""
        raise UserError(f"data source {spec!r}: image {number} has shape {found}, needed {wanted}{hint}")


def _check_labels(spec: str, rows: np.ndarray, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if wrong.size:
        place = wrong[0]
        raise UserError(
            f"data source {spec!r}: example {int(rows[place])} has label {labels[place]}, outside the "
            f"classes 0 to {classes - 1}"
        )
