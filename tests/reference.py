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


def rotary(x: torch.Tensor, base: float = 10000.0) -> torch.Tensor:
    """Rotate-half RoPE over the full head dimension at positions 0, 1, ... of x [b, t, h, d]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    return torch.cat([x[..., :half] * cos - x[..., half:] * sin, x[..., half:] * cos + x[..., :half] * sin], dim=-1)


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


def model(weights: dict[str, torch.Tensor], tokens: torch.Tensor, num_heads: int, num_groups: int, visible) -> torch.Tensor:
    """Logits [b, t, vocab] of tokens [b, t]; visible(layer, head, t, j) -> bool. Recurrence where a layer has a forget gate."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    x = w["model.embed_tokens.weight"][tokens]
    layer = 0
    while f"model.layers.{layer}.input_layernorm.weight" in w:
        prefix = f"model.layers.{layer}."
        h = rms_norm(x, w[prefix + "input_layernorm.weight"])

        def project(name, count, h=h, prefix=prefix):
            return (h @ w[f"{prefix}self_attn.{name}.weight"].T).unflatten(-1, (count, -1))

        q, o = project("q_proj", num_heads), project("output_gate_proj", num_heads)
        k, v = project("k_proj", num_groups), project("v_proj", num_groups)
        if prefix + "self_attn.forget_gate_proj.weight" in w:
            f = project("forget_gate_proj", num_groups)
            k, v = recurrence(k, f), recurrence(v, f)
        a = attention(rotary(q), rotary(k), v, lambda head, t, j, layer=layer: visible(layer, head, t, j))
        x = x + (torch.sigmoid(o) * a).flatten(-2) @ w[prefix + "self_attn.o_proj.weight"].T
        h = rms_norm(x, w[prefix + "post_attention_layernorm.weight"])
        u = h @ w[prefix + "mlp.up_proj.weight"].T
        if prefix + "mlp.gate_proj.weight" in w:
            g = h @ w[prefix + "mlp.gate_proj.weight"].T
            u = u * g / (1 + torch.exp(-g))
        else:
            u = 0.5 * u * (1 + torch.erf(u / math.sqrt(2)))
        x = x + u @ w[prefix + "mlp.down_proj.weight"].T
        layer += 1
    x = rms_norm(x, w["model.norm.weight"])
    return x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T
