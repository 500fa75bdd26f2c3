"""The check at the end of every conversion: both sides' logits for one prompt, with one layer of weights in memory at a time.

One side is the model class of the Hugging Face format. The other is made of the other format's own tensors, and shares nothing with the
conversion: for a Megatron checkpoint the model that Megatron builds from its arguments (``megatron_model.py``), for the reference
implementation RAT+ written out plainly (arXiv 2602.18196). A weight that went to the wrong place, rows in the wrong order, or a setting
that training had and the result has not, give other logits.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rat_megatron.checkpoint.hf_folder import EMBEDDING, HEAD, HfFolder
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig, RatPlusModel

_PROMPT_LENGTH = 32
_TOLERANCE = 1e-3  # of the largest logit: far more than two ways of summing in fp32 differ, far less than a wrong weight does
_ROWS = 4096  # of a large matrix that are in memory in fp32 at a time

Logits = Callable[[Tensor, list[torch.dtype | None]], list[Tensor]]
"""Logits [t, vocab or more] of tokens [t] under dense attention, in fp32, once for each dtype that the weights are rounded to (None: not).

The first of the dtypes is None."""


class PlainWeights(Protocol):
    """A model's weights in a format other than Hugging Face's, and how that format fuses its projections."""

    def read(self, role: str, layer: int = 0) -> Tensor:
        """The weight of one role: embedding, input_norm, projections, output, post_norm, up, down, final_norm or head."""

    def cut(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Output [t, rows] of the projections -> q and output gate [t, np, hn], k, v and forget gate [t, ng, hn]; no gate in a baseline."""


@dataclass(frozen=True)
class Check:
    """What was compared. ``difference`` is that to the source's weights in the written dtype, ``rounding`` that to them in their own."""

    tensors: int
    parameters: int
    largest_logit: float
    difference: float
    rounding: float | None

    def __str__(self) -> str:
        rounding = "" if self.rounding is None else f" (and {self.rounding:.2g} from those before the change of dtype)"
        return (
            f"check: {self.tensors} tensors, {self.parameters:,} parameters; logits of a fixed prompt, up to {self.largest_logit:.3g}, "
            f"differ by at most {self.difference:.2g} from the source's{rounding}"
        )


@torch.no_grad()
def check_conversion(logits_of_source: Logits, folder: HfFolder, source: str, dtype: torch.dtype | None = None) -> Check:
    """Compares both sides under dense attention; ``dtype`` names that of the folder when the other side's was changed into it.

    Raises UserError when the logits are not finite, or differ by more than rounding in fp32 explains.
    """
    config = folder.config
    tokens = fixed_prompt(config)
    padded = logits_of_source(tokens, [None] if dtype is None else [None, dtype])
    expected = [logits[:, : config.vocab_size] for logits in padded]
    if not all(logits.isfinite().all() for logits in expected):
        raise UserError(f"the weights in {source} give NaN or infinite logits: training diverged before they were written")
    found = _hf_logits(folder, tokens)
    differences = [(found - logits).abs().max().item() for logits in expected]
    largest = expected[0].abs().max().item()
    if not differences[-1] <= _TOLERANCE * largest:
        raise UserError(
            f"the converted weights give other logits than {source} (difference {differences[-1]:.2g}, logits up to {largest:.2g}), "
            "so the result was thrown away: its settings are not those of the weights, or files changed meanwhile"
        )
    return Check(
        tensors=len(folder.shapes),
        parameters=sum(shape.numel() for shape in folder.shapes.values()),
        largest_logit=largest,
        difference=differences[-1],
        rounding=None if dtype is None else differences[0],
    )


def fixed_prompt(config: RatPlusConfig) -> Tensor:
    """Tokens [t] from all over the vocabulary."""
    return (torch.arange(min(_PROMPT_LENGTH, config.max_position_embeddings)) * 7919 + 1) % config.vocab_size


