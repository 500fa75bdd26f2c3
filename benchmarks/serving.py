"""How fast a model of random weights decodes on this GPU at the largest batch that fits, and how long one block takes.

    python -m benchmarks.serving [--only NAME...] [--json FILE]

Throughput: rat_megatron.hf's model in bf16, a greedy step in a CUDA graph, over a cache of random entries as if a prompt of 4,096 or
16,384 tokens had been read. The step is timed at five places among the 1,024 new tokens, which counts their mean. A block's latency: one
layer, prefill of 262,144 tokens and a decode step at 4,096. Ratios are to the dense pattern of the same row. --tiny tries it anywhere.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import captured, describe, free_memory, machine, milliseconds, write_json
from rat_megatron.hf import RatPlusCache, RatPlusConfig, RatPlusForCausalLM

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
PATTERNS = ("dense", "d16", "d64")
MODELS = {
    "1.5b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 16},
    "7.6b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32},
}
_TINY = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 128}
_NEW = 1024  # tokens to generate
_PLACES = 5
_SPARE = 16  # tokens of room for steps that are not counted
_GOALS = {"1.5b": 60, "7.6b": 40}  # times dense, at D=64
# What the paper has for D=16 against D=1, by hidden size: a block's prefill, its decode step and that one's batch.
_PAPER = {2048: (5.5, 13, 256), 4096: (6.0, 14, 128)}


def main(arguments: list[str] | None = None) -> None:
    names = [f"{model}-{context}" for model in MODELS for context in (4096, 16384)] + [f"block-{model}" for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--tiny", action="store_true", help="small shapes, for a trial on any machine")
    parser.add_argument("--json", metavar="FILE", help="write everything measured here, after every row")
    args = parser.parse_args(arguments)
    results: dict[str, Any] = {"machine": machine(), "tiny": args.tiny, "rows": {}}
    print(describe(results["machine"]), flush=True)
    for name in args.only:
        measure = _block if name.startswith("block-") else _throughput
        results["rows"][name] = rows = {}
        try:
            with torch.no_grad():
                for title, row in measure(name, args.tiny):
                    rows[title] = row
                    print(f"{name:12}{title:16}{_line(row)}", flush=True)
                    write_json(args.json, results)
        except Exception as error:  # one row that fails must not lose the others
            rows["error"] = f"{type(error).__name__}: {error}"[:2000]
            print(f"{name:12}failed: {rows['error'][:400]}", flush=True)
            del error
        write_json(args.json, results)
        free_memory()


def _line(row: dict[str, Any]) -> str:
    text = ", ".join(f"{key} {value:,.4g}" for key, value in row.items() if isinstance(value, (int, float)))
    return text + (f", {row['judged']}" if "judged" in row else "")


def _model(name: str, length: int, tiny: bool, **more: Any) -> RatPlusForCausalLM:
    """A model with random weights for sequences of up to ``length`` tokens."""
    config = RatPlusConfig(**{**MODELS[name], **(_TINY if tiny else {}), **more}, max_position_embeddings=length)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with torch.device(DEVICE):
            return RatPlusForCausalLM(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


# ---- throughput ----------------------------------------------------------------------------------------------------------------------


def _throughput(name: str, tiny: bool):
    """Tokens per second at the largest batch for each pattern."""
    model_name, context = name.split("-")
    context, new = (64, 20) if tiny else (int(context), _NEW)
    model = _model(model_name, context + new + _SPARE, tiny)
    dense = None
    for word in PATTERNS:
        model.set_attention_pattern(word)
        row = _decode_at_most(3 if tiny else _largest_batch(model, context + new), model, context, new)
        dense = dense or row["tokens_per_second"]
        row["times_dense"] = row["tokens_per_second"] / dense
        if word == "d64":
            goal = _GOALS[model_name]
            row["judged"] = f"goal over {goal} x dense: {'met' if row['times_dense'] > goal else 'MISS'}"
        yield word, row
        free_memory()


def _largest_batch(model: RatPlusForCausalLM, length: int) -> int:
    """Rows of ``length`` tokens that fit into the free memory: the cache's formula, and what a step needs besides, generously."""
    step = 2 * (model.config.vocab_size * 8 + model.config.hidden_size * 64)  # the graph's own memory, and that of the steps before it
    free, _ = torch.cuda.mem_get_info()
    return int((free * 0.97 - (1 << 30)) / (_cache_bytes(model, length + _SPARE, DTYPE) + step))


def _cache_bytes(model: RatPlusForCausalLM, max_length: int, dtype: torch.dtype) -> int:
    """Bytes of one row's cache: a key and a value an entry, and the recurrent state in fp32."""
    config = model.config
    layers, width = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
    pattern = config.parse_pattern(config.attention_pattern)
    entries = sum(pattern.layer(index).heads[0].cache_slots(max_length) for index in range(layers))
    return entries * 2 * width * dtype.itemsize + layers * 2 * width * 4


