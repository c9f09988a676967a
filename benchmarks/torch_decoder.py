"""The decoder in PyTorch: the same model, weights and optimizer, to compare `odjax.models.Decoder` with.

It is written as one would write it there: `nn.Linear`, `scaled_dot_product_attention`, `AdamW(fused=True)`,
and PEFT's LoRA where asked for. Imports neither JAX nor odjax.
"""

import functools
import warnings
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")


class Sizes(NamedTuple):
    """Sizes of a decoder, as the attributes of `odjax.models.Decoder`."""

    vocab: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    tied: bool = False
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5


class Norm(torch.nn.Module):
    """RMSNorm whose weights have the dtype of the input: fused kernels take no mixture."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), self.eps)


class Layer(torch.nn.Module):
    """Attention, then SwiGLU, each added to its input."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.head_dim = sizes.width // sizes.heads
        self.shared = sizes.kv_heads != sizes.heads
        linear = functools.partial(torch.nn.Linear, bias=False)
        self.attn_norm = Norm(sizes.width, sizes.norm_eps)
        self.q = linear(sizes.width, sizes.heads * self.head_dim)
        self.k = linear(sizes.width, sizes.kv_heads * self.head_dim)
        self.v = linear(sizes.width, sizes.kv_heads * self.head_dim)
        self.o = linear(sizes.heads * self.head_dim, sizes.width)
        self.mlp_norm = Norm(sizes.width, sizes.norm_eps)
        self.gate = linear(sizes.width, sizes.mlp_width)
        self.up = linear(sizes.width, sizes.mlp_width)
        self.down = linear(sizes.mlp_width, sizes.width)

    def forward(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        h = self.attn_norm(x)
        q, k, v = (p(h).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(
            rotated(q, cos, sin), rotated(k, cos, sin), v, is_causal=True, enable_gqa=self.shared
        )
        x = x + self.o(y.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Decoder(torch.nn.Module):
    """Tokens [batch, length] -> logits [batch, length, vocab].

    Args:
        sizes: of the model.
        length: longest sequence.
        dtype: of the activations, as `torch.autocast` computes them.
    """

    def __init__(self, sizes: Sizes, length: int, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.dtype = dtype
        self.embed = torch.nn.Embedding(sizes.vocab, sizes.width)
        self.layers = torch.nn.ModuleList(Layer(sizes) for _ in range(sizes.layers))
        self.norm = Norm(sizes.width, sizes.norm_eps)
        self.lm_head = torch.nn.Linear(sizes.width, sizes.vocab, bias=False)
        for table in (self.embed, self.lm_head):
            torch.nn.init.normal_(table.weight, std=0.02)
        if sizes.tied:
            self.lm_head.weight = self.embed.weight
        head_dim = sizes.width // sizes.heads
        exponents = -torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32), sizes.rope_theta**exponents)
        self.register_buffer("cos", torch.cos(angles).to(dtype), persistent=False)
        self.register_buffer("sin", torch.sin(angles).to(dtype), persistent=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens).to(self.dtype)
        for layer in self.layers:
            x = layer(x, self.cos[: tokens.shape[1]], self.sin[: tokens.shape[1]])
        return self.lm_head(self.norm(x))


def load(model: Decoder, params: Any) -> None:
    """Copies the parameters of `odjax.models.Decoder` into the model.

    Args:
        model: of the same sizes.
        params: unrolled (`odjax.models.unstack_layers`), NumPy arrays.
    """

    def put(parameter: torch.nn.Parameter, value: Any) -> None:
        parameter.data.copy_(torch.from_numpy(value))

    put(model.embed.weight, params["embed"]["embedding"])
    put(model.norm.weight, params["norm"]["scale"])
    if "lm_head" in params:
        put(model.lm_head.weight, params["lm_head"]["kernel"].T)
    for i, layer in enumerate(model.layers):
        p = params[f"layers_{i}"]
        put(layer.attn_norm.weight, p["attn_norm"]["scale"])
        put(layer.mlp_norm.weight, p["mlp_norm"]["scale"])
        for name in "qkv":
            kernel = p["attn"][name]["kernel"]
            put(getattr(layer, name).weight, kernel.reshape(kernel.shape[0], -1).T)
        kernel = p["attn"]["o"]["kernel"]
        put(layer.o.weight, kernel.reshape(-1, kernel.shape[-1]).T)
        for name in ("gate", "up", "down"):
            put(getattr(layer, name).weight, p["mlp"][name]["kernel"].T)


def llama(sizes: Sizes, length: int) -> torch.nn.Module:
    """The Llama of transformers with the same sizes."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=sizes.vocab,
        hidden_size=sizes.width,
        intermediate_size=sizes.mlp_width,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=length,
        tie_word_embeddings=sizes.tied,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def with_lora(model: torch.nn.Module, rank: int) -> torch.nn.Module:
    """PEFT's LoRA on every linear layer of the stack, of `Decoder` or `llama`; the rest is frozen."""
    import peft

    names = list(PROJECTIONS if isinstance(model, Decoder) else (f"{name}_proj" for name in PROJECTIONS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names))


def adamw(
    parameters: Iterable[torch.nn.Parameter], rate: float, b1: float, b2: float, eps: float, decay: float
) -> torch.optim.Optimizer:
    """AdamW of the parameters that have a gradient, in one kernel."""
    trained = [p for p in parameters if p.requires_grad]
    return torch.optim.AdamW(trained, lr=rate, betas=(b1, b2), eps=eps, weight_decay=decay, fused=True)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy over all tokens; float32 under autocast, too."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())
