"""What a proof returns."""

from typing import NamedTuple


class Claim(NamedTuple):
    """One claim beside its measurement.

    Attributes:
        text: what is claimed, a sentence.
        expected: what the claim predicts, as text with units.
        measured: what was measured, as text with units.
        holds: whether the measurement agrees.
    """

    text: str
    expected: str
    measured: str
    holds: bool


class Proof(NamedTuple):
    """The claims of one method. `str` of it is a table.

    Attributes:
        slug: the method.
        claims: each beside its measurement.
        quick: whether it is the small version that the tests run.
        plots: names of the files that were written into the folder.
    """

    slug: str
    claims: tuple[Claim, ...]
    quick: bool
    plots: tuple[str, ...] = ()

    @property
    def holds(self) -> bool:
        """Whether every claim holds."""
        return all(claim.holds for claim in self.claims)

    def __str__(self) -> str:
        lines = [f"{self.slug}: {sum(c.holds for c in self.claims)} of {len(self.claims)} claims hold"]
        for claim in self.claims:
            lines += [
                f"  [{'holds' if claim.holds else 'FAILS'}] {claim.text}",
                f"      expected: {claim.expected}",
                f"      measured: {claim.measured}",
            ]
        return "\n".join(lines)
