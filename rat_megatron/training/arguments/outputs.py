"""What a run writes to: folders that can be written, and packages that are there."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from importlib.util import find_spec
from pathlib import Path

from rat_megatron.errors import UserError

_FOLDERS = (
    *("save", "tensorboard_dir", "data_cache_path", "wandb_save_dir", "config_logger_dir"),
    *("non_persistent_global_ckpt_dir", "non_persistent_local_ckpt_dir"),
)


def check_outputs(args: Namespace) -> None:
    """Raises UserError where the run could not write what it is asked for. Creates nothing: bad input leaves no trace."""
    for name in _FOLDERS:
        if (folder := getattr(args, name)) and "://" not in folder:
            _check_writable(f"--{name.replace('_', '-')}", Path(folder))
    if args.wandb_project:
        if find_spec("wandb") is None:
            raise UserError("--wandb-project needs the package wandb: install it, or leave the flag out and use --tensorboard-dir")
        if not args.wandb_exp_name:
            raise UserError("--wandb-project needs --wandb-exp-name: name the run")
        if not (args.wandb_save_dir or args.save):
            raise UserError("--wandb-project needs a folder: give --wandb-save-dir or --save")


def _check_writable(flag: str, folder: Path) -> None:
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists() or path.is_symlink())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be written ({there}: {error.strerror}): give another folder") from error
