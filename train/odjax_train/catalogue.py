"""The methods and their proofs, for the command line."""

from pathlib import Path

from odjax.registry import METHODS
from odjax_train import run_folder
from odjax_train.errors import UserError
from odjax_train.proofs import load_proof, recorded_results, run_proof


def table() -> str:
    """Every method in a table for people."""
    from rich.console import Console
    from rich.table import Table

    results = recorded_results()
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("method", "kind", "what it is", "paper", "import", "proof"):
        shown.add_column(title, overflow="fold")
    for method in METHODS:
        paper = method.paper
        found = [f"{_status(results[proof])}" for proof in method.proofs if proof in results]
        status = "\n".join(found) or "none yet"
        shown.add_row(
            method.slug,
            method.kind,
            method.summary,
            f"{paper.authors} {paper.year}, {paper.link}",
            method.api,
            status,
        )
    console = Console(width=160) if not Console().is_terminal else Console()
    with console.capture() as captured:
        console.print(shown)
    return captured.get().rstrip()


def _status(result: dict) -> str:
    return f"{result['held']}/{result['claims']} claims hold ({result['date']}, {result['backend']})"


def prove(slug: str, folder: Path | None, *, quick: bool, seed: int) -> tuple[bool, str]:
    """Runs a method's proof.

    Args:
        slug: the method.
        folder: for the result and the plots.
        quick: smaller, in seconds.
        seed: of everything random.

    Returns:
        whether every claim holds, and a table of the claims beside what was measured.

    Raises:
        UserError: when there is no such method.
    """
    method = next((m for m in METHODS if slug in m.proofs), None)
    if method is None:
        try:
            load_proof(slug)
        except ValueError as error:
            raise UserError(str(error)) from None
    folder = folder or Path("runs") / "proofs" / slug
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: cannot be written: {error.strerror or error}") from error
    proof = run_proof(slug, folder, quick=quick, seed=seed)
    text = f"{method.name} ({method.paper.authors} {method.paper.year})\n" + str(proof)
    run_folder.write_text(folder / "proof.txt", text + "\n")
    return proof.holds, f"{text}\nwritten to {folder}"
