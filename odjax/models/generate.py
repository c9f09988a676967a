"""Generation with a cache of keys and values: one pass over the prompt, then a token at a time."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp


def keep_top(logits: jax.Array, top_k: int | None = None, top_p: float | None = None) -> jax.Array:
    """Sets what is not to be sampled to minus infinity.

    First the `top_k` largest are kept; of those, the smallest set of most probable tokens whose probability
    reaches `top_p`, never fewer than one. Equal logits are taken in the order of their ids.

    Args:
        logits: [..., vocab].
        top_k: how many tokens to keep, or None.
        top_p: the probability to reach, in (0, 1], or None.

    Returns:
        Logits of the same shape.

    Raises:
        ValueError: if `top_k` is under 1 or `top_p` is outside (0, 1].

    Source: Fan et al. 2018 (top-k); Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration",
    section 3.1.

    Example:
        >>> keep_top(jnp.log(jnp.array([0.5, 0.3, 0.2])), top_p=0.6)[2]
        Array(-inf, dtype=float32)
    """
    check_sampling(top_k=top_k, top_p=top_p)
    if top_k is None and top_p is None:
        return logits
    order = jnp.argsort(logits, axis=-1, descending=True, stable=True)
    keep = jnp.ones(logits.shape, bool)
    if top_k is not None:
        keep &= jnp.broadcast_to(jnp.arange(logits.shape[-1]) < top_k, logits.shape)
    if top_p is not None:
        ranked = jnp.where(keep, jnp.take_along_axis(logits, order, axis=-1), -jnp.inf)
        probabilities = jax.nn.softmax(ranked.astype(jnp.float32), axis=-1)
        before = jnp.cumsum(probabilities, axis=-1) - probabilities
        keep &= before < top_p
        keep = keep.at[..., 0].set(True)
    kept = jnp.put_along_axis(jnp.zeros(logits.shape, bool), order, keep, axis=-1, inplace=False)
    return jnp.where(kept, logits, -jnp.inf)


def sample(
    key: jax.Array,
    logits: jax.Array,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
) -> jax.Array:
    """Draws one token from each row of logits.

    Args:
        key: random key.
        logits: [..., vocab] float32.
        temperature: divides the logits; 0 takes the largest.
        top_k: see `keep_top`.
        top_p: see `keep_top`.

    Returns:
        Tokens [...] int32.

    Raises:
        ValueError: if an argument is out of its range.

    Example:
        >>> int(sample(jax.random.key(0), jnp.array([0.0, 9.0]), temperature=0))
        1
    """
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    logits = keep_top(logits / temperature, top_k, top_p)
    return jax.random.categorical(key, logits, axis=-1).astype(jnp.int32)


def check_sampling(temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> None:
    """Raises if an argument of `sample` is out of its range.

    Args:
        temperature: at least 0.
        top_k: at least 1, or None.
        top_p: in (0, 1], or None.

    Raises:
        ValueError: naming the argument.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be at least 0, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, got {top_k}; None keeps every token")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}; None keeps every token")


