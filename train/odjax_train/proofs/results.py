"""Running proofs by the slug of their method, and keeping what they measured."""

import datetime as dt
import importlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from odjax.registry import METHODS, find
from odjax_train.proofs.proof import Proof

RESULTS = Path(__file__).with_name("results.json")


def load_proof(slug: str) -> Callable[..., Proof]:
    """A proof of a method.

    Args:
        slug: one of the `proofs` of a method.

    Returns:
        `prove(folder, *, quick, seed) -> Proof`.

    Raises:
        ValueError: there is no such method (the closest are named), it has no proof yet, or one of another
            name.
    """
    known = dict.fromkeys(proof for method in METHODS for proof in method.proofs)
    if slug not in known:
        shared = find(slug).proofs
        if shared:
            raise ValueError(f"{slug} is proved with others: odjax reproduce {' or '.join(shared)}")
        raise ValueError(f"{slug} has no proof yet; there are proofs of {', '.join(known)}")
    return importlib.import_module(f"odjax_train.proofs.{slug.replace('-', '_')}").prove


def run_proof(slug: str, folder: Path, *, quick: bool = False, seed: int = 0) -> Proof:
    """Runs the proof of a method.

    Args:
        slug: the method.
        folder: where plots are written; made when it is missing.
        quick: a small version, in seconds.
        seed: of everything random.

    Returns:
        The claims beside the measurements.

    Raises:
        ValueError: there is no such method, or it has no proof yet.
    """
    prove = load_proof(slug)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return prove(folder, quick=quick, seed=seed)


def recorded_results(path: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """What the proofs measured when they were last recorded.

    Args:
        path: the file of results.

    Returns:
        slug -> {"date", "backend", "jax", "quick", "held", "claims", "measured"}; empty when nothing is
        recorded.
    """
    return json.loads(path.read_text()) if path.exists() else {}


def record(proof: Proof, path: Path = RESULTS) -> None:
    """Keeps what a proof measured, in place of what was kept for its method before.

    Args:
        proof: what `run_proof` returned.
        path: the file of results; written under another name first, then renamed.
    """
    results = recorded_results(path)
    results[proof.slug] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "backend": jax.default_backend(),
        "jax": jax.__version__,
        "quick": proof.quick,
        "held": sum(bool(claim.holds) for claim in proof.claims),
        "claims": len(proof.claims),
        "measured": [claim._asdict() | {"holds": bool(claim.holds)} for claim in proof.claims],
    }
    text = json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    temporary = path.with_name(path.name + f".{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
