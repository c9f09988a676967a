"""What nobody may know of a private run: the number that its cohorts and its noise follow from."""

import hashlib
import os
import secrets
from pathlib import Path

import numpy as np

from odjax_train.errors import UserError

FILE = "secret"
_BYTES = 16


def create(folder: Path) -> None:
    """Draws the secret of a new run from the system, and writes it where only its owner may read it.

    Args:
        folder: the run's folder.
    """
    path = folder / FILE
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(_BYTES) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(folder: Path) -> int:
    """The secret of a run.

    Args:
        folder: the run's folder.

    Raises:
        UserError: it is gone, and with it the cohorts and the noise of the rounds that are to come.
    """
    path = folder / FILE
    try:
        return int(path.read_text(), 16)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: the secret of this private run cannot be read. With another one, rounds that were "
            "released would be released again with other noise: start again in another folder"
        ) from error


def noise_key(secret: int) -> np.ndarray:
    """Data of the key of the noise, uint32 [2].

    Args:
        secret: of the run.
    """
    return np.frombuffer(_hash(secret, b"noise", 8), np.uint32)


def keyed(secret: int, text: str) -> str:
    """A checksum of a text that tells nothing to who does not know the secret.

    Args:
        secret: of the run.
        text: what is compared.
    """
    return _hash(secret, text.encode(), 16).hex()


def _hash(secret: int, text: bytes, size: int) -> bytes:
    width = max(_BYTES, (secret.bit_length() + 7) // 8)
    return hashlib.blake2b(text, digest_size=size, key=secret.to_bytes(width, "big")).digest()
