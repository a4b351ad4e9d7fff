import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.data.chats import chat, make_shards, write_jsonl
from tests.data.packs import write_mixture
from triptych_data.cli.main import main
from triptych_data.config import DataConfig
from triptych_data.loader import open_sources
from triptych_data.look.forecast import Forecast, forecast, imbalance
from triptych_data.look.plot import plot
from triptych_data.look.survey import survey
from triptych_data.plan.mixing import counts_at
from triptych_data.plan.mixture import MixSource, Mixture
from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards
from triptych_data.stage_config import open_processor, read_stage

MODEL = Path(__file__).parents[2] / "stages" / "configs" / "qwen3_vl_tiny"


def write_texts(folder: Path, count: int) -> Path:
    records = [chat(answer=f"Answer number {i}.") for i in range(count)]
    folder.mkdir(parents=True)
    write_shards(write_jsonl(folder / "x.jsonl", records), folder / "shards")
    return folder / "shards"


def expected(config: DataConfig, **options: Any) -> Forecast:
    shards, sources = open_sources(config)
    return forecast(shards, sources, config, open_processor(str(MODEL), config), **options)


def run(*arguments: Any, code: int = 0) -> str:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return result.output


def test_a_survey_counts_what_is_there(tmp_path):
    make_shards(tmp_path)
    report = survey(Shards.open([tmp_path / "shards"]))
    assert (report["num_samples"], report["num_images"], report["num_videos"]) == (12, 15, 0)
    assert report["images_per_sample"] == {"0": 3, "1": 3, "2": 6}
    assert sum(report["image_side"].values()) == 15
    assert report["image_aspect_max"] == round((16 + 1) / (8 + 1), 2)


def test_a_forecast_is_what_training_gets(tmp_path):
    from tests.data.packs import tiny_config, tiny_processor
    from triptych_data.loader import PackLoader

    shards = write_mixture(tmp_path)
    config = tiny_config(shards)
    found = expected(config, ranks=2)
    loader = PackLoader(config, tiny_processor(), rank=0, world_size=1)
    fills = []
    for batch in loader:
        if batch["place"].epoch > 0:
            break
        docs = np.diff(batch["cu_seqlens"])
        fills.append(len(batch["sample_keys"]) and batch["position_ids"].shape[-1])
        assert docs.sum() == config.seq_len
    assert len(fills) == found.report["packing"]["num_packs"] == len(found.fills)
    tokens = found.report["tokens"]["total"]
    packing = found.report["packing"]
    assert packing["fill"] == round(tokens / (len(fills) * config.seq_len), 4)
    assert found.costs.mean() == pytest.approx(1) and 0 < found.fills.min() <= 1
    assert found.report["balance"]["imbalance"] >= 1


def test_a_forecast_is_as_long_as_the_data(tmp_path):
    large, small = write_texts(tmp_path / "large", 10), write_texts(tmp_path / "small", 10)
    sources = {
        "a": {"shards": [str(large)], "weight": 1},
        "b": {"shards": [str(small)], "weight": 9},
    }
    config = DataConfig(sources=sources, seq_len=128, window=64)
    packing = expected(config).report["packing"]
    assert 20 <= packing["num_packs"] * packing["samples_per_pack"] < 30, "not the whole window"


def test_imbalance_is_the_slowest_over_the_mean():
    assert imbalance(np.array([1.0, 1, 3, 3]), 2) == 1
    assert imbalance(np.array([1.0, 3, 1, 3, 9]), 2) == 1.5, "the rest is no step"
    assert imbalance(np.array([1.0]), 2) is None


def test_refused_and_long_samples_are_told_apart(tmp_path):
    from tests.data.chats import encoded_image

    (tmp_path / "slim.jpg").write_bytes(encoded_image(1, 900))
    records = [chat(image="slim.jpg"), chat(answer="word " * 300), chat(), chat()]
    write_shards(write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "shards")
    output = run("inspect", tmp_path / "shards", "--model", MODEL, "--seq-len", 64)
    assert "1 samples are longer than a pack" in output
    assert re.search(r"1 samples are refused: \S+: sample 000000000: .*200 times", output)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(tmp_path, suffix):
    shards = write_mixture(tmp_path)
    path = tmp_path / f"picture.{suffix}"
    plot(Shards.open(shards), path)
    small = path.stat().st_size
    plot(Shards.open(shards), path, expected(DataConfig(shards=shards, seq_len=512)))
    assert path.stat().st_size > small > 5000
    if suffix == "png":
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L"))
        assert pixels.shape[1] == 1430 and (pixels < 250).mean() > 0.02
    with pytest.raises(ValueError, match=r"name a \.png, \.svg or \.pdf"):
        plot(Shards.open(shards), tmp_path / "picture.xyz")


def test_a_mixture_is_told_as_the_loader_feeds_it(tmp_path):
    large, small = write_texts(tmp_path / "large", 300), write_texts(tmp_path / "small", 100)
    names = [f"large={large}", f"small={small}"]
    report = json.loads(run("mix", *names, "--json"))
    assert [row["share"] for row in report["sources"]] == [0.75, 0.25]
    assert [row["epochs"] for row in report["sources"]] == [1, 1]
    weights = ["--weight", "large=1", "--weight", "small=3"]
    report = json.loads(run("mix", *names, *weights, "--samples", 800, "--json"))
    assert [row["samples"] for row in report["sources"]] == [200, 600]
    assert [row["epochs"] for row in report["sources"]] == [0.667, 6]
    report = json.loads(run("mix", *names, *weights, "--tokens", "10k", "--model", MODEL, "--json"))
    assert report["tokens"] == pytest.approx(10_000, abs=40)
    assert sum(row["tokens"] for row in report["sources"]) == pytest.approx(report["tokens"], abs=2)
    text = run("mix", *names, *weights, "--model", MODEL)
    assert re.search(r"large +300 +25.00% +100 +0.333 +[\d,]+ +2\d.\d\d%", text)


