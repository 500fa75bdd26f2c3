"""Checkpoints from and to other formats, and averages of them, as functions and as the commands of `rat-megatron convert`.

A result appears under its name only when it is whole and checked. Whatever is wrong with the input raises UserError. Everything heavy
is imported in the functions, so that --help is quick.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from rat_megatron.errors import UserError
from rat_megatron.files import atomic_folder, check_output

if TYPE_CHECKING:
    import torch

    from rat_megatron.convert.check import Check, Logits
    from rat_megatron.convert.megatron_weights import MegatronWeights
    from rat_megatron.convert.reference_weights import ReferenceWeights

_LAST = 5  # iterations, where none are named
_RELEASE = "release"  # Megatron's name for weights that belong to no iteration: training begins at 0, with a new optimizer

Output = Annotated[Path, Argument(help="Folder to write; must not exist or be empty.")]
Dtype = Annotated[str | None, Option(help="float32 or bfloat16. Default: as stored.")]
ShardSize = Annotated[str, Option(help="Largest size of one safetensors file, such as 500MB; memory follows it.")]


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


@dataclass(frozen=True)
class OriginalFolder:
    """A folder of another family's model that was written, and what its check found."""

    output: Path
    source: str
    family: str
    shards: int
    check: Check

    def __str__(self) -> str:
        return f"{self.output}: {self.source} without memory, a {self.family} model, {self.shards} file(s)\n{self.check}"


@dataclass(frozen=True)
class ConvertedCheckpoint:
    """A checkpoint that was written, and what its check found."""

    output: Path
    pattern: str
    dtype: str
    check: Check

    def __str__(self) -> str:
        return f"{self.output}: {_RELEASE}, {self.dtype}, pattern {self.pattern}, for --pretrained-checkpoint\n{self.check}"


@dataclass(frozen=True)
class RetrofittedCheckpoint:
    """A checkpoint that was written of another family's model, what its check found without memory, and what memory adds to logits."""

    output: Path
    family: str
    dtype: str
    memory: float
    check: Check
    difference: float

    def __str__(self) -> str:
        return (
            f"{self.output}: {_RELEASE}, {self.dtype}, from {self.family}, for --pretrained-checkpoint\n"
            f"{self.check} without memory, and by {self.difference:.2g} with gates of {self.memory:g}"
        )


@dataclass(frozen=True)
class AveragedCheckpoint:
    """A checkpoint that was written, and the iterations that its weights are the mean of."""

    output: Path
    iterations: list[int]
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.output}: {_RELEASE}, {self.dtype}, mean of the weights of iteration {', '.join(map(str, self.iterations))}, "
            "for --pretrained-checkpoint, --load with --skip-train, and convert to-hf"
        )


def convert_to_hf(
    checkpoint: Annotated[Path, Argument(help="Folder that Megatron's --save wrote, or one iteration in it.")],
    output: Output,
    *,
    step: Annotated[int | None, Option("--iteration", help="Iteration to convert. Default: the latest.")] = None,
    pattern: Annotated[str | None, Option(help="Attention pattern, such as d16w256s4. Default: the one trained with.")] = None,
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, Option(help="Tokenizer folder to include. Default: that of the training data.")] = None,
    without_memory: Annotated[
        bool, Option("--without-memory", help="Write the model of the family that this one was retrofitted from, without recurrence.")
    ] = False,
    max_shard_size: ShardSize = "5GB",
) -> ConvertedFolder | OriginalFolder:
    """Write a Megatron checkpoint as a Hugging Face folder that loads with trust_remote_code=True, without this package.\f

    Memory peaks at one file of ``max_shard_size`` while writing and at one layer in fp32 in the check that follows.
    """
    from rat_megatron.checkpoint.hashes import check_hashes
    from rat_megatron.checkpoint.torch_dist import TorchDistCheckpoint, find_iteration
    from rat_megatron.convert.megatron_args import config_from_args, tokenizer_of_the_data
    from rat_megatron.convert.megatron_model import megatron_logits
    from rat_megatron.convert.megatron_weights import MegatronWeights
    from rat_megatron.convert.model_card import measured_losses, recipe_of

    wanted, shard_bytes = _check_options(output, dtype, tokenizer, max_shard_size)
    folder = find_iteration(checkpoint, step)
    check_hashes(folder)
    source = TorchDistCheckpoint(folder)
    args = source.args()
    weights = MegatronWeights(source, config_from_args(args, source.folder, pattern))
    tokenizer = tokenizer or tokenizer_of_the_data(args)
    origin = getattr(args, "rat_origin", None)
    if without_memory:
        return _write_original(weights, origin, source.folder, output, wanted, shard_bytes, tokenizer)
    logits = partial(megatron_logits, source)
    recipe, losses = recipe_of(args), measured_losses(source.folder, args)
    return _write_hf(weights, logits, source.folder, output, wanted, shard_bytes, tokenizer, recipe, losses, origin)


