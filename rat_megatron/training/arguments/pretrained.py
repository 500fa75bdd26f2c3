"""The architecture of the checkpoint that a run starts from, for a command line that does not give it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rat_megatron.checkpoint import TRACKER_NAME
from rat_megatron.checkpoint.torch_dist import ARCHITECTURE, read_checkpoint_args
from rat_megatron.model.architecture import OPTIONS, ROTARY

_SIZES = ("kv_channels", "group_query_attention", "num_query_groups", "ffn_hidden_size", "layernorm_epsilon", "max_position_embeddings")


def architecture_of(checkpoint: str, step: str | None) -> dict[str, Any]:
    """Megatron's arguments that make the model of a checkpoint, and ``rat_architecture_from``, its folder; nothing where there is none.

    Raises UserError for a checkpoint that cannot be read.
    """
    folder = Path(checkpoint)
    if not (folder / TRACKER_NAME).is_file():  # the checks that follow say so
        return {}
    stored = read_checkpoint_args(folder, int(step) if step and step.isdigit() else None)
    names = [name for name in (*ARCHITECTURE, *OPTIONS, *ROTARY, *_SIZES) if getattr(stored, name, None) is not None]
    return {name: getattr(stored, name) for name in names} | {"rat_architecture_from": checkpoint}
