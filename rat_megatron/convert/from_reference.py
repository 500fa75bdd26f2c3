"""`rat-megatron convert from-reference`: a checkpoint of the reference implementation into a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rat_megatron.convert.options import Dtype, Output, ShardSize
from rat_megatron.convert.to_hf import ConvertedFolder
from rat_megatron.files import atomic_folder, check_output


def convert_from_reference(
    file: Annotated[Path, typer.Argument(help="Checkpoint of the reference implementation (.pth). No code in it is run.")],
    output: Output,
    *,
    num_attention_heads: Annotated[int | None, typer.Option(help="Default: as many as are 128 wide.")] = None,
    max_position_embeddings: Annotated[int, typer.Option(help="Longest sequence the model was trained on.")] = 4096,
    pattern: Annotated[str, typer.Option(help="Attention pattern that the weights were adapted to, such as d16s4.")] = "dense",
    dtype: Dtype = None,
    tokenizer: Annotated[Path | None, typer.Option(help="Tokenizer folder to include.")] = None,
    max_shard_size: ShardSize = "5GB",
) -> ConvertedFolder:
    """Write a checkpoint of the reference implementation as a Hugging Face folder."""
    # The file is mapped, so that only the weights are read of it. The folder appears only when it is complete and checked.
    from rat_megatron.checkpoint.hf_folder import HfFolder
    from rat_megatron.checkpoint.hf_writer import check_tokenizer, parse_dtype, parse_size, write_configs, write_shards
    from rat_megatron.convert.check import check_conversion
    from rat_megatron.convert.model_card import write_model_card
    from rat_megatron.convert.reference_weights import ReferenceWeights, read_task

    wanted, shard_size = parse_dtype(dtype), parse_size(max_shard_size)
    check_output(output)
    check_tokenizer(tokenizer)
    weights = ReferenceWeights(read_task(file), file, num_attention_heads, max_position_embeddings, pattern)
    config = weights.config
    config.dtype = wanted or weights.dtype

    with atomic_folder(output) as folder:
        shards = write_shards(weights.hf_weights(wanted), folder, shard_size)
        write_configs(config, folder, tokenizer)
        write_model_card(folder, config, recipe={}, losses={})
        check = check_conversion(weights, HfFolder(folder), str(file), wanted if wanted not in (None, weights.dtype) else None)
    return ConvertedFolder(
        output=output,
        source=file.name,
        pattern=config.attention_pattern,
        dtype=str(config.dtype).removeprefix("torch."),
        shards=shards,
        tokenizer=tokenizer,
        check=check,
    )
