import gc
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import closing
from itertools import islice
from pathlib import Path

import pytest
import torch

from tests.data import works
from tests.data.packs import MODEL, write_mixture
from tests.ranks import run_ranks
from triptych_data.config import DataConfig
from triptych_data.loader import PackLoader
from triptych_data.processor import Processor
from triptych_data.workers.pool import Job, run_workers, start_server
from triptych_data.workers.server import DUMP_SIGNAL


def run(work, num_workers=1, *, prefetch=2, timeout=60.0):
    return run_workers(
        Job(work), num_workers, prefetch=prefetch, timeout=timeout, where=lambda i: f"sample {i}"
    )


@pytest.mark.parametrize("num_workers", [1, 3])
def test_items_come_in_turn_and_equal(num_workers):
    items = list(run(works.numbers, num_workers))
    assert [item["number"] for item in items] == list(range(10))
    assert [item["worker"] for item in items] == [i % num_workers for i in range(10)]
    assert len({item["pid"] for item in items} | {os.getpid()}) == num_workers + 1
    assert all(torch.equal(item["big"], torch.full((5000,), item["number"])) for item in items)


def test_a_worker_has_one_thread_and_no_file_of_its_siblings():
    (first,), (*_, last) = (list(run(works.environment, n)) for n in (1, 3))
    assert first == last
    assert first["threads"] == first["python threads"] == 1
    assert first["parallel"] == "false"


def test_workers_end_with_the_iterator():
    assert next(run(works.endless)) == 0  # now there is a server
    others = set(children(server_pid()))  # of tests before, that have not ended yet
    items = run(works.endless, 2)
    assert list(islice(items, 5)) == [0, 1, 2, 3, 4]
    pids = [pid for pid in children(server_pid()) if pid not in others]
    assert len(pids) == 2
    items.close()
    wait_until(lambda: not {*pids} & {*children(server_pid())})
    wait_until(lambda: next(run(works.endless)) == 0 and all_gone(pids))  # forgotten with requests


def test_an_iterator_that_is_garbage_ends_its_workers_whenever_it_is_collected():
    """Also in the middle of another request, of which it must not take the answer."""
    for _ in range(20):
        items = run(works.endless, 2)
        next(items)
        loop = [items]
        loop.append(loop)
        before = gc.get_threshold()
        gc.set_threshold(1)
        try:
            del items, loop
            assert next(run(works.endless)) == 0
        finally:
            gc.set_threshold(*before)
    gc.collect()
    wait_until(lambda: not children(server_pid()))


def test_workers_are_ahead_by_prefetch_only(tmp_path):
    path = tmp_path / "made"
    with closing(run(works.CountAhead(str(path)), prefetch=3)) as items:
        assert next(items) == 0
        time.sleep(0.3)
        # One was taken, two wait, and for the byte of the one taken a fourth was made and sent,
        # and the next one made before the worker looks for another byte.
        assert int(path.read_text()) == 5


def test_a_users_mistake_is_raised_as_it_is():
    with pytest.raises(ValueError, match=r"^a\.tar: must be whole, got half; restore it$"):
        list(run(works.mistaken))


def test_a_bug_comes_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in broken.*KeyError: 'a bug of ours'"):
        list(run(works.broken))


@pytest.mark.parametrize(
    ("work", "how"),
    [
        (works.dying, r"worker 0 .* by SIGKILL on sample 5; .* out of memory"),
        (works.leaving, r"worker 0 .* by exit code 7 before its first sample"),
    ],
)
def test_a_dead_worker_is_noticed_at_once(work, how):
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=how):
        list(run(work))
    assert time.monotonic() - started < 10


def test_work_that_cannot_be_loaded_is_an_error_here():
    class Local:
        pass

    with pytest.raises((AttributeError, TypeError)):  # not picklable at all
        list(run(Local()))
    with pytest.raises(ValueError, match="shards changed"):
        list(run(Unloadable()))
    assert list(islice(run(works.endless), 2)) == [0, 1]  # the server is none the worse


