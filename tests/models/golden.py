"""Plain float64 NumPy references of the models' blocks, written from the equations."""

import math

import numpy as np


def rms_norm(x, scale, eps):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def layer_norm(x, scale, bias, eps):
    mean = x.mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(((x - mean) ** 2).mean(-1, keepdims=True) + eps) * scale + bias


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def rotate_half_split(x, position, theta):
    """One head's vector at one position: channel i turns with channel i + d/2 by position * theta^(-2i/d)."""
    d = len(x)
    out = np.empty(d)
    for i in range(d // 2):
        angle = position * theta ** (-2 * i / d)
        a, b = x[i], x[i + d // 2]
        out[i] = a * math.cos(angle) - b * math.sin(angle)
        out[i + d // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def rotary(x, theta):
    """Positions 0..T-1 of [B, T, heads, head_dim]."""
    batch, length, heads, _ = x.shape
    out = np.empty_like(x)
    for b in range(batch):
        for t in range(length):
            for h in range(heads):
                out[b, t, h] = rotate_half_split(x[b, t, h], t, theta)
    return out


def attention(q, k, v, mask=None):
    """[B, T, H, D] to [B, S, K, D]: query head h uses key head h // (H // K)."""
    group = q.shape[2] // k.shape[2]
    out = np.empty_like(q)
    for h in range(q.shape[2]):
        scores = np.einsum("btd,bsd->bts", q[:, :, h], k[:, :, h // group]) / math.sqrt(q.shape[-1])
        if mask is not None:
            scores = np.where(mask, scores, -np.inf)
        out[:, :, h] = np.einsum("bts,bsd->btd", softmax(scores), v[:, :, h // group])
    return out


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def project(x, p):
    """[B, T, D] through a kernel [D, heads, head_dim] and its bias, if it has one."""
    return np.einsum("btd,dhe->bthe", x, p["kernel"]) + p.get("bias", 0.0)


def merge_heads(x, p):
    return np.einsum("bthe,hed->btd", x, p["kernel"]) + p.get("bias", 0.0)


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def swiglu(x, p):
    return dense(silu(dense(x, p["gate"])) * dense(x, p["up"]), p["down"])


def decoder(params, tokens, theta, eps):
    """Logits of the untied Llama-style decoder from unrolled parameters."""
    x = params["embed"]["embedding"][tokens]
    causal = np.tril(np.ones((tokens.shape[1],) * 2, bool))
    for i in range(sum(name.startswith("layers_") for name in params)):
        p = params[f"layers_{i}"]
        h = rms_norm(x, p["attn_norm"]["scale"], eps)
        q, k = (rotary(project(h, p["attn"][name]), theta) for name in "qk")
        x = x + merge_heads(attention(q, k, project(h, p["attn"]["v"]), causal), p["attn"]["o"])
        x = x + swiglu(rms_norm(x, p["mlp_norm"]["scale"], eps), p["mlp"])
    return rms_norm(x, params["norm"]["scale"], eps) @ params["lm_head"]["kernel"]


def vit(params, images, patch, eps):
    """Tokens after the last norm (class token, registers, patches), from unrolled parameters."""
    batch, height, width, _ = images.shape
    rows = []
    for top in range(0, height, patch):
        for left in range(0, width, patch):
            window = images[:, top : top + patch, left : left + patch]
            rows.append(np.einsum("bijc,ijcd->bd", window, params["patch"]["kernel"]))
    x = np.stack(rows, axis=1) + params["patch"]["bias"] + params["positions"][1:]
    cls = np.broadcast_to(params["cls"] + params["positions"][:1], (batch, 1, x.shape[-1]))
    registers = np.broadcast_to(params["registers"], (batch, *params["registers"].shape))
    x = np.concatenate([cls, registers, x], axis=1)
    for i in range(sum(name.startswith("layers_") for name in params)):
        p = params[f"layers_{i}"]
        h = layer_norm(x, p["attn_norm"]["scale"], p["attn_norm"]["bias"], eps)
        q, k, v = (project(h, p["attn"][name]) for name in "qkv")
        x = x + p["attn_scale"] * merge_heads(attention(q, k, v), p["attn"]["o"])
        h = layer_norm(x, p["mlp_norm"]["scale"], p["mlp_norm"]["bias"], eps)
        if "gate" in p["mlp"]:
            h = swiglu(h, p["mlp"])
        else:
            h = dense(gelu(dense(h, p["mlp"]["up"])), p["mlp"]["down"])
        x = x + p["mlp_scale"] * h
    return layer_norm(x, params["norm"]["scale"], params["norm"]["bias"], eps)