def plain_logits(weights: PlainWeights, config: RatPlusConfig, tokens: Tensor, dtypes: list[torch.dtype | None]) -> list[Tensor]:
    """As Logits, of RAT+ written out plainly."""

    def linear(xs: list[Tensor], role: str, layer: int = 0) -> list[Tensor]:
        parts = weights.read(role, layer).split(_ROWS)

        def product(x: Tensor, dtype: torch.dtype | None) -> Tensor:
            return torch.cat([x @ part.to(dtype or part.dtype).float().T for part in parts], dim=-1)

        return [product(x, dtype) for x, dtype in zip(xs, dtypes, strict=True)]

    def norm(xs: list[Tensor], role: str, layer: int = 0) -> list[Tensor]:
        weight = weights.read(role, layer)
        scaled = [x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + config.rms_norm_eps) for x in xs]
        return [x * weight.to(dtype or weight.dtype).float() for x, dtype in zip(scaled, dtypes, strict=True)]

    rows = weights.read("embedding")[tokens]
    xs = [rows.to(dtype or rows.dtype).float() for dtype in dtypes]
    for layer in range(config.num_hidden_layers):
        mixed = [_plain_attention(*weights.cut(p), config) for p in linear(norm(xs, "input_norm", layer), "projections", layer)]
        xs = [x + y for x, y in zip(xs, linear(mixed, "output", layer), strict=True)]
        hidden = [F.gelu(u) for u in linear(norm(xs, "post_norm", layer), "up", layer)]
        xs = [x + y for x, y in zip(xs, linear(hidden, "down", layer), strict=True)]
    return linear(norm(xs, "final_norm"), "head")


def _plain_attention(q: Tensor, o: Tensor, k: Tensor, v: Tensor, f: Tensor | None, config: RatPlusConfig) -> Tensor:
    """q, o [t, np, hn], k, v, f [t, ng, hn] -> gated output [t, np * hn]."""
    if f is not None:
        k, v = _recur(k, f), _recur(v, f)
    q, k = _rotate(q, config.rope_theta), _rotate(k, config.rope_theta)
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(q.shape[-1])
    future = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    out = torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), v)
    return (torch.sigmoid(o) * out).flatten(1)


def _recur(x: Tensor, f: Tensor) -> Tensor:
    """x~_t = g_t x~_{t-1} + (1 - g_t) x_t with g = sigmoid(f)."""
    state, out = torch.zeros_like(x[0]), []
    for value, gate in zip(x, torch.sigmoid(f), strict=True):
        state = gate * state + (1 - gate) * value
        out.append(state)
    return torch.stack(out)


def _rotate(x: Tensor, base: float) -> Tensor:
    """Rotate-half RoPE of x [t, n, hn]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[0])[:, None, None] * base ** (-torch.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def _hf_logits(folder: HfFolder, tokens: Tensor) -> Tensor:
    """Logits [t, vocab] by the folder's model class in fp32: a model of one layer takes the weights of each in turn."""
    config = copy.deepcopy(folder.config)
    config.num_hidden_layers, config.attention_pattern, config.vocab_size, config.pad_token_id = 1, "dense", 1, None
    with torch.device("meta"):  # no memory: the weights are put in from the files
        model = RatPlusModel(config).eval()
    final_norm, model.norm = model.norm, nn.Identity()
    names = list(model.layers[0].state_dict())
    x = folder.read(EMBEDDING, tokens).float()[None]
    for layer in range(folder.config.num_hidden_layers):
        for name in names:  # one by one: each takes the place of the last layer's
            weight = folder.read(f"model.layers.{layer}.{name}").float()
            model.layers[0].load_state_dict({name: weight}, strict=False, assign=True)
        model.layers[0].self_attn.has_rope = layer not in config.layers_without_rope
        x = model(inputs_embeds=x, use_cache=False).last_hidden_state
    final_norm.load_state_dict({"weight": folder.read("model.norm.weight").float()}, assign=True)
    x = final_norm(x[0])
    head = EMBEDDING if folder.config.tie_word_embeddings else HEAD
    starts = range(0, folder.config.vocab_size, _ROWS)
    return torch.cat([x @ folder.read(head, slice(start, start + _ROWS)).float().T for start in starts], dim=1)
