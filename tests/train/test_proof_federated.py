"""The federated proofs: their quick versions hold, and their parts do what they say on a little of MNIST."""

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from odjax.federated import fed_avg, init, make_round
from odjax.models import MLP
from odjax_train.proofs import dp_dylora, fed_engine, fed_rac_lora
from odjax_train.proofs.fed_mnist import accuracy, dealt, mnist, plain, plans, simulate, whole

PROOFS = {"fed-engine": fed_engine, "dp-dylora": dp_dylora, "fed-rac-lora": fed_rac_lora}


@pytest.mark.parametrize("slug", PROOFS)
def test_every_claim_of_the_quick_version_holds(slug, tmp_path):
    with jax.numpy_dtype_promotion("standard"):
        proof = PROOFS[slug].prove(tmp_path, quick=True, seed=1)
    assert proof.slug == slug
    assert proof.quick
    assert proof.holds, str(proof)


def test_the_fixed_point_of_fedavg_depends_on_local_steps_and_that_of_scaffold_does_not():
    for steps in (1, 4):
        average, controlled, apart = fed_engine.fixed_points(200, steps)
        assert average < 1e-4
        assert controlled < 1e-4
        assert (apart < 1e-9) == (steps == 1)


def test_the_clients_of_the_packing_table_have_339_steps_and_at_most_28():
    steps = fed_engine.cohort_steps()
    assert (steps.sum(), steps.max(), steps.min(), len(steps)) == (339, 28, 1, 50)


def test_digits_are_relabelled_by_their_place_in_the_list(real_data):
    parts = mnist((5, 7), real_data / "mnist.npz")
    images, labels = parts["test"]
    assert set(np.unique(labels)) == {0, 1}
    assert len(labels) == 892 + 1028
    assert images.shape == (len(labels), 784)


def test_rounds_of_mnist_learn_in_the_order_of_the_plans(real_data):
    x, y = mnist(path=real_data / "mnist.npz")["train"]
    clients = dealt((x[:2000], y[:2000]), np.arange(2000) // 20)
    several = plans(clients, 8, 20, batch=10, seed=0, lanes=2)
    assert [int((plan.cohort >= 0).sum()) for plan in several] == [20] * 8
    model = MLP((16, 10))
    params = nn.unbox(model.init(jax.random.key(0), x[:1])["params"])
    algorithm = fed_avg(whole(model), optax.sgd(0.1))
    run = plain(jax.jit(make_round(algorithm)))
    begin = init(algorithm, params, clients.count)
    end, _ = simulate(run, begin, None, clients.examples, several, jax.random.key(0))
    before, after = (accuracy(model, state.params, (x[2000:3000], y[2000:3000])) for state in (begin, end))
    assert before < 30
    assert after > 50
    assert end.round == 8


def test_the_gap_of_the_mean_is_rounding_for_a_chain_and_more_for_lora(real_data):
    parts = mnist(range(5, 10), real_data / "mnist.npz")["train"]
    clients = dealt((parts[0][:100], parts[1][:100]), np.arange(100) // 20)
    key = jax.random.key(0)
    params = nn.unbox(fed_rac_lora.MODEL.init(key, parts[0][:1])["params"])
    for method, low, high in (("RAC left", 0.0, 1e-5), ("LoRA", 1e-4, 1.0)):
        begin = fed_rac_lora.started(method, params, key)
        with jax.numpy_dtype_promotion("standard"):
            gap = fed_rac_lora.aggregation_gap(method, begin, clients, range(5), key)
        assert low <= gap < high