def test_work_is_loaded_ahead_and_forgotten_with_its_job():
    job = Job(works.Counting())
    assert next(run_jobs(job, 3)) == 3
    assert next(run_jobs(job, 5)) == 5  # loaded once: the count of loads is part of the item
    server, number = job.place()
    assert Job(works.endless).place() == (server, number + 1)
    del job
    with closing(run(works.endless)) as items:
        next(items)
        assert not server.notes
    with pytest.raises(RuntimeError, match="KeyError"):
        server.request("start", number, 0, 1, (), 2, 0, 0)


def run_jobs(job, *args):
    return run_workers(job, 1, args, prefetch=2, timeout=60, where=str)


class Unloadable:
    def __reduce__(self):
        return _refuse, ()


def _refuse():
    raise ValueError("shards changed")


def test_a_killed_server_is_no_harm_to_workers_and_is_replaced():
    server = start_server()
    with closing(run(works.endless)) as items:
        next(items)
        server._process.kill()
        wait_until(server.has_ended)
        assert next(items) == 1
        with pytest.raises(RuntimeError, match="server of data workers must live"):
            server.request("start", 0, 0, 1, (), 2)
    assert list(islice(run(works.endless), 2)) == [0, 1]
    assert start_server() is not server


def fork_and_use(rank_pids):
    assert server_pid() not in rank_pids
    return [list(islice(run(works.endless, 2), 4)), server_pid()]


def test_forked_trainers_have_servers_of_their_own():
    with closing(run(works.endless)) as items:
        next(items)
        mine = server_pid()
        (one, first), (other, second) = run_ranks(fork_and_use, 2, [mine])
        assert one == other == [0, 1, 2, 3]
        assert len({mine, first, second}) == 3
        assert next(items) == 1  # the children's ends did not touch it


def train(shards, out, err, temporary):
    """A trainer in a session of its own; forked, so that its imports are paid once."""
    os.setsid()
    os.dup2(out, 1)
    os.dup2(err, 2)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", 1, closefd=False) for fd in (1, 2))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TMPDIR"], tempfile.tempdir = str(temporary), None  # None: it is looked up anew
    config = DataConfig(shards=shards, seq_len=512, num_workers=2)
    for _ in PackLoader(config, Processor.from_directory(MODEL), rank=0, world_size=1):
        print("batch", flush=True)


@pytest.mark.parametrize("killer", ["SIGKILL", "SIGKILL of a group", "SIGINT", "SIGTERM"])
def test_a_killed_trainer_leaves_nothing_behind(tmp_path, killer):
    shards = write_mixture(tmp_path)
    temporary, said = tmp_path / "tmp", tmp_path / "stderr"
    temporary.mkdir()
    before = set(Path("/dev/shm").iterdir())
    reader, writer = os.pipe()
    with said.open("w") as err, os.fdopen(reader) as batches:
        arguments = shards, writer, err.fileno(), temporary
        context = multiprocessing.get_context("fork")
        trainer = context.Process(target=train, args=arguments, daemon=True)
        trainer.start()
        os.close(writer)
        for _ in range(2):  # the first batch comes from the trainer itself
            assert batches.readline() == "batch\n", said.read_text()
        assert len(members(trainer.pid)) == 4  # trainer, server, two workers
        if killer == "SIGKILL":  # the worst case: a worker that cannot see the end itself
            os.kill(max(members(trainer.pid)), signal.SIGSTOP)
        sent = getattr(signal, killer.split()[0])
        kill = os.kill if killer in ("SIGKILL", "SIGTERM") else os.killpg
        kill(trainer.pid, sent)
    trainer.join(20)
    wait_until(lambda: not members(trainer.pid))
    assert set(Path("/dev/shm").iterdir()) <= before
    assert list(temporary.iterdir()) == []
    words = said.read_text()
    assert words.count("Traceback") == (killer == "SIGINT"), words  # the trainer's own, no other


def server_pid():
    return start_server().pid


def children(pid):
    """The child processes of a process that have not ended."""
    pids = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    states = {p: Path(f"/proc/{p}/stat").read_text().rpartition(")")[2].split()[0] for p in pids}
    return [int(p) for p, state in states.items() if state != "Z"]


def all_gone(pids):
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


def wait_until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def members(session):
    """The living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[2]) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


assert DUMP_SIGNAL != signal.SIGINT
