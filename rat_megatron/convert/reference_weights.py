"""The weights in a checkpoint of the reference implementation (a torch.save file), read without running code from it.

The file is a dict whose ``task`` maps names to tensors; beside it lie optimizer state and a config, which are not used. Its format is
that of the RAT+ paper's authors (arXiv 2602.18196); the number of heads is not in the weights.
"""

from __future__ import annotations

import pickle
import re
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rat_megatron.checkpoint.hf_folder import EMBEDDING, HEAD, expected_shapes
from rat_megatron.errors import UserError, one_line
from rat_megatron.hf import RatPlusConfig

_HEAD_DIM = 128  # of every model of the paper
_LAYER = "backbone.layers.{layer}."
_NAMES = {
    "embedding": "embedding.wte.weight",
    "input_norm": _LAYER + "seq_layer.input_norm.weight",
    "projections": _LAYER + "seq_layer.in_proj.weight",
    "forget_gate": _LAYER + "seq_layer.fgate_proj.weight",  # older files have it apart
    "output": _LAYER + "seq_layer.out_proj.weight",
    "post_norm": _LAYER + "hidden_layer.ln.weight",
    "up": _LAYER + "hidden_layer.fc1.weight",
    "down": _LAYER + "hidden_layer.fc2.weight",
    "final_norm": "backbone.ln.weight",
    "head": "head.lm_head.weight",
}
# Hugging Face names beside them; {layer} and the order of rows in the projections: output gate, q, k, v, forget gate.
_HF = {
    "embedding": EMBEDDING,
    "input_norm": "model.layers.{layer}.input_layernorm.weight",
    "output": "model.layers.{layer}.self_attn.o_proj.weight",
    "post_norm": "model.layers.{layer}.post_attention_layernorm.weight",
    "up": "model.layers.{layer}.mlp.up_proj.weight",
    "down": "model.layers.{layer}.mlp.down_proj.weight",
    "final_norm": "model.norm.weight",
    "head": HEAD,
}
_PROJECTIONS = [f"model.layers.{{layer}}.self_attn.{name}_proj.weight" for name in ("output_gate", "q", "k", "v", "forget_gate")]


