"""Who is there, and who asks to stop."""

import jax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from odjax_train.distributed import Agreement, Processes, on_cluster
from odjax_train.errors import UserError
from odjax_train.mesh import MeshShape, make_mesh


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (("localhost:1", None, None), "--coordinator, --processes and --process together"),
        ((None, 2, 0), "--coordinator, --processes and --process together"),
        (("localhost:1", 2, 2), r"--process 2 is not one of 0\.\.1"),
    ],
)
def test_half_an_address_is_refused(given_, message):
    with pytest.raises(UserError, match=message):
        Processes(*given_)


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, True),
        ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, False),
        ({"SLURM_NTASKS": "8"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_a_cluster_is_told_by_its_environment(environment, several):
    assert on_cluster(environment) == several


@given(votes=st.lists(st.booleans(), max_size=5))
def test_one_process_alone_stops_at_its_own_word(votes):
    agreement = Agreement(make_mesh(MeshShape(1, 1, 1), jax.devices()[:1]))
    assert [agreement.vote(vote) for vote in votes] == votes
