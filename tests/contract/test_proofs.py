"""Every proof of the registry runs in its quick version, and results are kept as they came out."""

import json

import pytest

from odjax.registry import METHODS
from odjax_train.proofs import Claim, Proof, load_proof, record, recorded_results, run_proof

PROVED = list(dict.fromkeys(proof for method in METHODS for proof in method.proofs))


@pytest.fixture(scope="module", params=PROVED)
def proof(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return run_proof(request.param, folder / "new", quick=True, seed=0), folder / "new"


def test_a_quick_proof_returns_its_claims_and_writes_its_plots(proof):
    result, folder = proof
    assert result.quick
    assert result.claims
    for claim in result.claims:
        assert claim.text.endswith(".")
        assert claim.expected
        assert claim.measured
    for name in result.plots:
        assert (folder / name).stat().st_size > 1000
    assert str(result).startswith(f"{result.slug}: ")


def test_theorems_hold_in_their_quick_proof_too(proof):
    result, _ = proof
    if result.slug != "shrink-perturb":  # an experiment, not a theorem: a few seeds cannot judge it
        assert result.holds, str(result)


def test_every_proof_was_recorded_in_its_full_version():
    results = recorded_results()
    for slug in PROVED:
        assert results[slug]["quick"] is False
        assert results[slug]["claims"] == len(results[slug]["measured"])
        assert results[slug]["held"] == sum(claim["holds"] for claim in results[slug]["measured"])
        assert set(results[slug]) == {"date", "backend", "jax", "quick", "held", "claims", "measured"}


def test_recording_replaces_one_method_and_keeps_the_others(tmp_path):
    path = tmp_path / "results.json"
    assert recorded_results(path) == {}
    good, bad = Claim("A.", "1", "1", True), Claim("B.", "1", "2", False)
    record(Proof("one", (good,), False), path)
    record(Proof("two", (good, bad), True), path)
    record(Proof("one", (bad,), False), path)
    results = recorded_results(path)
    assert (results["one"]["held"], results["two"]["held"], results["two"]["claims"]) == (0, 1, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["results.json"]
    assert json.loads(path.read_text()) == results


def test_a_slug_without_a_proof_is_an_error_that_says_so(monkeypatch):
    with pytest.raises(ValueError, match="there is no method 'gumble-top-k'; the closest are 'gumbel-top-k'"):
        load_proof("gumble-top-k")
    unproved = METHODS[0]._replace(slug="unproved", proofs=())
    monkeypatch.setattr("odjax.registry.METHODS", (*METHODS, unproved))
    with pytest.raises(ValueError, match="unproved has no proof yet; there are proofs of chan-moments"):
        load_proof("unproved")
    with pytest.raises(ValueError, match="dot-regression is proved with others: odjax reproduce etf-head"):
        load_proof("dot-regression")


def test_a_proof_holds_only_when_every_claim_does():
    good, bad = Claim("A.", "1", "1", True), Claim("B.", "1", "2", False)
    assert Proof("x", (good,), False).holds
    assert not Proof("x", (good, bad), False).holds
    assert "[FAILS] B." in str(Proof("x", (good, bad), False))