def test_a_mixture_is_read_from_a_configuration(tmp_path):
    large, small = write_texts(tmp_path / "large", 300), write_texts(tmp_path / "small", 100)
    (tmp_path / "sft.yaml").write_text(
        f"model: {{path: x}}\ndata:\n  sources:\n    large: {{shards: [{large}], weight: 1.0}}\n"
        f"    small: {{shards: [{small}], weight: [[0, 1.0], [400, 0.0]]}}\n"
    )
    report = json.loads(run("mix", tmp_path / "sft.yaml", "--samples", 400, "--json"))
    shares = report["sources"][1]["share_over_the_run"]
    assert shares == sorted(shares, reverse=True) and shares[0] > 0.4 and shares[-1] < 0.1
    assert "share at" in run("mix", tmp_path / "sft.yaml", "--samples", 400)
    (tmp_path / "bad.yaml").write_text("data: {sources: {a: {shards: [x], wieght: 1}}}")
    with pytest.raises(ValueError, match=r"bad.yaml: data.sources.a.wieght: Extra inputs"):
        read_stage(tmp_path / "bad.yaml")


def test_a_mixture_that_ends_says_when(tmp_path):
    large, small = write_texts(tmp_path / "large", 300), write_texts(tmp_path / "small", 100)
    names = [f"large={large}", f"small={small}"]
    output = run("mix", *names, "--epochs", "large=1", "--epochs", "small=2", "--samples", 9000)
    assert "all sources are exhausted after 500 samples" in output
    assert "a run of 500 samples" in output


def test_mistakes_in_a_mixture_are_named(tmp_path):
    shards = write_texts(tmp_path / "a", 3)
    cases: dict[str, list[Any]] = {
        "must be a .yaml file or NAME=SHARDS": [shards],
        "--weight: must name one of a, got b": [f"a={shards}", "--weight", "b=1"],
        "--model: must be given to count tokens": [f"a={shards}", "--tokens", "1k"],
        "data.sources.b.weight: must be given as for a": [
            f"a={shards}", f"b={shards}", "--weight", "a=1",
        ],
        "nowhere.yaml: must be readable YAML": ["nowhere.yaml"],
    }  # fmt: skip
    for message, arguments in cases.items():
        assert message in run("mix", *arguments, code=1)
    assert "is no NAME=NUMBER" in run("mix", f"a={shards}", "--weight", "a", code=2)


def test_what_a_stage_sees_is_shown_from_its_configuration(tmp_path):
    large, small = write_texts(tmp_path / "large", 30), write_texts(tmp_path / "small", 10)
    config = (
        f"model: {{path: {MODEL}}}\ndata:\n  seq_len: 256\n  sources:\n"
        f"    large: {{shards: [{large}], repeat: 2}}\n    small: {{shards: [{small}]}}\n"
    )
    (tmp_path / "sft.yaml").write_text(config)
    report = json.loads(run("inspect", "--config", tmp_path / "sft.yaml", "--json"))
    assert (report["num_samples"], report["packing"]["seq_len"]) == (40, 256)
    only = json.loads(run("inspect", small, "--config", tmp_path / "sft.yaml", "--json"))
    assert only["num_samples"] == 10
    two_turns = {"messages": [*chat()["messages"], *chat(answer="Two.")["messages"]]}
    write_shards(write_jsonl(tmp_path / "y.jsonl", [two_turns]), tmp_path / "turns")
    for turns, trained in (("all", 2), ("last", 1)):
        (tmp_path / "sft.yaml").write_text(f"{config}  chat: {{train_turns: {turns}}}\n")
        page = tmp_path / "page.html"
        run("preview", tmp_path / "turns", "--config", tmp_path / "sft.yaml", "-o", page)
        assert page.read_text().count('class="special trained"') == trained
    assert "Missing argument 'SHARDS...'" in run("inspect", code=2)
    assert "Missing option '--model'" in run("preview", small, code=2)


def test_counts_meet_the_mixture_at_its_windows():
    sources = [MixSource("a", 1000, [(0, 0.3)]), MixSource("b", 500, [(0, 0.7)])]
    mixture = Mixture(sources, window=128)
    for window in (0, 1, 5, 100):
        position = mixture.start(window)
        assert counts_at(mixture, position).tolist() == mixture.counts(window)
    assert counts_at(mixture, 100).sum() == 100


def test_a_ledger_is_audited(tmp_path):
    pack = {"position": 0, "end": 2, "epoch": 0, "keys": ["a", "b"], "ids": [0, 1], "holes": []}
    line = {"step": 1, "position": 2, "packs": [pack]}
    (tmp_path / "rank-00000.jsonl").write_text(json.dumps(line) + "\n")
    assert "nothing lost or repeated" in run("ledger", tmp_path)
    line["packs"] = [pack, {**pack, "position": 5, "end": 7}]
    (tmp_path / "rank-00000.jsonl").write_text(json.dumps(line) + "\n")
    report = json.loads(run("ledger", tmp_path, "--json", code=1))
    assert any("lost" in problem for problem in report["problems"])
    (tmp_path / "rank-00000.jsonl").write_text('{"step": 1}\n')
    assert "must hold the lines of a run's ledger" in run("ledger", tmp_path, code=1)
