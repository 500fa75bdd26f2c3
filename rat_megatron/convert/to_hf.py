"""Turns a Megatron torch_dist checkpoint of a RAT+ model into a Hugging Face folder, tensor by tensor, in one CPU process."""

from __future__ import annotations

import json
import shutil
import tempfile
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig

from rat_megatron.convert.checkpoint import TorchDistCheckpoint, find_iteration
from rat_megatron.convert.names import FUSED_QKV, TABLE, split_fused_qkv
from rat_megatron.errors import UserError
from rat_megatron.hf import RatPlusConfig, RatPlusForCausalLM

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_CODE_FILES = ("configuration_ratplus.py", "modeling_ratplus.py", "cache_ratplus.py", "pattern.py")
_AUTO_MAP = {
    "AutoConfig": "configuration_ratplus.RatPlusConfig",
    "AutoModel": "modeling_ratplus.RatPlusModel",
    "AutoModelForCausalLM": "modeling_ratplus.RatPlusForCausalLM",
}
# Settings of Megatron that change the layer; a checkpoint with other values is not a RAT+ model.
_FIXED = {
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
class ConversionReport:
    """What was written, and what the check of the written folder found."""

    output: Path
    iteration: str
    pattern: str
    dtype: str
    tensors: int
    parameters: int
    shards: int
    tokenizer: Path | None
    largest_logit: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {self.iteration}, {self.tensors} tensors, {self.parameters:,} parameters, {self.dtype}, "
            f"{self.shards} file(s), pattern {self.pattern}, tokenizer {self.tokenizer or 'not included'}\n"
            f"checked: the folder loads, and the logits of a fixed prompt are finite (largest {self.largest_logit:.3g})"
        )


def convert_to_hf(
    checkpoint: Path,
    output: Path,
    *,
    pattern: str | None = None,
    dtype: str | None = None,
    step: int | None = None,
    tokenizer: Path | None = None,
    max_shard_size: int = 4 * 2**30,
) -> ConversionReport:
    """Writes one step of a checkpoint (default: the latest) to the folder ``output``, which must not exist or be empty.

    ``pattern`` (default: the one trained with) becomes the model's attention pattern, ``dtype`` (float32, bfloat16; default: as stored)
    that of the weights. ``tokenizer`` defaults to the one that the training data was made with, where that folder is still there. Memory
    peaks at about ``max_shard_size`` bytes while writing and at the size of the model in the check that follows. The folder appears
    only when it is complete and checked. Raises UserError for whatever is wrong with the input.
    """
    if dtype is not None and dtype not in _DTYPES:
        raise UserError(f"--dtype {dtype} is not one of {', '.join(_DTYPES)}")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output} exists and is not an empty folder: give another, or remove it")
    source = TorchDistCheckpoint(find_iteration(checkpoint, step))
    args = source.args()
    config = _config_from_args(args, source.folder, pattern)
    tokenizer = _find_tokenizer(args, tokenizer)

    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        written = _write_shards(_weights(source, config, _DTYPES[dtype] if dtype else None), folder, max_shard_size)
        config.dtype = written.dtype
        _write_configs(config, args, folder, tokenizer)
        largest_logit = _check(folder)
        if output.exists():
            output.rmdir()
        folder.rename(output)
    return ConversionReport(
        output=output,
        iteration=source.folder.name,
        pattern=config.attention_pattern,
        dtype=str(written.dtype).removeprefix("torch."),
        tensors=written.tensors,
        parameters=written.parameters,
        shards=written.shards,
        tokenizer=tokenizer,
        largest_logit=largest_logit,
    )


def _config_from_args(args: Namespace, source: Path, pattern: str | None) -> RatPlusConfig:
    """The Hugging Face config of the model that Megatron's arguments describe."""
    if not hasattr(args, "rat_recurrence"):
        raise UserError(f"{source} is not a RAT+ checkpoint: its arguments have no rat_recurrence, so pretrain_rat.py did not write it")
    for name, value in _FIXED.items():
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
            architectures=["RatPlusForCausalLM"],
            auto_map=dict(_AUTO_MAP),
        )
    except AttributeError as error:
        raise UserError(f"{source} does not say its {error.name}: pretrain_rat.py did not write it") from error
    except ValueError as error:
        raise UserError(str(error)) from error


