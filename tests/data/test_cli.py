import base64
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from tests.data.chats import chat, encoded_image, make_shards, write_chats, write_jsonl
from triptych_data.cli.main import main
from triptych_data.look.survey import survey
from triptych_data.shards.index import index_paths
from triptych_data.shards.reader import Shards

MODEL = Path(__file__).parents[2] / "stages" / "configs" / "qwen3_vl_tiny"


def run(*arguments: Any, code: int = 0) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result


def read_json(*arguments: Any) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def test_shard_then_index_then_inspect(tmp_path):
    folder = tmp_path / "shards"
    written = read_json("shard", write_chats(tmp_path), folder, "--samples-per-shard", 5)
    assert written["shards"] == [str(path) for path in sorted(folder.glob("*.tar"))]
    assert (written["num_samples"], written["num_images"]) == (12, 15)
    verified = read_json("index", folder)
    assert [entry["status"] for entry in verified] == ["verified"] * 3
    assert [entry["num_samples"] for entry in verified] == [5, 5, 2]
    report = read_json("inspect", folder)
    assert report == survey(Shards.open([folder]))
    assert report["images_per_sample"] == {"0": 3, "1": 3, "2": 6}
    assert report["text_bytes"]["total"] == written["text_bytes"]
    assert report["tar_bytes"] == written["tar_bytes"]
    assert report["image_side"]["0-128"] == 15


def test_text_for_people(tmp_path):
    folder = tmp_path / "shards"
    source = write_chats(tmp_path)
    with source.open("a") as file:
        file.write("{\n")
    result = run("shard", source, folder, "--skip-bad", "--shuffle", "--workers", 1)
    assert re.search(r"12 samples with 15 images: 1 shards, [\d.]+ kB in ", result.stdout)
    assert "1 bad records left out" in result.stdout
    assert "1 × must be valid JSON in UTF-8" in result.stdout
    assert f"skipped {source}:13: must be valid JSON" in result.stderr
    text = run("inspect", folder).stdout
    assert "12 samples, 15 images: 1 shards" in text and "████" in text


def test_shuffle_follows_its_seed(tmp_path):
    source = write_chats(tmp_path)
    for name, options in {"a": ["--seed", "1"], "b": ["--seed", "1"], "c": []}.items():
        run("shard", source, tmp_path / name, "--shuffle", *options)
    data = [(tmp_path / name / "shard-000000.tar").read_bytes() for name in "abc"]
    assert data[0] == data[1] != data[2]


@pytest.mark.parametrize(
    ("text", "size"), [("9kB", 9000), ("8.2KiB", 8396), ("9000", 9000), ("9000b", 9000)]
)
def test_sizes_have_units(tmp_path, text, size):
    run("shard", write_chats(tmp_path, 20), tmp_path / "shards", "--shard-size", text)
    sizes = [path.stat().st_size for path in (tmp_path / "shards").glob("*.tar")]
    assert len(sizes) > 1 and max(sizes) <= size


@pytest.mark.parametrize("text", ["big", "1.2.3MB", "MB", ".", "-1", "1TB"])
def test_sizes_that_are_none_are_refused(tmp_path, text):
    result = run("shard", "x.jsonl", tmp_path, f"--shard-size={text}", code=2)
    assert "is no size such as 256MB" in result.stderr


def test_index_builds_verifies_and_replaces_only_when_told(tmp_path):
    shard = make_shards(tmp_path, count=4).shards[0]
    for path in index_paths(shard):
        path.unlink()
    assert read_json("index", shard)[0]["status"] == "written"
    data = bytearray(shard.read_bytes())
    data[data.index(b"Nothing")] ^= 1  # valid JSON still: only the index can tell
    shard.write_bytes(data)
    result = run("index", shard, code=1)
    assert "the shard must be as it was indexed, got other bytes" in result.stderr
    assert read_json("index", "--overwrite", shard)[0]["status"] == "written"
    assert read_json("index", shard)[0]["status"] == "verified"


def test_index_uses_processes_and_reports_the_damaged_shard(tmp_path):
    shards = make_shards(tmp_path).shards
    assert len(read_json("index", *shards, "--workers", 2)) == 3
    os.truncate(shards[1], 2048)
    for path in index_paths(shards[1]):
        path.unlink()
    result = run("index", tmp_path / "shards", "--workers", 2, code=1)
    assert "shard-000001.tar: byte" in result.stderr


