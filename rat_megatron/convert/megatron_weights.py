"""The weights of a RAT+ model in a torch_dist checkpoint: read one at a time, as they are or as Hugging Face names them, and written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rat_megatron.checkpoint.hf_folder import EMBEDDING, HEAD, HfFolder, expected_shapes
from rat_megatron.checkpoint.torch_dist import StoredTensor, TorchDistCheckpoint, stored_object, write_torch_dist
from rat_megatron.convert.names import FUSED_QKV, TABLE, Row, fuse_qkv, split_fused_qkv
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig

# What Megatron's linear layers keep for FP8, empty here; its loader asks for it.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


class MegatronWeights:
    """Where each weight of the config's model is in a checkpoint, under ``keys``; raises UserError unless it holds these and no others."""

    def __init__(self, source: TorchDistCheckpoint, config: RatPlusConfig):
        self._source, self.config = source, config
        self.shapes = expected_shapes(config)
        keys = {key for key in source.tensors if key.startswith(("embedding.", "decoder.", "output_layer.")) and "_extra_state" not in key}
        self._places: dict[tuple[Row, int], tuple[str, int | None]] = {}
        for layer in range(config.num_hidden_layers):
            for row in TABLE:
                first = row.hf[0].format(layer=layer)
                if (layer > 0 and not row.per_layer) or first not in self.shapes:
                    continue
                place = row.find(keys, layer)
                if place is None:
                    raise UserError(f"{source.folder} has no tensor for {first}: looked for {' and '.join(row.megatron)}")
                key, index = place
                stacked = source.tensors[key].size[0]
                if index is not None and stacked != config.num_hidden_layers:
                    raise UserError(f"{source.folder} stacks {stacked} layers in {key}, but its arguments say {config.num_hidden_layers}")
                self._places[row, layer] = place
        self.keys = list(dict.fromkeys(key for key, _ in self._places.values()))
        if unknown := sorted(keys.difference(self.keys)):
            raise UserError(f"{source.folder} holds {unknown[0]}, which a RAT+ model with these arguments does not have")
        self.dtypes = {source.tensors[key].properties.dtype for key in self.keys}

    def hf_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face weight by name, read as it is asked for; raises UserError when its shape is not the config's."""
        for (row, layer), place in self._places.items():
            names = [name.format(layer=layer) for name in row.hf]
            for name, weight in zip(names, self._parts(row, place), strict=False):
                if name in (EMBEDDING, HEAD):
                    weight = weight[: self.config.vocab_size]  # Megatron pads the vocabulary
                if weight.shape != self.shapes[name]:
                    shapes = f"{tuple(weight.shape)} for {name}, but its arguments say {tuple(self.shapes[name])}"
                    raise UserError(f"{self._source.folder} has {shapes}")
                yield name, weight.to(dtype or weight.dtype).contiguous()

    def _parts(self, row: Row, place: tuple[str, int | None]) -> list[Tensor]:
        weight, config = self._source.read(*place), self.config
        if row is not FUSED_QKV:
            return [weight]
        sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        try:
            return split_fused_qkv(weight, *sizes, recurrence=config.use_recurrence)
        except ValueError as error:
            raise UserError(f"{self._source.folder}: {place[0]} does not fit the checkpoint's arguments, {error}") from error


def write_megatron_weights(source: HfFolder, dtype: torch.dtype, args: Namespace, folder: Path) -> None:
    """Writes a Hugging Face folder's weights, all of ``dtype``, bit by bit, as one torch_dist checkpoint with these arguments."""
    config, layers = source.config, source.config.num_hidden_layers
    rows = {row.megatron[-1]: row for row in TABLE if row.hf[0].format(layer=0) in source.shapes}

    def read(key: str, layer: int) -> Tensor:
        parts = [source.read(name) for name in _hf_names(rows[key], layer, source)]
        return fuse_qkv(parts, config.num_key_value_heads) if rows[key] is FUSED_QKV else parts[0]

    def stored(row: Row) -> StoredTensor:
        shapes = [source.shapes[name] for name in _hf_names(row, 0, source)]
        shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        return StoredTensor(shape, dtype, layers if row.per_layer else None)

    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},  # the layers' tensors are stacked
    }
    extra_states = [f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in _EXTRA_STATES for i in range(layers)]
    nothing = {key: stored_object(None) for key in extra_states}
    write_torch_dist(folder, {key: stored(row) for key, row in rows.items()}, read, common, nothing)


def _hf_names(row: Row, layer: int, source: HfFolder) -> list[str]:
    return [name for name in (name.format(layer=layer) for name in row.hf) if name in source.shapes]  # a baseline has no forget gate