class ReferenceWeights:
    """The tensors of a reference checkpoint, mapped, and the config that follows from their shapes.

    Raises UserError unless they are those of a RAT+ model, and for a file that would need code to be run.
    """

    def __init__(self, file: Path, num_heads: int | None, max_positions: int, pattern: str):
        self._tensors, self._file = {name.removeprefix("_orig_mod."): tensor for name, tensor in _read_task(file).items()}, file
        numbers = [int(found[1]) for name in self._tensors if (found := re.match(r"backbone\.layers\.(\d+)\.", name))]
        self._layers = max(numbers, default=-1) + 1
        dtype = self._get("embedding").dtype
        self.dtypes = {dtype}
        vocab_size, width = self._matrix("embedding").shape
        in_rows = self._matrix("projections").shape[0]
        apart = _NAMES["forget_gate"].format(layer=0) in self._tensors
        if in_rows not in ((4 * width,) if apart else (4 * width, 5 * width)):
            raise UserError(f"{file} has {in_rows} rows in the in_proj of layer 0: expected 4 or 5 times the width {width}")
        self._has_gate_apart = apart
        self.config = self._make_config(
            vocab_size=vocab_size,
            hidden_size=width,
            num_hidden_layers=self._layers,
            num_attention_heads=_heads(width, num_heads),
            intermediate_size=self._matrix("up").shape[0],
            max_position_embeddings=max_positions,
            use_recurrence=apart or in_rows == 5 * width,
            attention_pattern=pattern,
            tie_word_embeddings=_NAMES["head"] not in self._tensors or torch.equal(self._get("head"), self._get("embedding")),
        )
        self._check(dtype)

    def _make_config(self, **settings: Any) -> RatPlusConfig:
        try:
            return RatPlusConfig(**settings)
        except ValueError as error:
            raise UserError(str(error)) from error

    def _get(self, role: str, layer: int = 0) -> Tensor:
        name = _NAMES[role].format(layer=layer)
        if name not in self._tensors:
            raise UserError(f"{self._file} has no tensor {name} under 'task': it is no checkpoint of the reference implementation")
        return self._tensors[name]

    def _matrix(self, role: str) -> Tensor:
        tensor = self._get(role)
        if tensor.dim() != 2:
            raise UserError(f"{self._file} has {_NAMES[role].format(layer=0)} of shape {tuple(tensor.shape)}: expected a matrix")
        return tensor

    def _check(self, dtype: torch.dtype) -> None:
        """Every tensor is there, has the shape and dtype it should, and no other is."""
        known = {name.format(layer=layer) for name in _NAMES.values() for layer in range(self._layers)}
        if unknown := sorted(self._tensors.keys() - known):
            raise UserError(f"{self._file} holds {unknown[0]} under 'task', which a RAT+ model does not have")
        if len(dtypes := {str(tensor.dtype) for tensor in self._tensors.values()}) > 1:
            raise UserError(f"{self._file} mixes {' and '.join(sorted(dtypes))} under 'task': save the weights in one dtype")
        if not dtype.is_floating_point:
            raise UserError(f"{self._file} has weights of {dtype}: give them in float32 or bfloat16")
        shapes = expected_shapes(self.config)
        for name, weight in self.hf_weights(None):
            if weight.shape != shapes.pop(name):
                raise UserError(f"{self._file} has {tuple(weight.shape)} for {name}, which does not fit its other weights")

    def hf_weights(self, dtype: torch.dtype | None) -> Iterator[tuple[str, Tensor]]:
        """Every Hugging Face weight by name; what the file maps is read when it is used."""
        for role, hf_name in _HF.items():
            if role == "head" and self.config.tie_word_embeddings:
                continue
            for layer in range(self._layers if "{layer}" in hf_name else 1):
                yield hf_name.format(layer=layer), self._cast(self._get(role, layer), dtype)
        for layer in range(self._layers):
            names = [name.format(layer=layer) for name in _PROJECTIONS]
            parts = list(self._get("projections", layer).split(self.config.hidden_size))
            if self._has_gate_apart:
                parts.append(self._get("forget_gate", layer))
            if len(parts) != 4 + self.config.use_recurrence:
                raise UserError(f"{self._file} has {len(parts)} projections in layer {layer}, others in layer 0")
            yield from ((name, self._cast(part, dtype)) for name, part in zip(names, parts, strict=False))

    def _cast(self, weight: Tensor, dtype: torch.dtype | None) -> Tensor:
        return weight.detach().to(dtype or weight.dtype).contiguous()

    def read(self, role: str, layer: int = 0) -> Tensor:
        """As PlainWeights.read."""
        if role == "head" and self.config.tie_word_embeddings:
            role = "embedding"
        if role == "projections" and self._has_gate_apart:
            return torch.cat([self._get(role, layer), self._get("forget_gate", layer)])
        return self._get(role, layer)

    def cut(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """As PlainWeights.cut: o, q, k, v and f one after another, each with all heads."""
        o, q, k, v, *f = projected.unflatten(-1, (-1, self.config.num_attention_heads, self.config.head_dim)).unbind(1)
        return q, o, k, v, f[0] if f else None


def _heads(width: int, given: int | None) -> int:
    if given is not None and (given < 1 or width % given):
        raise UserError(f"--num-attention-heads {given} does not divide the model's width {width}")
    if given is None and width % _HEAD_DIM:
        raise UserError(f"the model's width {width} is no multiple of {_HEAD_DIM}: give --num-attention-heads")
    return given or width // _HEAD_DIM


def _read_task(file: Path) -> dict[str, Tensor]:
    """The weights, mapped. An EasyDict is read as an ordered dict; any other class that torch does not know as data is refused."""
    if not file.is_file():
        raise UserError(f"{file} is not a file: give the .pth of the reference implementation")
    with torch.serialization.safe_globals([(OrderedDict, "easydict.EasyDict")]):
        try:
            if refused := sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(file))):
                raise UserError(
                    f"{file} holds an object of the class {refused[0]}, which is not on the list of those that are safe to load: "
                    "where you trust the file, save its 'task' alone"
                )
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, OSError) as error:
            raise UserError(f"{file} cannot be read as a torch.save file of weights: {one_line(error)}") from error
    task = content.get("task") if isinstance(content, dict) else None
    if not isinstance(task, dict) or not task or not all(isinstance(tensor, Tensor) for tensor in task.values()):
        raise UserError(f"{file} has no weights under 'task': it is no checkpoint of the reference implementation")
    return task
