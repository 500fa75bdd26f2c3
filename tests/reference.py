"""RAT+ written out from its definition, in float64, for tests to compare with. Slow and plain on purpose.

Source: arXiv 2602.18196 (layer, dilated attention with window and sinks). Weights carry the names of the Hugging Face format.
"""

import math

import torch


def recurrence(k: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    """k~_t = g_t k~_{t-1} + (1 - g_t) k_t with g = sigmoid(f). Both [b, t, ...], time second."""
    gate, state, out = torch.sigmoid(f), torch.zeros_like(k[:, 0]), []
    for t in range(k.shape[1]):
        state = gate[:, t] * state + (1 - gate[:, t]) * k[:, t]
        out.append(state)
    return torch.stack(out, dim=1)


def rotary(x: torch.Tensor, base: float = 10000.0, share: float = 1.0, stretch=lambda frequency: frequency) -> torch.Tensor:
    """Rotate-half RoPE at positions 0, 1, ... of x [b, t, h, d], over the first ``share`` of d; ``stretch`` may change frequencies."""
    turned = int(x.shape[-1] * share)
    half, rest = turned // 2, x[..., turned:]
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * stretch(base ** (-torch.arange(half, dtype=x.dtype) / half))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    low, high = x[..., :half], x[..., half:turned]
    return torch.cat([low * cos - high * sin, high * cos + low * sin, rest], dim=-1)


def llama3(frequency, factor: float = 8.0, low: float = 1.0, high: float = 4.0, original: int = 8192):
    """Llama 3's stretched frequencies, one at a time: long waves are stretched, short ones kept, those between partly."""
    out = []
    for f in frequency.tolist():
        wavelength = 2 * math.pi / f
        if wavelength < original / high:
            out.append(f)
        elif wavelength > original / low:
            out.append(f / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            out.append((1 - smooth) * f / factor + smooth * f)
    return torch.tensor(out, dtype=frequency.dtype)


def sees(t: int, j: int, dilation: int | None, window: int = 0, sinks: int = 0) -> bool:
    """Whether query t sees key j, word for word from the definition."""
    if j > t:
        return False
    return t - j <= window or j < sinks or (dilation is not None and (j + 1) % dilation == 0)


def attention(q, k, v, visible) -> torch.Tensor:
    """q [b, t, h, d], k and v [b, t, g, d] with g dividing h; visible(head, t, j) -> bool. Returns [b, t, h, d]."""
    length, heads = q.shape[1:3]
    group = heads // k.shape[2]
    out = torch.zeros_like(q)
    for h in range(heads):
        for t in range(length):
            keys = [j for j in range(length) if visible(h, t, j)]
            scores = torch.einsum("bd,bjd->bj", q[:, t, h], k[:, keys, h // group]) / math.sqrt(q.shape[-1])
            out[:, t, h] = torch.einsum("bj,bjd->bd", scores.softmax(-1), v[:, keys, h // group])
    return out


def rms_norm(x, weight, eps: float = 1e-6):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight


def model(
    weights: dict[str, torch.Tensor], tokens: torch.Tensor, num_heads: int, num_groups: int, visible, turn=lambda x, layer: rotary(x)
) -> torch.Tensor:
    """Logits [b, t, vocab] of tokens [b, t]; visible(layer, head, t, j) -> bool; turn(x [b, t, h, d], layer) is RoPE.

    What a layer has follows from the names of its weights: recurrence with a forget gate, an output gate, biases, norms of queries and
    keys, over each head or over all, and norms before attention and MLP or behind them.
    """
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    layer = 0
    while f"model.layers.{layer}.self_attn.q_proj.weight" in w:
        prefix = f"model.layers.{layer}."
        norms_after = prefix + "post_feedforward_layernorm.weight" in w
        h = x if norms_after else rms_norm(x, w[prefix + "input_layernorm.weight"])

        def project(name, count, h=h, prefix=prefix):
            out = h @ w[f"{prefix}self_attn.{name}_proj.weight"].T + w.get(f"{prefix}self_attn.{name}_proj.bias", 0)
            norm = w.get(f"{prefix}self_attn.{name}_norm.weight")
            if norm is not None and len(norm) == out.shape[-1]:
                out = rms_norm(out, norm)
            heads = out.unflatten(-1, (count, -1))
            return rms_norm(heads, norm) if norm is not None and len(norm) != out.shape[-1] else heads

        q, k, v = project("q", num_heads), project("k", num_groups), project("v", num_groups)
        if prefix + "self_attn.forget_gate_proj.weight" in w:
            f = project("forget_gate", num_groups)
            k, v = recurrence(k, f), recurrence(v, f)
        a = attention(turn(q, layer), turn(k, layer), v, lambda head, t, j, layer=layer: visible(layer, head, t, j))
        if prefix + "self_attn.output_gate_proj.weight" in w:
            a = torch.sigmoid(project("output_gate", num_heads)) * a
        a = a.flatten(-2) @ w[prefix + "self_attn.o_proj.weight"].T
        after = w[prefix + "post_attention_layernorm.weight"]
        x = x + (rms_norm(a, after) if norms_after else a)
        h = x if norms_after else rms_norm(x, after)
        u = h @ w[prefix + "mlp.up_proj.weight"].T
        if prefix + "mlp.gate_proj.weight" in w:
            g = h @ w[prefix + "mlp.gate_proj.weight"].T
            u = u * g / (1 + torch.exp(-g))
        else:
            u = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        u = u @ w[prefix + "mlp.down_proj.weight"].T
        x = x + (rms_norm(u, w[prefix + "post_feedforward_layernorm.weight"]) if norms_after else u)
        layer += 1
    x = rms_norm(x, w["model.norm.weight"])
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