def convert_from_hf(
    folder: Annotated[Path, Argument(help="Hugging Face folder of a RAT+ model.")],
    output: Output,
) -> ConvertedCheckpoint:
    """Write a Hugging Face folder as a Megatron checkpoint, bit by bit; train on with --pretrained-checkpoint OUTPUT.\f

    The checkpoint has the architecture among its arguments and no optimizer. Memory peaks at one layer in fp32, in the check at the end.
    """
    from rat_megatron.checkpoint.hf_folder import HfFolder
    from rat_megatron.checkpoint.torch_dist import TRACKER_NAME, TorchDistCheckpoint
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.megatron_args import args_from_config
    from rat_megatron.convert.megatron_model import megatron_logits
    from rat_megatron.convert.megatron_weights import MegatronWeights, write_megatron_weights
    from rat_megatron.ratplus.pattern import PatternError

    check_output(output)
    source = HfFolder(folder)
    config, dtype = source.config, _one_dtype(source.dtypes.values(), folder)
    try:
        config.parse_pattern(config.attention_pattern).check_trainable()
    except PatternError as error:
        raise UserError(f"{folder} cannot be trained as its config.json has it: {error}") from error
    with atomic_folder(output) as written:
        write_megatron_weights(source, dtype, args_from_config(config, dtype, folder), written / _RELEASE)
        (written / TRACKER_NAME).write_text(_RELEASE)
        checkpoint = TorchDistCheckpoint(written / _RELEASE)
        MegatronWeights(checkpoint, config)  # it holds the model's weights and no others
        check = check_conversion(partial(megatron_logits, checkpoint), source, str(folder))
    return ConvertedCheckpoint(output=output, pattern=config.attention_pattern, dtype=_word(dtype), check=check)


def convert_retrofit(
    model: Annotated[Path, Argument(help="Hugging Face folder of a Llama, Mistral, Qwen2.5, Qwen3, OLMo2 or SmolLM model.")],
    output: Output,
    *,
    memory: Annotated[float, Option(help="The gates of the recurrence at first: 0 is none, and learns nothing.")] = 0.01,
    output_gate: Annotated[bool, Option("--output-gate", help="Give attention an output gate too, open at first.")] = False,
) -> RetrofittedCheckpoint:
    """Write a model of another family as a Megatron checkpoint of a RAT+ model; train on with --pretrained-checkpoint OUTPUT.\f

    Its logits are the original's, but for what ``memory`` adds. Peak memory is one layer in fp32, in the checks at the end.
    """
    from rat_megatron.checkpoint.torch_dist import TRACKER_NAME, TorchDistCheckpoint
    from rat_megatron.convert.check import check_conversion, fixed_prompt
    from rat_megatron.convert.megatron_args import args_from_config
    from rat_megatron.convert.megatron_model import megatron_logits
    from rat_megatron.convert.megatron_weights import write_megatron_weights
    from rat_megatron.convert.retrofit import RetrofittedFolder, origin_of, original_logits

    check_output(output)
    if not 0 <= memory < 1:
        raise UserError(f"--memory {memory} is no gate: give 0 or more, and less than 1")
    source = RetrofittedFolder(model, memory, output_gate)
    dtype = _one_dtype(source.dtypes.values(), model)
    args = args_from_config(source.config, dtype, model)
    args.rat_origin = origin_of(source)
    without = RetrofittedFolder(model, 0.0, output_gate)
    (original,) = original_logits(model, fixed_prompt(source.config), [None])
    check = check_conversion(lambda *_: [original], without, str(model))
    with atomic_folder(output) as written:
        write_megatron_weights(source, dtype, args, written / _RELEASE)
        (written / TRACKER_NAME).write_text(_RELEASE)
        checkpoint = TorchDistCheckpoint(written / _RELEASE)
        check_conversion(partial(megatron_logits, checkpoint), source, str(model))
        (remembering,) = megatron_logits(checkpoint, fixed_prompt(source.config), [None])
    difference = (remembering[:, : original.shape[1]] - original).abs().max().item()
    return RetrofittedCheckpoint(output, source.family.title, _word(dtype), memory, check, difference)


def convert_from_reference(
    file: Annotated[Path, Argument(help="Checkpoint of the reference implementation (.pth). No code in it is run.")],
    output: Output,
    *,
    num_attention_heads: Annotated[int | None, Option(help="Default: as many as are 128 wide.")] = None,
    max_position_embeddings: Annotated[int, Option(help="Longest sequence the model was trained on.")] = 4096,
    pattern: Annotated[str, Option(help="Attention pattern that the weights were adapted to, such as d16s4.")] = "dense",
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, Option(help="Tokenizer folder to include.")] = None,
    max_shard_size: ShardSize = "5GB",
) -> ConvertedFolder:
    """Write a checkpoint of the reference implementation as a Hugging Face folder.\f

    The file is mapped, so that only the weights are read of it.
    """
    from rat_megatron.convert.check import plain_logits
    from rat_megatron.convert.reference_weights import ReferenceWeights

    wanted, shard_bytes = _check_options(output, dtype, tokenizer, max_shard_size)
    weights = ReferenceWeights(file, num_attention_heads, max_position_embeddings, pattern)
    logits = partial(plain_logits, weights, weights.config)
    return _write_hf(weights, logits, file, output, wanted, shard_bytes, tokenizer, recipe={}, losses={})


