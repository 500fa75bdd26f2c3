"""`rat-megatron convert from-hf`: a Hugging Face folder of a RAT+ model into a Megatron checkpoint to train on from, tensor by tensor."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from rat_megatron.convert.options import Output
from rat_megatron.convert.to_hf import FIXED
from rat_megatron.errors import UserError
from rat_megatron.files import atomic_folder, check_output

if TYPE_CHECKING:
    import torch

    from rat_megatron.convert.check import Check
    from rat_megatron.convert.names import Row
    from rat_megatron.hf import RatPlusConfig

_RELEASE = "release"  # Megatron's name for weights that belong to no iteration: training begins at 0, with a new optimizer
# What Megatron's linear layers keep for FP8, empty here; its loader asks for it.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2")


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint that was written, and what its check found."""

    output: Path
    pattern: str
    dtype: str
    check: Check

    def __str__(self) -> str:
        return f"{self.output}: {_RELEASE}, {self.dtype}, pattern {self.pattern}, for --pretrained-checkpoint\n{self.check}"


def convert_from_hf(
    folder: Annotated[Path, typer.Argument(help="Hugging Face folder of a RAT+ model.")], output: Output
) -> ConvertedCheckpoint:
    """Write a Hugging Face folder as a Megatron checkpoint, bit by bit; train on with --pretrained-checkpoint OUTPUT."""
    # The checkpoint has the architecture among its arguments and no optimizer. Memory peaks at one layer in fp32, in the check at the end.
    # The folder appears only when it is complete and checked.
    import torch

    from rat_megatron.checkpoint.hf_folder import HfFolder
    from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint
    from rat_megatron.checkpoint.torch_dist_writer import StoredTensor, write_torch_dist
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.megatron_weights import MegatronWeights
    from rat_megatron.convert.names import FUSED_QKV, TABLE, fuse_qkv

    check_output(output)
    source = HfFolder(folder)
    dtypes = set(source.dtypes.values())
    if len(dtypes) > 1:
        raise UserError(f"{folder} mixes {' and '.join(sorted(map(_word, dtypes)))}: save the model in one dtype")
    config, (dtype,) = source.config, dtypes
    args = _args_from_config(config, dtype, folder)
    rows = {row.megatron[-1]: row for row in TABLE if row.hf[0].format(layer=0) in source.shapes}

    def read(key: str, layer: int) -> torch.Tensor:
        row = rows[key]
        parts = [source.read(name) for name in _hf_names(row, layer, config)]
        return fuse_qkv(parts, config.num_key_value_heads) if row is FUSED_QKV else parts[0]

    def stored(row: Row) -> StoredTensor:
        shapes = [source.shapes[name] for name in _hf_names(row, 0, config)]
        shape = torch.Size([sum(shape[0] for shape in shapes), *shapes[0][1:]])
        return StoredTensor(shape, dtype, config.num_hidden_layers if row.per_layer else None)

    layers = config.num_hidden_layers
    extra_states = [f"decoder.layers.{name}._extra_state/shard_{i}_{layers}" for name in _EXTRA_STATES for i in range(layers)]
    with atomic_folder(output) as written:
        write_torch_dist(written / _RELEASE, {key: stored(row) for key, row in rows.items()}, read, _common_state(args), extra_states)
        (written / "latest_checkpointed_iteration.txt").write_text(_RELEASE)
        check = check_conversion(MegatronWeights(TorchDistCheckpoint(written / _RELEASE), config), source, str(folder))
    return ConvertedCheckpoint(output=output, pattern=config.attention_pattern, dtype=_word(dtype), check=check)


def _hf_names(row: Row, layer: int, config: RatPlusConfig) -> list[str]:
    from rat_megatron.convert.names import FUSED_QKV

    names = [name.format(layer=layer) for name in row.hf]
    return names[:-1] if row is FUSED_QKV and not config.use_recurrence else names  # a baseline has no forget gate


def _args_from_config(config: RatPlusConfig, dtype: torch.dtype, source: Path) -> Namespace:
    """Megatron's arguments as far as they describe the model: what to_hf, pretrain_rat.py and Megatron's loader look at."""
    import torch

    has_tokenizer = (source / "tokenizer_config.json").is_file()
    return Namespace(
        **FIXED,
        num_layers=config.num_hidden_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        group_query_attention=config.num_key_value_heads != config.num_attention_heads,
        num_query_groups=config.num_key_value_heads,
        kv_channels=config.head_dim,
        ffn_hidden_size=config.intermediate_size,
        vocab_size=config.vocab_size,
        padded_vocab_size=config.vocab_size,
        layernorm_epsilon=config.rms_norm_eps,
        rotary_base=int(config.rope_theta) if float(config.rope_theta).is_integer() else config.rope_theta,
        seq_length=config.max_position_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        untie_embeddings_and_output_weights=not config.tie_word_embeddings,
        attention_output_gate=True,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        rat_recurrence=config.use_recurrence,
        rat_pattern=config.attention_pattern,
        rat_eod_id=config.eos_token_id,
        rat_tokenizer_path=str(source.resolve()) if has_tokenizer else None,
        rat_tokenizer_name=getattr(config, "tokenizer_name", None),
        rat_tokenizer_hash=getattr(config, "tokenizer_hash", None),
    )


def _common_state(args: Namespace) -> dict:
    """What Megatron keeps beside the tensors; content_metadata says that the tensors of the layers are stacked."""
    return {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "num_floating_point_operations_so_far": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
