"""Work for any number of processes, results in order, a bounded number of jobs in flight."""

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from triptych_data.workers import begin_worker

Job = TypeVar("Job")
Result = TypeVar("Result")


def in_order(
    work: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Generator[Result, None, None]:
    """`work(job)` for each job, in order; `work` is sent to a worker once, a job when it is due.

    With one worker, or one job, in this process. Raises what `work` raises, and ValueError when a
    worker is killed.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        yield from map(work, jobs)
        return
    # Not forked: the progress bar's thread may hold a lock.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_workers, context, initializer=_begin, initargs=(work,))
    pending = deque[Future[Result]]()
    try:
        for job in jobs:
            pending.append(pool.submit(_call, job))
            if len(pending) >= 2 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    except BrokenProcessPool as error:
        raise ValueError(
            "--workers: every worker must live to the end, got one that was killed, often for "
            "memory; use fewer workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_work: Callable[[Any], Any] | None = None  # of this worker process


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    begin_worker()
    _work = work


def _call(job: Any) -> Any:
    assert _work is not None, "set when the worker began"
    return _work(job)
