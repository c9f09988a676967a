"""Runnable proofs: a paper's claim beside what is measured here, one module a method.

The module of the method `gumbel-top-k` is `odjax_train.proofs.gumbel_top_k`; its `prove(folder, *, quick,
seed)` writes plots into the folder and returns a `Proof`. What was measured last is kept in `results.json`
beside this file.
"""

from odjax_train.proofs.proof import Claim as Claim
from odjax_train.proofs.proof import Proof as Proof
from odjax_train.proofs.results import load_proof as load_proof
from odjax_train.proofs.results import record as record
from odjax_train.proofs.results import recorded_results as recorded_results
from odjax_train.proofs.results import run_proof as run_proof
