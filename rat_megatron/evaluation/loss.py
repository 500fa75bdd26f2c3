"""Validation loss of a model on data of `rat-megatron prepare`: the same samples and the same mask as in training."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import batched
from typing import Any

import torch
import torch.nn.functional as F

from rat_megatron.data.format import tokenizer_hash
from rat_megatron.errors import UserError
from rat_megatron.evaluation.memory import GateMeans, watched_gates
from rat_megatron.evaluation.model import LoadedModel

_CHUNK = 2048  # tokens whose logits are held at once: with a vocabulary of 128k they take 1 GiB in fp32


class ValidationSet:
    """The validation samples of a local folder of `rat-megatron prepare`; checked against the model when made.

    Raises UserError where the data cannot be read, has no validation samples, or was made for another vocabulary, tokenizer or length.
    """

    def __init__(self, data: str, loaded: LoadedModel, *, num_samples: int | None = None):
        from rat_megatron.data.loader.streams import Stream, read_meta

        self._stream = Stream(data.rstrip("/"))
        if self._stream.is_remote:
            raise UserError(f"--data {data} is a URL: copy its val folder and rat_meta.json to this machine and name the folder.")
        meta = read_meta(self._stream, None)
        _check_fit(data, meta, loaded)
        available = meta["splits"]["val"]["samples"]
        if not available:
            raise UserError(f"--data {data} has no validation samples: prepare it with a larger --val-fraction.")
        if num_samples is not None and num_samples > available:
            raise UserError(f"--num-samples {num_samples} is more than the {available} validation samples of --data {data}: lower it.")
        self.seq_length: int = meta["seq_length"]
        self.eod_id: int = meta["eod_id"]
        self.num_samples: int = num_samples or available

    def batches(self, batch_size: int) -> Iterator[dict[str, torch.Tensor]]:
        """Dicts of tokens, labels (int64) and loss_mask (fp32), each [b, s], spread evenly over the split, the same every time."""
        from rat_megatron.data.loader.batches import validation_batches

        samples = validation_batches(
            [self._stream],
            global_batch_size=1,  # joined below, so that the last batch may be smaller
            micro_batch_size=1,
            seq_length=self.seq_length,
            eod_id=self.eod_id,
            num_samples=self.num_samples,
            num_workers=0,
        )
        for some in batched(samples, batch_size):
            yield {name: torch.cat([sample[name] for sample in some]) for name in ("tokens", "labels", "loss_mask")}


@torch.inference_mode()
def validation_loss(loaded: LoadedModel, data: ValidationSet, *, batch_size: int) -> dict[str, Any]:
    """Mean cross-entropy per token, in nats, under the model's current attention pattern.

    The target is left out wherever the input token ends a document, as in training. ``stderr`` is that of the ratio of two sums over
    samples, so it allows for tokens of one sample being alike; it is missing for a single sample. ``memory_lengths``: of every layer, in
    tokens, as memory.py says.
    """
    model = loaded.model
    losses, counts, gates = [], [], GateMeans()
    for batch in data.batches(batch_size):
        tokens, labels, mask = (batch[name].to(model.device) for name in ("tokens", "labels", "loss_mask"))
        with watched_gates(model, gates):
            hidden = model.model(tokens, use_cache=False).last_hidden_state
        summed = torch.zeros(len(tokens), dtype=torch.float64, device=model.device)
        for start in range(0, tokens.shape[1], max(1, _CHUNK // len(tokens))):
            part = slice(start, start + max(1, _CHUNK // len(tokens)))
            logits = model.lm_head(hidden[:, part]).float()  # [b, chunk, vocab]
            of_tokens = F.cross_entropy(logits.transpose(1, 2), labels[:, part], reduction="none")
            summed += (of_tokens * mask[:, part]).sum(dim=1, dtype=torch.float64)
        losses.append(summed.cpu())
        counts.append(mask.sum(dim=1, dtype=torch.float64).cpu())
    total, count = torch.cat(losses), torch.cat(counts)
    loss = float(total.sum() / count.sum())
    result: dict[str, Any] = {"loss": loss, "tokens": int(count.sum()), "samples": len(total), "seq_length": data.seq_length}
    if len(total) > 1:
        spread = (total - loss * count).square().sum() * len(total) / (len(total) - 1)
        result["stderr"] = float(spread.sqrt() / count.sum())
    if lengths := gates.memory_lengths():
        result["memory_lengths"] = lengths
    return result


def _check_fit(path: str, meta: dict[str, Any], loaded: LoadedModel) -> None:
    config = loaded.config
    if meta["vocab_size"] > config.vocab_size:
        raise UserError(
            f"--data {path} has a vocabulary of {meta['vocab_size']}, {loaded.folder} one of {config.vocab_size}: prepare data with the "
            "model's own tokenizer."
        )
    expected = getattr(config, "tokenizer_hash", None) or (loaded.tokenizer and tokenizer_hash(loaded.tokenizer))
    if expected and meta["tokenizer_hash"] != expected:
        raise UserError(
            f"--data {path} was made with the tokenizer {meta['tokenizer_name']} ({meta['tokenizer_hash']}), {loaded.folder} was trained "
            f"with another ({expected}): prepare data with the model's own tokenizer."
        )
    if meta["seq_length"] > config.max_position_embeddings:
        raise UserError(
            f"--data {path} has samples of {meta['seq_length']} tokens, {loaded.folder} takes {config.max_position_embeddings}: prepare it "
            "with a smaller --seq-length."
        )
