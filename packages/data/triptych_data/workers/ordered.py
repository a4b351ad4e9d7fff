"""Work for any number of processes, results in order, a bounded number of jobs in flight."""

import multiprocessing
import traceback
from collections.abc import Callable, Generator, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from triptych_data.workers.plain import begin_worker

Job = TypeVar("Job")
Result = TypeVar("Result")
AHEAD = 4
"""Jobs per worker that may be begun before an earlier one's result is taken: bounds memory."""


def in_order(
    work: Callable[[Job], Result], jobs: Sequence[Job], num_workers: int
) -> Generator[Result, None, None]:
    """`work(job)` for each job, in order; `work` is sent to a worker once, a job when it is due.

    With one worker, or one job, in this process. Closing the generator ends what still runs.
    Raises what `work` raises, and ValueError when a worker is killed.
    """
    num_workers = min(num_workers, len(jobs))
    if num_workers <= 1:
        yield from map(work, jobs)
        return
    workers = [_Worker(work) for _ in range(num_workers)]
    try:
        yield from _collect(workers, jobs)
    finally:
        for worker in workers:
            worker.end()


def _collect(workers: list["_Worker"], jobs: Sequence[Any]) -> Generator[Any, None, None]:
    done, begun = dict[int, tuple[bool, Any]](), 0
    for number in range(len(jobs)):
        while number not in done:
            for worker in workers:
                ahead = begun - number < AHEAD * len(workers)
                if worker.job is None and begun < len(jobs) and ahead:
                    worker.begin(begun, jobs[begun])
                    begun += 1
            busy = {worker.connection: worker for worker in workers if worker.job is not None}
            for ready in wait(list(busy)):
                job, reply = busy[ready].finish()  # type: ignore[index]  # of other kinds on Windows
                done[job] = reply
        well, result = done.pop(number)
        if not well:
            raise result
        yield result


class _Worker:
    """A process and its pipe. No queue and no semaphore: a kill leaves nothing behind."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        # Not forked: the progress bar's thread may hold a lock.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.job: int | None = None
        """what it works on; it reads the next one only when idle, so that no pipe can jam"""
        self._process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        self._process.start()
        theirs.close()

    def begin(self, number: int, job: Any) -> None:
        self.job = number
        try:
            self.connection.send(job)
        except OSError as error:
            raise _killed() from error

    def finish(self) -> tuple[int, tuple[bool, Any]]:
        """The job that is done, whether it went well, and its result or what it raised."""
        assert self.job is not None
        try:
            reply = self.connection.recv()
        except (EOFError, OSError) as error:
            raise _killed() from error
        number, self.job = self.job, None
        return number, reply

    def end(self) -> None:
        if self.job is not None:
            self._process.terminate()
        self.connection.close()
        self._process.join()


def _killed() -> ValueError:
    return ValueError(
        "--workers: every worker must live to the end, got one that was killed, often for memory; "
        "use fewer workers"
    )


def _serve(connection: Connection, work: Callable[[Any], Any]) -> None:
    begin_worker()
    while True:
        try:
            job = connection.recv()
        except EOFError:
            return
        try:
            reply = (True, work(job))
        except (ValueError, OSError) as error:
            reply = (False, error)
        except Exception as error:
            error.add_note(traceback.format_exc())
            reply = (False, error)
        connection.send(reply)
