"""Which iterations of a run stay on the disk: the last ones, every N-th, and those that another run started from."""

from __future__ import annotations

import os
import shutil
from argparse import Namespace
from pathlib import Path

from rat_megatron.checkpoint import ADAPTED_NAME
from rat_megatron.checkpoint.hashes import iterations
from rat_megatron.checkpoint.torch_dist import find_iteration, latest_iteration

_REMOVED = ".removed"


def remove_old(checkpoint: Path, keep: int, every: int | None) -> None:
    """Removes iterations up to the latest one, but the last ``keep``, every multiple of ``every``, and those that other runs adapt.

    A folder first loses its name, so that there is never half of an iteration; what an earlier removal was cut off at goes too, and what
    a save before the latest one was.
    """
    latest = int(latest_iteration(checkpoint) or 0)
    for marker in checkpoint.glob(".iter_*.unfinished"):
        half = checkpoint / marker.name.removeprefix(".").removesuffix(".unfinished")
        if _number(half) < latest:
            shutil.rmtree(half, ignore_errors=True)
            marker.unlink()
    for folder in [folder for folder in iterations(checkpoint) if _number(folder) <= latest][:-keep]:
        if not (every and _number(folder) % every == 0) and not folder.is_symlink() and not (folder / ADAPTED_NAME).exists():
            folder.rename(folder.with_name(f".{folder.name}{_REMOVED}"))
    for folder in checkpoint.glob(f".iter_*{_REMOVED}"):
        shutil.rmtree(folder)


def keep_source(args: Namespace) -> None:
    """At the start of a run: notes beside the iteration that it starts from, in another run's folder, that it does; or says why not."""
    source = args.load if args.load and latest_iteration(Path(args.load)) else args.pretrained_checkpoint
    if not (source and args.save) or args.skip_train or os.environ.get("RANK", "0") != "0":
        return
    run = Path(args.save).resolve()
    if Path(source).resolve() == run:
        return
    folder, line = find_iteration(Path(source), args.ckpt_step), f"{run}\n"
    try:
        with (folder / ADAPTED_NAME).open("a+") as file:
            file.seek(0)
            if line not in file.readlines():
                file.write(line)
    except OSError as error:
        print(
            f"rat-megatron: {folder} cannot be marked as one that this run starts from ({error.strerror or error}): a run that keeps few "
            "checkpoints there may remove it",
            flush=True,
        )


def _number(folder: Path) -> int:
    return int(folder.name.removeprefix("iter_"))