def convert_average(
    checkpoint: Annotated[Path, Argument(help="Folder that Megatron's --save wrote.")],
    output: Output,
    *,
    last: Annotated[int | None, Option(help=f"How many of the last iterations to average. Default: {_LAST}.")] = None,
    steps: Annotated[list[int] | None, Option("--iteration", help="One of the iterations to average, in place of --last. Repeat.")] = None,
) -> AveragedCheckpoint:
    """Write the mean of a run's weights over several of its checkpoints as a checkpoint of weights.\f

    It is computed in float64 and rounded once, to the type of the weights, one tensor (of a layer) at a time: memory for two of the
    largest in float64.
    """
    from rat_megatron.checkpoint.torch_dist import TRACKER_NAME
    from rat_megatron.convert.average import Average, find_iterations

    check_output(output)
    average = Average(find_iterations(checkpoint, _LAST if last is None and not steps else last, steps or []))
    with atomic_folder(output) as written:
        average.write(written / _RELEASE)
        (written / TRACKER_NAME).write_text(_RELEASE)
    return AveragedCheckpoint(output=output, iterations=average.iterations, dtype=" and ".join(sorted(map(_word, average.dtypes))))


def _one_dtype(found: Iterable[torch.dtype], folder: Path) -> torch.dtype:
    dtypes = set(found)
    if len(dtypes) > 1:
        raise UserError(f"{folder} mixes {' and '.join(sorted(map(_word, dtypes)))}: save the model in one dtype")
    return dtypes.pop()


def _check_options(output: Path, dtype: str | None, tokenizer: Path | None, max_shard_size: str) -> tuple[torch.dtype | None, int]:
    """The wanted dtype and the bytes of a file."""
    from rat_megatron.checkpoint.hf_folder import parse_dtype, parse_size

    options = parse_dtype(dtype, "float32", "bfloat16"), parse_size(max_shard_size)
    check_output(output)
    if tokenizer is not None and not tokenizer.is_dir():
        raise UserError(f"--tokenizer {tokenizer} is not a folder")
    return options


def _write_hf(
    weights: MegatronWeights | ReferenceWeights,
    logits: Logits,
    source: Path,
    output: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    tokenizer: Path | None,
    recipe: dict[str, str],
    losses: dict[str, float],
    origin: dict[str, Any] | None = None,
) -> ConvertedFolder:
    """Writes weights as a Hugging Face folder and compares it with ``logits``; recipe and losses are for the model card."""
    from rat_megatron.checkpoint.hf_folder import HfFolder, write_configs, write_shards
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.model_card import write_model_card

    config = weights.config
    config.dtype = dtype or max(weights.dtypes, key=lambda stored: stored.itemsize)
    with atomic_folder(output) as folder:
        shards = write_shards(weights.hf_weights(dtype), folder, shard_bytes)
        write_configs(config, folder, tokenizer, origin and origin["generation_config"])
        write_model_card(folder, config, recipe, losses)
        check = check_conversion(logits, HfFolder(folder), str(source), None if weights.dtypes == {dtype} else dtype)
    return ConvertedFolder(
        output=output,
        source=source.name,
        pattern=config.attention_pattern,
        dtype=_word(config.dtype),
        shards=shards,
        tokenizer=tokenizer,
        check=check,
    )


def _write_original(
    weights: MegatronWeights,
    origin: dict[str, Any] | None,
    source: Path,
    output: Path,
    dtype: torch.dtype | None,
    shard_bytes: int,
    tokenizer: Path | None,
) -> OriginalFolder:
    """Writes the model of the family that it was retrofitted from, of all weights but the gates'."""
    from rat_megatron.checkpoint.hf_folder import write_shards
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.retrofit import RetrofittedFolder, original_logits, original_weights, write_original_configs

    if origin is None:
        raise UserError(f"--without-memory: {source} was not made by 'rat-megatron convert retrofit', so that it has no other family")
    with atomic_folder(output) as folder:
        write_original_configs(origin, weights.config, dtype or max(weights.dtypes, key=lambda stored: stored.itemsize), folder, tokenizer)
        shards = write_shards(original_weights(weights, dtype), folder, shard_bytes)
        check = check_conversion(partial(original_logits, folder), RetrofittedFolder(folder, 0.0, output_gate=False), str(folder))
    return OriginalFolder(output, source.name, origin["family"], shards, check)


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