def test_verify_names_the_damaged_sample(tmp_path):
    shards = make_shards(tmp_path).shards
    assert read_json("verify", tmp_path / "shards", "--workers", 1)["ok"]
    data = bytearray(shards[1].read_bytes())
    data[700] ^= 4
    shards[1].write_bytes(data)
    report = json.loads(run("verify", tmp_path / "shards", "--json", code=1).stdout)
    [problem] = report["problems"]
    assert (problem["kind"], problem["samples"]) == ("flipped", ["000000005"])
    assert "flipped: " in run("verify", tmp_path / "shards", code=1).stdout


def test_errors_are_one_line_and_code_1(tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [chat(), {"messages": []}])
    make_shards(tmp_path)
    cases = {
        "bad.jsonl:2: messages must be": ["shard", bad, tmp_path / "out"],
        "the output folder must be empty": ["shard", bad, tmp_path / "shards"],
        "the input must be a file, a folder or a glob": [
            "shard",
            tmp_path / "none.jsonl",
            tmp_path / "out",
        ],
        "must be a shard": ["inspect", tmp_path / "nowhere"],
        "--model and --seq-len must come together": ["inspect", tmp_path / "shards", "--model=x"],
        "nowhere/tokenizer.json": ["preview", tmp_path / "shards", "--model=nowhere"],
    }
    for message, arguments in cases.items():
        result = run(*arguments, code=1)
        assert message in result.stderr
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1
        assert result.stdout == ""


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_has_an_example(command):
    assert re.search(rf"Example:\n +triptych-data {command} ", run(command, "--help").stdout)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_prints_json(command):
    assert "--json" in run(command, "--help").stdout


def test_typos_are_told_from_what_was_meant(tmp_path):
    source = write_chats(tmp_path)
    cases = {
        "Did you mean 'shard'?": ["shart", source],
        "--shuffle": ["shard", source, tmp_path / "out", "--shufle"],
        f"did you mean {source}?": ["shard", tmp_path / "chat.jsonl", tmp_path / "out"],
        "is no number such as 1000": ["shard", source, tmp_path / "out", "--max-bad", "x%"],
    }
    for message, arguments in cases.items():
        result = CliRunner().invoke(main, [str(argument) for argument in arguments])
        assert result.exit_code in (1, 2) and message in result.stderr
        assert "Traceback" not in result.stderr and result.stdout == ""
        assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1


def test_inspect_forecasts_tokens_and_packs(tmp_path):
    make_shards(tmp_path)
    options = ["--model", MODEL, "--seq-len", 128]
    report = read_json("inspect", tmp_path / "shards", *options)
    packing, tokens = report["packing"], report["tokens"]
    assert packing["fill"] == round(tokens["total"] / (128 * packing["num_packs"]), 4)
    assert 0 < report["targets"]["total"] < tokens["total"]
    assert packing["too_long"] == 0
    assert "packs of 128 tokens" in run("inspect", tmp_path / "shards", *options).stdout
    assert read_json("inspect", tmp_path / "shards", *options[:3], 40)["packing"]["too_long"] > 0


def test_preview_shows_what_is_trained_and_escapes_the_rest(tmp_path):
    (tmp_path / "wide.jpg").write_bytes(encoded_image(1700, 20))
    (tmp_path / "slim.jpg").write_bytes(encoded_image(1, 900))
    question = "<script>alert(1)</script> <|im_end|>"
    records = [
        chat(image="wide.jpg", answer="Größe 👍<b>") | {"note": "<i>kept</i>"},
        {
            "messages": [
                {"role": "user", "content": question},
                {"role": "assistant", "content": "No."},
            ]
        },
        chat(image="slim.jpg"),
    ]
    run("shard", write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "shards")
    page = tmp_path / "page.html"
    run("preview", tmp_path / "shards", "--model", MODEL, "-n", 9, "-o", page)
    html = page.read_text()
    spans = re.findall(r'<span class="([^"]+)" title="[^"]+">(.*?)</span>', html, re.DOTALL)
    trained = "".join(text for kinds, text in spans if "trained" in kinds.split())
    assert trained == "Größe 👍&lt;b&gt;&lt;|im_end|&gt;No.&lt;|im_end|&gt;"
    ignored = "".join(text for kinds, text in spans if kinds == "ignored")
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &lt;|im_end|&gt;" in ignored
    [script] = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{allowed}'" in html and "alert" not in script
    assert html.count("<script") == 1 and "<i>kept" not in html and "&lt;i&gt;kept" in html
    assert any(re.fullmatch(r"&lt;\|image_pad\|&gt; × \d+", text) for _, text in spans)
    assert html.count("data:image/jpeg;base64,") == 2
    assert "1700 × 20 px" in html
    assert "must be at most 200 times the shorter" in html, "a refused sample says why"
    assert not re.search(r"https?://", html)


