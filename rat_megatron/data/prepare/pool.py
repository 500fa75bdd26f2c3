"""Worker processes for `prepare`: forks that die with their parent, and one sentence when a worker or the disk gives out."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import connection, get_context, parent_process
from typing import Any

from rat_megatron.errors import UserError
from rat_megatron.files import DISK_FULL

_context: Any  # of a worker process, set as it starts: a fork inherits what would be slow to pickle with every task


def run_in_workers(function: Callable[[Any, Any], Any], context: Any, tasks: Iterable[Any], workers: int) -> Iterator[tuple[Any, Any]]:
    """(task, function(context, task)) for every task, in the order in which they are done.

    The workers get `context` by being forked, so it may be large; tasks and results are pickled. Raises what the function raises, and
    UserError when a worker dies or the disk is full."""
    pool = ProcessPoolExecutor(workers, mp_context=get_context("fork"), initializer=_start_worker, initargs=(context,))
    with _explaining(pool):
        futures = {pool.submit(_call, function, task): task for task in tasks}  # forks here and now, before the caller starts a thread
    return _results(pool, futures)


def _results(pool: ProcessPoolExecutor, futures: dict[Future, Any]) -> Iterator[tuple[Any, Any]]:
    with _explaining(pool):
        for future in as_completed(futures):
            yield futures.pop(future), future.result()
    pool.shutdown()


@contextmanager
def _explaining(pool: ProcessPoolExecutor) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        pool.shutdown(cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise UserError(
                "a worker process died, perhaps for lack of memory: start the same command again to go on, if need be with fewer --workers."
            ) from None
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise UserError(f"the disk is full ({error}): make room and start the same command again to go on.") from error
        raise


def _call(function: Callable[[Any, Any], Any], task: Any) -> Any:
    return function(_context, task)


def _start_worker(context: Any) -> None:
    global _context
    _context = context
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # processes are the parallelism
    parent = parent_process()

    def exit_with_parent() -> None:  # a killed parent cannot tell its workers
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