def _decode_at_most(batch: int, model: RatPlusForCausalLM, context: int, new: int) -> dict[str, Any]:
    """With this batch, or where the estimate of its memory was too low, the next smaller one that fits."""
    while True:
        free_memory()
        try:
            return _decode(model, batch, context, new)
        except torch.cuda.OutOfMemoryError:
            batch = batch * 19 // 20


def _decode(model: RatPlusForCausalLM, batch: int, context: int, new: int) -> dict[str, Any]:
    cache = _filled_cache(model, batch, context, context + new + _SPARE)
    token = torch.randint(model.config.vocab_size, (batch, 1), device=DEVICE)

    def step():
        logits = model(input_ids=token, past_key_values=cache, logits_to_keep=1).logits
        token.copy_(logits[:, -1].argmax(dim=-1, keepdim=True))

    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    replay = captured(step)
    times = []
    for place in range(_PLACES):
        _set_length(cache, context + place * (new - 1) // (_PLACES - 1))
        times.append(milliseconds({"step": replay}, repetitions=8, flush=False)["step"])
    mean = statistics.mean(time["median"] for time in times)
    return {
        "batch": batch,
        "milliseconds": mean,
        "tokens_per_second": batch / mean * 1e3,
        "cache_gigabytes": cache.nbytes / 1e9,
        "peak_gigabytes": torch.cuda.max_memory_allocated() / 1e9 if DEVICE == "cuda" else 0.0,
        "places": times,
    }


def _filled_cache(model: RatPlusForCausalLM, batch: int, length: int, max_length: int) -> RatPlusCache:
    """A cache with room for max_length tokens and random entries, as after a prompt of ``length`` tokens."""
    cache = RatPlusCache(max_length)
    model.model(inputs_embeds=torch.randn(batch, 1, model.config.hidden_size, device=DEVICE, dtype=DTYPE), past_key_values=cache)
    for layer in cache.layers:
        for head in layer.heads:
            for tensor in (head.k, head.v, head.state):
                tensor.normal_()
    _set_length(cache, length)
    return cache


def _set_length(cache: RatPlusCache, length: int) -> None:
    cache.lengths.fill_(length)
    cache.columns = length


# ---- one block -----------------------------------------------------------------------------------------------------------------------


def _block(name: str, tiny: bool):
    """Milliseconds of one layer: prefill of a long sequence, and a decode step in a CUDA graph; all patterns take turns."""
    long, context = (256, 64) if tiny else (262144, 4096)
    model = _model(name.removeprefix("block-"), long, tiny, num_hidden_layers=1, vocab_size=128)
    model.model.norm = torch.nn.Identity()  # not the block's
    hidden = model.config.hidden_size
    prefill_goal, decode_goal, batch = _PAPER.get(hidden, (1, 1, 2))

    yield from _rows("prefill", _prefill_times(model, long), prefill_goal)
    free_memory()

    token = torch.randn(batch, 1, hidden, device=DEVICE, dtype=DTYPE)
    runs: dict[str, Callable] = {}
    for word in PATTERNS:
        model.set_attention_pattern(word)
        cache = _filled_cache(model, batch, context - _SPARE, context + _SPARE)
        runs[word] = captured(partial(_one_token, model, token, cache, word, context - 1))
    yield from _rows("decode", milliseconds(runs, repetitions=20), decode_goal)


def _prefill_times(model: RatPlusForCausalLM, length: int) -> dict[str, dict[str, float]]:
    x = torch.randn(1, length, model.config.hidden_size, device=DEVICE, dtype=DTYPE)

    def run(word: str) -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if DEVICE == "cuda" else nullcontext():  # the fastest for the dense pattern
            model.model(inputs_embeds=x, use_cache=False, attention_pattern=word)

    return milliseconds({word: partial(run, word) for word in PATTERNS}, repetitions=3, flush=False)


def _one_token(model: RatPlusForCausalLM, token: torch.Tensor, cache: RatPlusCache, word: str, length: int) -> None:
    _set_length(cache, length)  # every time anew, so that the timed steps are alike
    model.model(inputs_embeds=token, past_key_values=cache, attention_pattern=word)


def _rows(title: str, times: dict[str, dict[str, float]], goal: float):
    for word, time in times.items():
        row = {"milliseconds": time["median"], "times_dense": times["dense"]["median"] / time["median"], "spread": time}
        if word == "d16":
            row["judged"] = f"the paper's: {goal} x dense: {'met' if row['times_dense'] >= goal else 'MISS'}"
        yield f"{title} {word}", row


if __name__ == "__main__":
    main()
