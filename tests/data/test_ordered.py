import os
import signal
import time
from contextlib import closing
from pathlib import Path

import pytest

from triptych_data.workers.ordered import AHEAD, in_order

PARENT = os.getpid()


def square(number: int) -> tuple[int, int]:
    time.sleep(0.02 * (number % 3))
    return number * number, os.getpid()


def fail_at_five(number: int) -> int:
    if number == 5:
        raise ValueError(f"x.jsonl:{number}: must not be five")
    return number


def surprise(number: int) -> int:
    return [][number]


def die_at_three(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def touch(path: str) -> str:
    Path(path).touch(exist_ok=False)
    return path


def sleep(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_results_come_in_order_from_several_processes(workers):
    results = list(in_order(square, range(20), workers))
    assert [result for result, _ in results] == [i * i for i in range(20)]
    processes = {process for _, process in results}
    assert processes == {os.getpid()} if workers == 1 else os.getpid() not in processes
    assert len(processes) <= min(workers, 20)


def test_nothing_to_do():
    assert list(in_order(square, [], 3)) == []


@pytest.mark.parametrize("workers", [1, 2])
def test_errors_come_where_their_job_was(workers):
    results = in_order(fail_at_five, range(20), workers)
    seen = []
    with pytest.raises(ValueError, match=r"x.jsonl:5: must not be five"):
        seen.extend(iter(results))
    assert seen == list(range(5))


def test_a_mistake_of_ours_brings_its_traceback():
    with pytest.raises(IndexError) as error:
        list(in_order(surprise, range(4), 2))
    assert "in surprise" in "".join(error.value.__notes__)


def test_a_killed_worker_is_an_error():
    with pytest.raises(ValueError, match="every worker must live to the end"):
        list(in_order(die_at_three, range(20), 2))


def test_work_runs_ahead_only_so_far(tmp_path):
    jobs = [str(tmp_path / f"{i:03d}") for i in range(60)]
    with closing(in_order(touch, jobs, 2)) as results:
        assert next(results) == jobs[0]
        time.sleep(0.3)
        assert len(list(tmp_path.iterdir())) <= 2 * AHEAD


def test_closing_ends_what_still_runs():
    begin = time.monotonic()
    with closing(in_order(sleep, [0.0, 60.0, 60.0], 2)) as results:
        assert next(results) == 0.0
    assert time.monotonic() - begin < 30