def test_a_real_process_starts_without_torch(tmp_path):
    """`--help` and the commands that need no model must not load torch or transformers."""
    source = write_chats(tmp_path, count=4)
    code = f"""
import sys
from triptych_data.cli.main import main
for arguments in (["--help"], ["shard", {str(source)!r}, "s"], ["index", "s"], ["inspect", "s"]):
    main(arguments, standalone_mode=False)
    light = arguments == ["--help"]
    heavy = {{"torch", "transformers"}} | ({{"numpy", "PIL", "rich"}} if light else set())
    assert not heavy & set(sys.modules), (arguments, heavy & set(sys.modules))
"""
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    command = [Path(sys.executable).parent / "triptych-data", "shard", "nowhere.jsonl", "x"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("Error: nowhere.jsonl: ") and "Traceback" not in result.stderr


def write_slow_input(folder: Path) -> Path:
    """Photos that take long enough to decode for a signal to fall in the middle."""
    rng = np.random.default_rng(0)
    for i in range(8):
        noise = rng.integers(0, 256, (700, 700, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg", quality=95)
    records = [chat(image=f"{i % 8}.jpg", answer=f"Noise {i}.") for i in range(160)]
    return write_jsonl(folder / "slow.jsonl", records)


def start_shard(source: Path, output: Path) -> subprocess.Popen[str]:
    command = [Path(sys.executable).parent / "triptych-data", "shard", source, output]
    options = ["--samples-per-shard", "5", "--workers", "2", "--shuffle"]
    return subprocess.Popen(
        [*command, *options],
        text=True,
        stderr=subprocess.PIPE,
        # Whatever runs the tests in the background may have had Ctrl-C ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def bytes_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def test_killed_runs_leave_nothing_half_and_no_process_and_go_on(tmp_path):
    """Killed in each pass, then run to its end: byte for byte what an undisturbed run writes."""
    source, out = write_slow_input(tmp_path), tmp_path / "out"
    whole = ["--samples-per-shard", 5, "--shuffle", "--workers", 1]
    run("shard", source, tmp_path / "whole", *whole)
    for progressed in (
        lambda: bytes_of(out / ".partial/checked") > 0,
        lambda: (out / ".partial/shards/shard-000004.tar.idx").exists(),
    ):
        process = start_shard(source, out)
        await_that(progressed)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert [path.name for path in out.iterdir()] == [".partial"]
        assert len(children) >= 2
        await_that(lambda pids=children: not any(map(is_running, pids)))
    report = read_json("shard", source, out, *whole)
    # Of the five up to number 4, the other worker's may not have been whole yet.
    assert report["kept_records"] == 160 and report["kept_shards"] >= 4
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()
    }


def test_ctrl_c_says_what_is_kept(tmp_path):
    source, out = write_slow_input(tmp_path), tmp_path / "out"
    process = start_shard(source, out)
    await_that(lambda: (out / ".partial/shards/shard-000004.tar.idx").exists())
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert re.fullmatch(
        rf"Interrupted: \d+ finished shards are kept in {out}/.partial; the same command goes on "
        r"from there\n",
        errors,
    )


def await_that(happens: Any) -> None:
    deadline = time.monotonic() + 60
    while not happens():
        assert time.monotonic() < deadline, "waited for a minute"
        time.sleep(0.02)


def is_running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
