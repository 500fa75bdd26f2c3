"""The weights of a RAT+ model in a torch_dist checkpoint: read one at a time, as they are or as Hugging Face names them, and written."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from rat_megatron.checkpoint.hf_folder import EMBEDDING, HEAD, HfFolder, expected_shapes
from rat_megatron.checkpoint.torch_dist import StoredTensor, TorchDistCheckpoint, stored_object, write_torch_dist
from rat_megatron.convert.names import FUSED_QKV, FUSED_QKV_BIAS, Row, fuse_qkv, rows_of, split_fused_qkv
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
            for row in rows_of(self.shapes):
                names = _names(row, layer, self.shapes)
                if layer > 0 and not row.per_layer:
                    continue
                place = row.find(keys, layer)
                if place is None:
                    raise UserError(f"{source.folder} has no tensor for {names[0]}: looked for {' and '.join(row.megatron)}")
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
            names = _names(row, layer, self.shapes)
            for name, weight in zip(names, self._parts(row, place, names), strict=True):
                if name in (EMBEDDING, HEAD):
                    weight = weight[: self.config.vocab_size]  # Megatron pads the vocabulary
                if weight.shape != self.shapes[name]:
                    shapes = f"{tuple(weight.shape)} for {name}, but its arguments say {tuple(self.shapes[name])}"
                    raise UserError(f"{self._source.folder} has {shapes}")
                yield name, weight.to(dtype or weight.dtype).contiguous()

    def _parts(self, row: Row, place: tuple[str, int | None], names: list[str]) -> list[Tensor]:
        weight, config = self._source.read(*place), self.config
        if row not in (FUSED_QKV, FUSED_QKV_BIAS):
            return list(weight.chunk(len(names)))  # SwiGLU's gate and up projections lie one below the other
        sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        try:
            parts = split_fused_qkv(weight, *sizes, recurrence=config.use_recurrence, output_gate=config.use_output_gate)
        except ValueError as error:
            raise UserError(f"{self._source.folder}: {place[0]} does not fit the checkpoint's arguments, {error}") from error
        wanted = {name.split(".")[-2].removesuffix("_proj"): name for name in names}
        for name in parts.keys() - wanted.keys():  # q, k and v where the gates alone have a bias
            if parts[name].any():
                raise UserError(f"{self._source.folder} has a bias for {name} in {place[0]}, which its arguments say it lacks")
        return [parts[name] for name in wanted]


def write_megatron_weights(source: HfFolder, dtype: torch.dtype, args: Namespace, folder: Path) -> None:
    """Writes a Hugging Face folder's weights, all of ``dtype``, bit by bit, as one torch_dist checkpoint with these arguments."""
    config, layers = source.config, source.config.num_hidden_layers
    rows = {row.megatron[-1]: row for row in rows_of(source.shapes)}

    def read(key: str, layer: int) -> Tensor:
        row = rows[key]
        if row is FUSED_QKV_BIAS:  # zeros where a projection has none
            names = _names(FUSED_QKV, layer, source.shapes)
            biases = [name.replace(".weight", ".bias") for name in names]
            parts = [
                source.read(bias) if bias in source.shapes else torch.zeros(source.shapes[name][0], dtype=dtype)
                for name, bias in zip(names, biases, strict=True)
            ]
            return fuse_qkv(parts, config.num_key_value_heads)
        parts = [source.read(name) for name in _names(row, layer, source.shapes)]
        return fuse_qkv(parts, config.num_key_value_heads) if row is FUSED_QKV else torch.cat(parts)

    def stored(row: Row) -> StoredTensor:
        shapes = [source.shapes[name] for name in _names(FUSED_QKV if row is FUSED_QKV_BIAS else row, 0, source.shapes)]
        shapes = [shape[:1] for shape in shapes] if row is FUSED_QKV_BIAS else shapes
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


def _names(row: Row, layer: int, shapes: Mapping[str, torch.Size]) -> list[str]:
    """The weights of a row that the model has: a baseline has no forget gate, a GELU's MLP no gate projection."""
    return [name for name in (name.format(layer=layer) for name in row.hf) if name in shapes]