def generate(
    model: nn.Module,
    params: Any,
    prompt: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    lengths: jax.Array | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    collections: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Continues prompts. Everything but `params`, `prompt`, `key`, `lengths` and `collections` is static
    under `jit`.

    Args:
        model: an `odjax.models.decoder.Decoder`.
        params: its "params" collection.
        prompt: [B, P] int32; a shorter prompt stands at the left, and what fills its row up is not looked at.
        steps: how many tokens to add.
        key: random key; folded with the number of the step.
        lengths: true lengths of the prompts [B] int32, at least 1; None: all P.
        temperature: see `sample`.
        top_k: see `sample`.
        top_p: see `sample`.
        eos: token that ends a row; the rest of the row repeats it.
        collections: further collections that the model reads, for example those of adapters.

    Returns:
        The new tokens [B, steps] int32, without the prompt.

    Raises:
        ValueError: if P + steps is longer than the model's `max_length`, or a sampling argument is out of its
            range.

    Example:
        >>> from odjax.models.decoder import decoder
        >>> model = decoder("tiny")
        >>> prompt = jnp.array([[72, 105]])
        >>> params = model.init(jax.random.key(0), prompt)["params"]
        >>> generate(model, params, prompt, steps=3, key=jax.random.key(1)).shape
        (1, 3)
    """
    check_sampling(temperature, top_k, top_p)
    batch, width = prompt.shape
    if width < 1 or steps < 1:
        raise ValueError(f"need at least one token of prompt and one step, got {width} and {steps}")
    slots = width + steps
    if slots > model.max_length:
        raise ValueError(
            f"a prompt of {width} tokens and {steps} steps are longer than max_length {model.max_length}"
        )
    variables = {**(collections or {}), "params": params}

    def step(tokens: jax.Array, positions: jax.Array, cache: Any, last: jax.Array) -> tuple[jax.Array, Any]:
        """Logits [B, vocab] after the token at `last` [B] of each row."""
        given = variables if cache is None else {**variables, "cache": cache}
        x, new = model.apply(
            given, tokens, None, positions, cache_length=slots, mutable=["cache"], method="features"
        )
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return model.apply(variables, x, method="logits")[:, 0], new["cache"]

    if lengths is None:
        lengths = jnp.full((batch,), width, jnp.int32)
    # Slots past a row's length are written with filling now and overwritten before they are looked at.
    every = jnp.broadcast_to(jnp.arange(width, dtype=jnp.int32), prompt.shape)
    logits, cache = step(prompt, every, None, lengths - 1)
    return _sample_steps(
        step,
        logits,
        cache,
        lengths,
        steps=steps,
        key=key,
        eos=eos,
        sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
    )


def translate(
    model: nn.Module,
    params: Any,
    source: jax.Array,
    *,
    steps: int,
    bos: int,
    key: jax.Array,
    source_mask: jax.Array | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
    collections: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Translates; greedy unless a temperature is given.

    Args:
        model: an `odjax.models.encoder_decoder.EncoderDecoder`.
        params: its "params" collection.
        source: [B, S] int32.
        steps: how many target tokens to make.
        bos: the start symbol of a target.
        key: random key; folded with the number of the step.
        source_mask: True where the source is not padding [B, S] bool.
        temperature: see `sample`.
        top_k: see `sample`.
        top_p: see `sample`.
        eos: token that ends a row; the rest of the row repeats it.
        collections: further collections that the model reads.

    Returns:
        Target tokens [B, steps] int32, without the start symbol.

    Raises:
        ValueError: if `steps` is longer than the model's `max_length`, or a sampling argument is out of its
            range.

    Example:
        >>> from odjax.models.encoder_decoder import encoder_decoder
        >>> model = encoder_decoder("tiny", vocab=20)
        >>> source = jnp.array([[5, 6, 7]])
        >>> params = model.init(jax.random.key(0), source, source)["params"]
        >>> translate(model, params, source, steps=4, bos=1, key=jax.random.key(1)).shape
        (1, 4)
    """
    check_sampling(temperature, top_k, top_p)
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    variables = {**(collections or {}), "params": params}
    memory = model.apply(variables, source, source_mask, method="encode")
    cached = cached_steps(model, variables, memory, source_mask, steps)

    def step(tokens: jax.Array, positions: jax.Array, cache: Any, last: jax.Array) -> tuple[jax.Array, Any]:
        del last  # one token a row
        return cached(tokens, positions, cache)

    batch = source.shape[0]
    start = jnp.zeros((batch, 1), jnp.int32)
    logits, cache = step(jnp.full((batch, 1), bos, jnp.int32), start, None, start[:, 0])
    return _sample_steps(
        step,
        logits,
        cache,
        jnp.ones((batch,), jnp.int32),
        steps=steps,
        key=key,
        eos=eos,
        sampling={"temperature": temperature, "top_k": top_k, "top_p": top_p},
    )


def cached_steps(
    model: nn.Module,
    variables: Mapping[str, Any],
    memory: jax.Array,
    source_mask: jax.Array | None,
    slots: int,
) -> Callable[..., tuple[jax.Array, Any]]:
    """A target token at a time, after the source was read.

    Args:
        model: an `odjax.models.encoder_decoder.EncoderDecoder`.
        variables: its collections.
        memory: what it encoded the source to, [B, S, width].
        source_mask: True where the source is not padding [B, S] bool.
        slots: most tokens of a target.

    Returns:
        `(tokens [B, 1], positions [B, 1], cache or None) -> (logits [B, vocab] float32, cache)`.
    """

    def step(tokens: jax.Array, positions: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        x, new = model.apply(
            variables if cache is None else {**variables, "cache": cache},
            tokens,
            memory,
            source_mask,
            positions=positions,
            cache_length=slots,
            mutable=["cache"],
            method="features",
        )
        return model.apply(variables, x, method="logits")[:, 0], new["cache"]

    return step


def _sample_steps(
    step: Callable[..., tuple[jax.Array, Any]],
    logits: jax.Array,
    cache: Any,
    lengths: jax.Array,
    *,
    steps: int,
    key: jax.Array,
    eos: int | None,
    sampling: Mapping[str, Any],
) -> jax.Array:
    """Samples from `logits` [B, vocab], feeds the token back at position `lengths + i`, `steps` times."""
    first = jnp.zeros_like(lengths)

    def draw(i: jax.Array, logits: jax.Array, done: jax.Array) -> tuple[jax.Array, jax.Array]:
        tokens = sample(jax.random.fold_in(key, i), logits, **sampling)
        if eos is None:
            return tokens, done
        tokens = jnp.where(done, eos, tokens)
        return tokens, done | (tokens == eos)

    def add(carry: tuple[Any, ...], i: jax.Array) -> tuple[tuple[Any, ...], jax.Array]:
        logits, cache, done = carry
        tokens, done = draw(i, logits, done)
        logits, cache = step(tokens[:, None], (lengths + i)[:, None], cache, first)
        return (logits, cache, done), tokens

    # The last token is not fed back.
    carry = (logits, cache, jnp.zeros(lengths.shape, bool))
    (logits, _, done), tokens = jax.lax.scan(add, carry, jnp.arange(steps - 1, dtype=jnp.int32))
    last, _ = draw(jnp.asarray(steps - 1, jnp.int32), logits, done)
    return jnp.concatenate([tokens.T, last[:, None]], axis=1)
