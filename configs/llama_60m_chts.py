r"""A Llama of 60 million parameters with 30 % of its links, for a pod: CHTs or CHTss from the first step.

    odjax train configs/llama_60m_chts.py --source 'arrayrecord:/data/text-*.array_record' \
      --tokenizer tokenizer.json --mesh 1,16,1

Zhang et al., NeurIPS 2025, arXiv 2501.19107: perplexity on OpenWebText after 10,000 steps of 512 x 256 tokens
with 30 / 20 / 10 / 5 % of the links: CHTs 28.12 / 29.84 / 33.03 / 36.47, CHTss 27.62 / 29.00 / 31.42 / 35.10
(all links 26.56). Not run here: there is no OpenWebText and no pod on the machine that this was written on.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import optax

from odjax.models import decoder
from odjax.sparse.schedules import rewarm as rewarmed
from odjax_train import Experiment, language_model
from odjax_train.data import Text, load_tokenizer
from odjax_train.mesh import MeshShape
from odjax_train.sparse import Degrees, Distribution, Method, Predictor, Topology, moves, sparse_optimizer


def experiment(
    method: Method = "chts",
    steps: int = 10_000,
    batch: int = 512,
    length: int = 256,
    preset: Literal["60m", "130m", "350m", "1b", "7b", "70b"] = "60m",
    learning_rate: float = 3e-3,
    warmup: int = 1000,
    sparsity: float = 0.7,
    where: str = r"layers.*/(attn|mlp)/.*/kernel",
    distribution: Distribution = "uniform",
    per_head: bool = False,
    initial_topology: Topology | None = None,
    r: float = 0.1,
    degrees: Degrees = "fixed",
    interval: int = 100,
    end: float = 0.75,
    zeta: float = 0.1,
    density: float = 0.5,
    decay: Literal["sigmoid", "cubic"] = "sigmoid",
    across: bool = False,
    predictor: Predictor | None = None,
    removal: Literal["soft", "hard"] | None = None,
    regrowth: Literal["soft", "top"] | None = None,
    alpha: float = 1.0,
    temperature: tuple[float, float] = (1.0, 9.0),
    percolation: bool = False,
    row_block: int | None = None,
    exact: bool = False,
    divide_scores: bool = False,
    history: bool = False,
    rewarm: int = 20,
    dtype: str = "bfloat16",
    remat: str = "none",
    attention: Literal["xla", "cudnn", "blocked", "splash"] | None = None,
    accumulate: int = 1,
    source: str = "arrayrecord:data/*.array_record",
    tokenizer: str = "tokenizer.json",
    seed: int = 0,
) -> Experiment:
    """A Llama of 60 million parameters with 30 % of its links, for a pod.

    Args:
        method: how links move; `dense` has all of them.
        steps: optimizer steps.
        batch: sequences in a step.
        length: tokens in a sequence.
        preset: size of the decoder.
        learning_rate: highest, after the warm-up; the paper has 3e-3 for sparse models, 1e-3 for the dense
            one.
        warmup: steps over which the learning rate rises.
        sparsity: share of absent links in every sparse kernel, at the end.
        where: which weights are sparse: all of attention and the feed-forward layers.
        distribution: the same sparsity for all kernels, or more links for small ones.
        per_head: every attention head of q, k and v is a graph of its own.
        initial_topology: links at the start, see `odjax_train.sparse`.
        r: randomness of receptive fields; the paper tries 0 to 0.3.
        degrees: links of each output of a receptive field.
        interval: steps between two changes of links.
        end: share of the steps after which links stay.
        zeta: share of the links that a change replaces at first.
        density: at the start, of chtss, granet and gmp.
        decay: how the density falls, of chtss.
        across: whether the density falls by the scores of all kernels together.
        predictor: of new links; None: the method's.
        removal: whether links that stay are drawn or ranked; None: the method's.
        regrowth: whether new links are drawn or ranked; None: the method's.
        alpha: removal by weight magnitude (1) or relative importance (0).
        temperature: exponent of the soft removal at the start and at the end.
        percolation: links of dead neurons go too; off in the paper's runs of this model.
        row_block: neurons whose communities are looked at together.
        exact: scores that are the same bits on any number of devices.
        divide_scores: divide them over the axes fsdp and tensor by hand, instead of by the compiler.
        history: a link that comes back has its last weight.
        rewarm: steps over which the learning rate rises again after each change, 0 for none.
        dtype: of the computation.
        remat: what is kept of a layer's activations for the backward pass.
        attention: implementation; None: JAX's choice. `splash` is a kernel for TPUs, `cudnn` one for GPUs.
        accumulate: microbatches a step.
        source: the text.
        tokenizer: a `tokenizer.json`, `byte`, or for a plan the size alone, `vocab:32000`.
        seed: of everything random.
    """
    text = load_tokenizer(tokenizer)
    model = decoder(
        preset, vocab=text.vocab, max_length=length, dtype=dtype, remat=remat, attention=attention
    )
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, learning_rate, min(warmup, steps // 2), max(steps, 1), end_value=0.1 * learning_rate
    )
    if moves(method) and rewarm:
        schedule = rewarmed(schedule, interval, rewarm, end=int(end * steps))
    optimizer, edits = sparse_optimizer(
        method,
        optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule)),
        model,
        [jax.ShapeDtypeStruct((1, length), jnp.int32)],
        sparsity=sparsity,
        where=where,
        end=int(end * steps),
        interval=interval,
        distribution=distribution,
        per_head=per_head,
        topology=initial_topology,
        r=r,
        degrees=degrees,
        zeta=zeta,
        density=density,
        decay=decay,
        across=across,
        predictor=predictor,
        removal=removal,
        regrowth=regrowth,
        alpha=alpha,
        temperature=temperature,
        percolation=percolation,
        row_block=row_block,
        exact=exact,
        axes=("fsdp", "tensor") if divide_scores else None,
        history=history,
        seed=seed,
    )
    return Experiment(
        model=model,
        task=language_model(),
        data=Text(source=source, length=length, tokenizer=text),
        optimizer=optimizer,
        edits=edits,
        schedule=schedule,
        steps=steps,
        batch=batch,
        accumulate=accumulate,
        seed=seed,
        mesh=MeshShape(data=1, fsdp=-1, tensor=1),
        eval_every=500,
        eval_batches=50,
        checkpoint_every=500,
    )
