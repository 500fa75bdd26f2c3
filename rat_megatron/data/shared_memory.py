"""Clears what killed runs left of Streaming's shared memory, and nothing else.

Streaming refuses a cache folder that, by its shared memory, is still in use. Its own `clean_stale_shared_memory` takes all blocks there
are, also from live runs on the same node; here, a block that some process has mapped stays.
"""

from __future__ import annotations

import os
from pathlib import Path


def clean_stale_shared_memory() -> None:
    """Collective when torch.distributed is initialized: the first rank of each node cleans, the others wait for it."""
    from streaming.base.constant import SHM_TO_CLEAN
    from streaming.base.distributed import barrier, get_local_rank

    folder = Path("/dev/shm")
    if get_local_rank() == 0 and folder.is_dir():
        blocks = [path for path in folder.glob("[0-9]*_*") if path.name.partition("_")[2] in SHM_TO_CLEAN]
        # The blocks are listed before the processes: what a new run creates meanwhile is not among them.
        mapped = "".join(map(_read_if_allowed, Path("/proc").glob("[0-9]*/maps"))) if blocks else ""
        for path in blocks:
            if f"{path}\n" not in mapped and path.stat().st_uid == os.getuid():
                path.unlink(missing_ok=True)
    barrier()


def _read_if_allowed(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # another user's process, or one that just ended
        return ""