def _weights(source: TorchDistCheckpoint, config: RatPlusConfig, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """Every Hugging Face weight by name, read as it is asked for; raises UserError unless the checkpoint holds these and no others."""
    with torch.device("meta"):
        expected = {name: weight.shape for name, weight in RatPlusForCausalLM(config).named_parameters()}
    keys = {key for key in source.tensors if key.startswith(("embedding.", "decoder.", "output_layer.")) and "_extra_state" not in key}
    found = []
    for layer in range(config.num_hidden_layers):
        for row in TABLE:
            names = [name.format(layer=layer) for name in row.hf]
            if (layer > 0 and not row.per_layer) or names[0] not in expected:
                continue
            place = row.find(keys, layer)
            if place is None:
                raise UserError(f"{source.folder} has no tensor for {names[0]}: looked for {' and '.join(row.megatron)}")
            key, index = place
            stacked = source.tensors[key].size[0]
            if index is not None and stacked != config.num_hidden_layers:
                raise UserError(f"{source.folder} stacks {stacked} layers in {key}, but its arguments say {config.num_hidden_layers}")
            found.append((row, names, place))
    if unknown := sorted(keys - {key for _, _, (key, _) in found}):
        raise UserError(f"{source.folder} holds {unknown[0]}, which a RAT+ model with these arguments does not have")

    for row, names, place in found:
        for name, weight in zip(names, _parts(source, config, row is FUSED_QKV, place), strict=False):
            if name.endswith("embed_tokens.weight") or name.startswith("lm_head"):
                weight = weight[: config.vocab_size]  # Megatron pads the vocabulary
            if weight.shape != expected[name]:
                raise UserError(f"{source.folder} has {tuple(weight.shape)} for {name}, but its arguments say {tuple(expected[name])}")
            yield name, weight.to(dtype or weight.dtype).contiguous()


def _parts(source: TorchDistCheckpoint, config: RatPlusConfig, fused: bool, place: tuple[str, int | None]) -> list[torch.Tensor]:
    weight = source.read(*place)
    if not fused:
        return [weight]
    sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    try:
        return split_fused_qkv(weight, *sizes, recurrence=config.use_recurrence)
    except ValueError as error:
        raise UserError(f"{source.folder}: {place[0]} does not fit the checkpoint's arguments, {error}") from error


@dataclass
class _Written:
    tensors: int = 0
    parameters: int = 0
    shards: int = 0
    dtype: torch.dtype = torch.float32


def _write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path, max_shard_size: int) -> _Written:
    """Writes safetensors files of at most max_shard_size bytes (or one tensor), with an index when there are several."""
    written, shard, size, files = _Written(), {}, 0, []

    def flush() -> None:
        path = folder / f"part-{len(files)}.safetensors"
        save_file(shard, path, metadata={"format": "pt"})
        path.chmod(folder.stat().st_mode & 0o666)  # safetensors would keep it from everyone but its owner
        files.append((path, list(shard)))

    total = 0
    for name, weight in weights:
        if shard and size + weight.nbytes > max_shard_size:
            flush()
            shard, size = {}, 0
        shard[name] = weight
        size += weight.nbytes
        total += weight.nbytes
        written.tensors += 1
        written.parameters += weight.numel()
        written.dtype = weight.dtype
    flush()

    index = {}
    for number, (path, names) in enumerate(files, start=1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        path.rename(folder / name)
        index |= dict.fromkeys(names, name)
    if len(files) > 1:
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n")
    written.shards = len(files)
    return written


def _find_tokenizer(args: Namespace, tokenizer: Path | None) -> Path | None:
    """The folder that was asked for, or the one that the training data names if it is here."""
    if tokenizer is not None:
        if not tokenizer.is_dir():
            raise UserError(f"--tokenizer {tokenizer} is not a folder")
        return tokenizer
    remembered = getattr(args, "rat_tokenizer_path", None)
    return Path(remembered) if remembered and Path(remembered).is_dir() else None


def _write_configs(config: RatPlusConfig, args: Namespace, folder: Path, tokenizer: Path | None) -> None:
    """Writes config, generation config, the model's code and the tokenizer; end-of-text is the document end that training used."""
    config.eos_token_id = getattr(args, "rat_eod_id", None)
    if tokenizer is not None:
        try:
            loaded = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:
            raise UserError(f"{tokenizer} holds no tokenizer that Transformers can load: {str(error).splitlines()[0]}") from error
        loaded.save_pretrained(folder)
        config.bos_token_id, config.pad_token_id = loaded.bos_token_id, loaded.pad_token_id
        if config.eos_token_id is None:
            config.eos_token_id = loaded.eos_token_id
    config.save_pretrained(folder)
    ids = {"bos_token_id": config.bos_token_id, "eos_token_id": config.eos_token_id, "pad_token_id": config.pad_token_id}
    GenerationConfig(**ids).save_pretrained(folder)
    package = Path(__file__).parents[1] / "hf"
    for name in _CODE_FILES:
        shutil.copyfile(package / name, folder / name)


def _check(folder: Path) -> float:
    """Loads the written folder and runs a fixed prompt; returns the largest logit. Raises UserError unless all logits are finite."""
    model, info = RatPlusForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"the written folder does not match the model: {info}")
    prompt = torch.arange(1, 17)[None] % model.config.vocab_size
    with torch.no_grad():
        logits = model(prompt, use_cache=False).logits
    if not logits.isfinite().all():
        raise UserError("the checkpoint's weights give NaN or infinite logits: training diverged before it was written")
    return logits.abs().max().item()
