"""`rat-megatron convert to-hf`: a Megatron torch_dist checkpoint into a Hugging Face folder, tensor by tensor, in one CPU process."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rat_megatron.convert.options import Dtype, Output, ShardSize
from rat_megatron.errors import UserError
from rat_megatron.files import atomic_folder, check_output

if TYPE_CHECKING:
    from rat_megatron.convert.check import Check
    from rat_megatron.hf import RatPlusConfig

# Settings of Megatron that change the layer; a checkpoint with other values is not a RAT+ model.
FIXED = {
    "normalization": "RMSNorm",
    "position_embedding_type": "rope",
    "rotary_percent": 1.0,
    "rotary_interleaved": False,
    "use_rope_scaling": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "swiglu": False,
    "squared_relu": False,
    "apply_layernorm_1p": False,
    "multi_latent_attention": False,
    "num_experts": None,
}


@dataclass(frozen=True)
class ConvertedFolder:
    """A Hugging Face folder that was written, and what its check found."""

    output: Path
    source: str
    pattern: str
    dtype: str
    shards: int
    tokenizer: Path | None
    check: Check

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.source}, {self.dtype}, {self.shards} file(s), pattern {self.pattern}, "
            f"tokenizer {self.tokenizer or 'not included'}\n{self.check}"
        )


def convert_to_hf(
    checkpoint: Annotated[Path, typer.Argument(help="Folder that Megatron's --save wrote, or one iteration in it.")],
    output: Output,
    *,
    iteration: Annotated[int | None, typer.Option(help="Iteration to convert. Default: the latest.")] = None,
    pattern: Annotated[str | None, typer.Option(help="Attention pattern, such as d16w256s4. Default: the one trained with.")] = None,
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder to include. Default: that of the training data.")] = None,
    max_shard_size: ShardSize = "5GB",
) -> ConvertedFolder:
    """Write a Megatron checkpoint as a Hugging Face folder that loads with trust_remote_code=True, without this package."""
    # Memory peaks at one file of max_shard_size while writing and at one layer in fp32 in the check that follows. The folder appears only
    # when it is complete and checked. Imports are here because Transformers takes seconds, and --help should not.
    from rat_megatron.checkpoint.hf_folder import HfFolder
    from rat_megatron.checkpoint.hf_writer import check_tokenizer, parse_dtype, parse_size, write_configs, write_shards
    from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.megatron_weights import MegatronWeights
    from rat_megatron.convert.model_card import recipe_of, write_model_card

    wanted, shard_size = parse_dtype(dtype), parse_size(max_shard_size)
    check_output(output)
    check_tokenizer(tokenizer)
    source = TorchDistCheckpoint(find_iteration(checkpoint, iteration))
    args = source.args()
    config = _config_from_args(args, source.folder, pattern)
    tokenizer = tokenizer or _tokenizer_of_the_data(args)
    weights = MegatronWeights(source, config)
    config.dtype = wanted or max(weights.dtypes, key=lambda stored: stored.itemsize)

    with atomic_folder(output) as folder:
        shards = write_shards(weights.hf_weights(wanted), folder, shard_size)
        write_configs(config, folder, tokenizer)
        write_model_card(folder, config, recipe_of(args), _measured_losses(source.folder, args))
        check = check_conversion(weights, HfFolder(folder), str(source.folder), None if weights.dtypes <= {wanted, None} else wanted)
    return ConvertedFolder(
        output=output,
        source=source.folder.name,
        pattern=config.attention_pattern,
        dtype=str(config.dtype).removeprefix("torch."),
        shards=shards,
        tokenizer=tokenizer,
        check=check,
    )


def _config_from_args(args: Namespace, source: Path, pattern: str | None) -> RatPlusConfig:
    """The Hugging Face config of the model that Megatron's arguments describe; end-of-text is the document end that training used."""
    from rat_megatron.hf import RatPlusConfig

    if not hasattr(args, "rat_recurrence"):
        raise UserError(f"{source} is not a RAT+ checkpoint: its arguments have no rat_recurrence, so pretrain_rat.py did not write it")
    for name, value in FIXED.items():
        if getattr(args, name, value) != value:
            raise UserError(f"{source} was trained with {name}={getattr(args, name)}: a RAT+ model has {name}={value}")
    try:
        return RatPlusConfig(
            vocab_size=args.vocab_size or args.padded_vocab_size,
            hidden_size=args.hidden_size,
            num_hidden_layers=args.num_layers,
            num_attention_heads=args.num_attention_heads,
            num_key_value_heads=args.num_query_groups if args.group_query_attention else args.num_attention_heads,
            head_dim=args.kv_channels,
            intermediate_size=args.ffn_hidden_size,
            rms_norm_eps=args.layernorm_epsilon,
            rope_theta=float(args.rotary_base),
            max_position_embeddings=args.max_position_embeddings or args.seq_length,
            use_recurrence=args.rat_recurrence,
            attention_pattern=args.rat_pattern if pattern is None else pattern,
            tie_word_embeddings=not args.untie_embeddings_and_output_weights,
            eos_token_id=getattr(args, "rat_eod_id", None),
            **_tokenizer_facts(args),
        )
    except AttributeError as error:
        raise UserError(f"{source} does not say its {error.name}: pretrain_rat.py did not write it") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _tokenizer_facts(args: Namespace) -> dict[str, Any]:
    """``tokenizer_name`` and ``tokenizer_hash`` of the training data, as `rat-megatron prepare` notes them, where they are known."""
    facts = {name: getattr(args, f"rat_{name}", None) for name in ("tokenizer_name", "tokenizer_hash")}
    return {name: value for name, value in facts.items() if value is not None}


def _tokenizer_of_the_data(args: Namespace) -> Path | None:
    remembered = getattr(args, "rat_tokenizer_path", None)
    return Path(remembered) if remembered and Path(remembered).is_dir() else None


def _measured_losses(folder: Path, args: Namespace) -> dict[str, float]:
    """Validation losses by pattern from the run's report.json, if they are those of this iteration and of this model."""
    try:
        report = json.loads((folder.parent / "report.json").read_text())
        if folder.name != f"iter_{report['iteration']:07d}" or report["pattern"] != args.rat_pattern:
            return {}
        return {str(word): float(loss) for word, loss in report["patterns"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}  # never evaluated, or not by this program: the card says nothing then
