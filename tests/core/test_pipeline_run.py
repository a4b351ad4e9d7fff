"""A recipe that is run, cut, changed and run again; its commands are real processes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from triptych_core.pipeline.command import run_command

# Appends to a list of what ran, then writes its words; waits for ever if it is told to.
SCRIPT = """
import os, pathlib, subprocess, sys
out, *words = sys.argv[1:]
out = pathlib.Path(out)
out.parent.mkdir(parents=True, exist_ok=True)
with open("ran.txt", "a") as file:
    file.write(out.parent.name + "\\n")
if "fail" in words and pathlib.Path("fail").exists():
    sys.exit("no luck")
if "wait" in words and pathlib.Path("wait").exists():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print("waiting", os.getpid(), child.pid, flush=True)
    child.wait()
out.write_text(" ".join(w if not os.path.isfile(w) else pathlib.Path(w).read_text() for w in words))
"""
RECIPE = """
arguments: {word: {kind: text, default: hello}, start: {kind: file, default: start.txt}}
steps:
  one: {run: [say.py, "{dir}/out", "{word}", "{start}"], makes: {out: {kind: file}}}
  two: {run: [say.py, "{dir}/out", "{one.out}", wait], makes: {out: {kind: file}}}
  three: {run: [say.py, "{dir}/out", "{two.out}", fail], makes: {out: {kind: file}}}
  four: {run: [say.py, "{dir}/out", apart], makes: {out: {kind: file}}}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a script and a recipe, the current one."""
    (tmp_path / "say.py").write_text(SCRIPT)
    (tmp_path / "start.txt").write_text("begin")
    (tmp_path / "try.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*words):
    return run_command(["run", "try.yaml", *words])


def ran(place):
    """What has run since it was last asked."""
    path = place / "ran.txt"
    lines = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def records(place):
    return json.loads((place / "runs/try/state.json").read_text())["steps"]


def test_what_is_finished_is_skipped_and_what_is_gone_is_made_again(place, capfd):
    assert not run()
    assert ran(place) == ["one", "two", "three", "four"]
    assert (place / "runs/try/three/out").read_text() == "hello begin wait fail"
    assert not run()
    assert ran(place) == []
    (place / "runs/try/two/out").unlink()
    assert not run()
    assert ran(place) == ["two"]  # as before, so that three still stands
    assert {record["status"] for record in records(place).values()} == {"done"}
    page = (place / "runs/try/report.html").read_text()
    assert "4 of 4" in page
    capfd.readouterr()
    assert not run_command(["status", "try.yaml"])
    assert capfd.readouterr().out.count("done") == 4


def test_a_change_is_named_and_never_reused_silently(place, capfd):
    assert not run()
    ran(place)
    assert run("word=bye") == 2
    told = capfd.readouterr().err
    assert "one: run must be that of the finished step" in told
    assert "--from one" in told
    (place / "start.txt").write_text("other")
    assert run() == 2
    assert "one: {start} must be what it was made of" in capfd.readouterr().err
    (place / "start.txt").write_text("begin")
    (place / "runs/try/two/out").write_text("mended by hand")
    assert run() == 2
    assert "two/out must be what it made, got other contents" in capfd.readouterr().err
    assert ran(place) == []
    assert not run("--from", "two")
    assert ran(place) == ["two", "three"]
    assert (place / "runs/try/aside/two-1/out").read_text() == "mended by hand"
    assert (place / "runs/try/aside/three-1/out").exists()
    assert not run("word=bye", "--from", "one")
    assert ran(place) == ["one", "two", "three"]
    assert (place / "runs/try/three/out").read_text() == "bye begin wait fail"
    assert not run_command(["status", "try.yaml"])  # with the words of the last run
    assert "changed" not in capfd.readouterr().out


def test_one_step_alone_needs_what_it_reads(place, capfd):
    assert run("--only", "two") == 2
    assert "two: {one.out} must be there" in capfd.readouterr().err
    assert not run("--only", "four")
    assert not run("--only", "one")
    assert ran(place) == ["four", "one"]
    assert run("--only", "tow") == 2
    assert "did you mean 'two'" in capfd.readouterr().err
    assert not run("--only", "one", "--from", "one")
    assert ran(place) == ["one"]


def test_a_failed_step_stops_the_run_which_goes_on_later(place, capfd):
    (place / "fail").touch()
    assert run() == 1
    told = capfd.readouterr().err
    assert "three: must end with exit code 0, got 1; see " in told
    assert "no luck" in (place / "runs/try/logs/three.log").read_text()
    assert records(place)["three"]["status"] == "failed"
    (place / "fail").unlink()
    assert not run()
    assert ran(place) == ["one", "two", "three", "three", "four"]
    assert records(place)["three"]["attempts"] == 2


def start_waiting(place):
    """`triptych run` whose second step waits with a child; gives it and the two's process ids."""
    (place / "wait").touch()
    command = [sys.executable, "-m", "triptych_core.pipeline.command", "run", "try.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("waiting"):
            return process, [int(word) for word in line.split()[1:]]
    raise AssertionError("it never waited")


def is_alive(pid):
    """Whether it runs; what nobody has waited for yet is dead."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_orphan_and_the_command_goes_on(place, number):
    process, pids = start_waiting(place)
    process.send_signal(number)
    process.stdout.read()
    assert process.wait(60) == 128 + number
    assert not any(map(is_alive, pids))
    assert records(place)["two"]["status"] == "stopped"
    (place / "wait").unlink()
    assert not run()
    assert ran(place) == ["one", "two", "two", "three", "four"]


def test_a_folder_stays_locked_while_a_step_of_a_killed_run_lives(place, capfd):
    process, pids = start_waiting(place)
    assert run() == 2
    assert f"must not be in use, got a run with process id {process.pid}" in capfd.readouterr().err
    process.kill()
    process.wait()
    assert run() == 2
    os.killpg(pids[0], signal.SIGKILL)
    while is_alive(pids[0]):
        time.sleep(0.01)
    (place / "wait").unlink()
    assert not run()
    assert ran(place) == ["one", "two", "two", "three", "four"]


def test_a_dry_run_writes_nothing(place, capfd):
    assert not run("--dry-run")
    assert "from one" in capfd.readouterr().out
    assert not (place / "runs").exists()
