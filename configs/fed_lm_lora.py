"""The main job's language model, adapted to English prose that many clients hold parts of.

odjax train configs/lm_stdlib.py                     # first: what is adapted
odjax train configs/fed_lm_lora.py                   # Fed-RAC-LoRA: a seed goes out, a factor back
odjax train configs/fed_lm_lora.py --method dylora --epsilon 8 --run runs/dylora   # DP-DyLoRA
odjax merge runs/dylora --rank 4                     # served at any rank
"""

from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from odjax.federated import Aggregator, Algorithm, fed_adam, fed_avg
from odjax.federated.dylora import fed_dylora
from odjax.lowrank import FACTORS, adapt
from odjax.models import decoder
from odjax.privacy import privacy_plan
from odjax_train import ByClient, Experiment, Federated, Sample, language_model
from odjax_train.data import Text
from odjax_train.federated import ClientLoss, in_order, merging

# Sketches have entries of size one, so a step of the factor beside them is long.
LOCAL_RATES = {"rac": 2e-3}


def experiment(
    method: Literal["rac", "lora", "lora_fa", "dylora", "full"] = "rac",
    start_from: Path | None = Path("runs/lm_stdlib"),
    steps: int = 40,
    clients: int = 64,
    cohort: int = 16,
    local_batch: int = 4,
    epochs: int = 1,
    local_rate: float | None = None,
    server_rate: float | None = None,
    epsilon: float | None = None,
    delta: float = 1e-3,
    clip: float = 0.1,
    budget: float | None = None,
    rank: int = 8,
    where: str = r".*(attn|mlp).*/kernel",
    length: int = 128,
    preset: str = "byte-small",
    source: str = "pydoc",
    held_out: float = 0.15,
    attention: str | None = "blocked",
    scan: bool = False,
    lanes: int = 1,
    batch: int = 32,
    seed: int = 0,
) -> Experiment:
    """The main job's language model, adapted to text that many clients hold parts of.

    Args:
        method: what clients train: the factor beside a sketch, merged after every round (`rac`), both factors
            (`lora`), one beside a frozen one (`lora_fa`), the ranks that the server draws (`dylora`), all
            weights (`full`).
        start_from: the run to adapt, None to start from nothing.
        steps: rounds.
        clients: number of clients; each has neighbouring parts of the text.
        cohort: clients of a round; expected ones with privacy.
        local_batch: sequences in a local step.
        epochs: passes of a client over its sequences in a round.
        local_rate: learning rate of clients, None for a good one.
        server_rate: learning rate of the server, None for a good one.
        epsilon: privacy of each client against whoever sees the factors, None for none.
        delta: of the same.
        clip: norm to which each client's change is cut down, with privacy.
        budget: stop before more than this epsilon is spent.
        rank: of the update of every matrix; the largest one for `dylora`.
        where: which weights are adapted.
        length: bytes in a sequence.
        preset: size of the decoder, as in that run.
        source: the text.
        held_out: the part of it to judge on.
        attention: how it is computed.
        scan: whether that run scanned its layers.
        lanes: clients that train side by side on a device.
        batch: sequences in a batch of an evaluation.
        seed: of everything random.
    """
    bare = decoder(preset, max_length=max(length, 512), attention=attention, scan=scan)
    model = bare if method == "full" else adapt(bare, method=method, rank=rank, where=where)
    local_rate = LOCAL_RATES.get(method, 0.3) if local_rate is None else local_rate
    # The mean of the factors is merged as it is: that is the mean of the clients' models.
    rate = (1.0 if method == "rac" else 1e-2) if server_rate is None else server_rate
    server = optax.sgd(rate) if method == "rac" else fed_adam(rate)
    privacy = None
    if epsilon is not None:
        privacy = privacy_plan(
            population=clients, cohort=cohort, clip=clip, rounds=steps, delta=delta, epsilon=epsilon
        )

    def algorithm(
        loss: ClientLoss, server: optax.GradientTransformation, aggregator: Aggregator
    ) -> Algorithm:
        client = optax.sgd(local_rate)
        if method != "dylora":
            return fed_avg(loss, client, server, aggregator=aggregator)
        tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
        shapes = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), tokens))["params"]
        return fed_dylora(model, shapes, loss.of_model, client, server, aggregator=aggregator)

    return Experiment(
        model=model,
        task=language_model(),
        data=ByClient(Text(source=source, length=length, held_out=held_out), in_order(clients)),
        federated=Federated(
            algorithm=algorithm,
            cohort=None if privacy else cohort,
            batch=local_batch,
            epochs=epochs,
            privacy=privacy,
            budget=budget,
            lanes=lanes,
        ),
        optimizer=server,
        trainable=".*" if method == "full" else FACTORS,
        start_from=start_from,
        edits=(merging(model, server),) if method == "rac" else (),
        steps=steps,
        batch=batch,
        seed=seed,
        eval_every=10,
        checkpoint_every=10,
        sample=Sample("The statement ", length=300),
    )
