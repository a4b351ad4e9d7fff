"""search_resolution.py: chosen on dev alone, reported on test, and each point run once."""

import json
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tests.ranks import run_ranks
from tests.tiny import ROOT, make_chats, make_model_dir

sys.path.insert(0, str(ROOT / "tools"))
from search_plot import draw_search
from search_resolution import OWN, Point, choose, command, grid, paired_difference
from split_samples import check_disjoint

GRID = ["--min-pixels=256,1024", "--max-pixels=512,4096"]


def split(path: Path, count: int, seed: int, prompt: str) -> Path:
    """Shards of ragged chats, each asking `prompt`."""
    from triptych_data.shards.write import write_shards

    chats = make_chats(path / "raw", count, seed)
    chats.write_text(chats.read_text().replace("What is it?", prompt))
    write_shards(chats, path / "shards", samples_per_shard=4)
    return path / "shards"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with random weights, dev and test."""
    import torch

    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    path = tmp_path_factory.mktemp("search")
    small = make_model_dir(path / "small")
    built = build_model(ModelConfig(path=small, init="random"), dtype=torch.float32)
    export(built.hf, path / "model", small, dtype=torch.float32)
    split(path / "dev", 8, 1, "What is it?")
    split(path / "test", 7, 2, "What do you see?")
    return path


def words(place: Path, out: str = "out", *more: str) -> list[str]:
    return [
        *(str(place / "model"), str(place / out), "--dev", str(place / "dev/shards")),
        *("--test", str(place / "test/shards"), *GRID, "--device=cpu", "--max-new-tokens=2", *more),
    ]


def run_commands(*many: list[str]) -> list[str]:
    """Searches one after the other in one process; their errors."""
    errors = []
    for each in many:
        try:
            command.main(each, standalone_mode=False)
            errors.append("")
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.fixture(scope="module")
def out(place: Path) -> Path:
    """A finished search by loss, on two ranks."""
    assert run_ranks(run_commands, 2, words(place, "out", "--choose-by=loss")) == [[""], [""]]
    return place / "out"


def test_the_best_on_dev_is_reported_on_test(out: Path) -> None:
    found = json.loads((out / "resolution.json").read_text())
    names = [each["point"] for each in found["dev"]]
    assert names == ["own", "256-512", "256-4096", "1024-4096"]
    losses = {each["point"]: each["loss"] for each in found["dev"]}
    best = found["chosen"]["point"]
    assert losses[best] == min(losses.values()) < max(losses.values())
    assert found["test"]["chosen"]["point"] == best
    points = {path.name for path in (out / "points").iterdir()}
    tested = {"test-own.json", f"test-{best}.json"}
    assert points == {f"dev-{name}.json" for name in names} | tested
    # Nothing was seen of test before the choice.
    times = {name: (out / "points" / name).stat().st_mtime_ns for name in points}
    assert min(times[name] for name in tested) > max(times[name] for name in points - tested)
    assert found["test"]["own"]["cost"]["questions"] == 7
    costs = {each["point"]: each["cost"] for each in found["dev"]}
    assert costs["256-512"]["image_tokens"] < costs["1024-4096"]["image_tokens"]
    assert costs["256-512"]["flops"] < costs["1024-4096"]["flops"]


def test_finished_points_are_not_run_again(place: Path, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (out / "points").iterdir()}
    # Were it run again, its score would not be this.
    kept = out / "points/dev-1024-4096.json"
    result = json.loads(kept.read_text())
    assert result["score"] < 0.9
    kept.write_text(json.dumps(result | {"score": 0.9}))
    before[kept] = kept.stat().st_mtime_ns
    wider = [word.replace("512,", "512,2048,") for word in words(place)]
    other = words(place, "out", "--max-new-tokens=3")
    odd = words(place, "out", "--max-pixels=10,2048", "--min-pixels=4")
    errors = run_ranks(run_commands, 1, words(place), wider, other, odd)[0]
    assert errors[:2] == ["", ""]
    assert "max_new_tokens must be that of the points finished there (2), got 3" in errors[2]
    assert "one token's 256 pixels" in errors[3]
    assert json.loads((out / "resolution.json").read_text())["chosen"]["point"] == "1024-4096"
    for path, time in before.items():
        assert path.stat().st_mtime_ns == time, path
    added = {path.name for path in (out / "points").iterdir()} - {path.name for path in before}
    assert {"dev-256-2048.json", "dev-1024-2048.json"} <= added
    assert added - {"test-1024-4096.json"} == {"dev-256-2048.json", "dev-1024-2048.json"}
    whole = kept.read_text()
    kept.write_text(whole[:100])
    assert "dev-1024-4096.json: must be JSON" in run_ranks(run_commands, 1, words(place))[0][0]
    kept.write_text(whole)


def test_splits_that_share_a_sample_are_refused(place: Path, tmp_path: Path) -> None:
    dev, test = str(place / "dev/shards"), str(place / "test/shards")
    check_disjoint([dev], [test])  # though both begin at the same key
    with pytest.raises(ValueError, match=r"--test: must hold no shard of --dev, got .*dev.*"):
        check_disjoint([dev], [test, f"{dev}/shard-000001.tar"])
    # One sample of dev among others, with another key and another field.
    from triptych_data.shards.write import write_shards

    raw = place / "dev/raw/chats.jsonl"
    line = json.loads(raw.read_text().splitlines()[5]) | {"split": "test"}
    fresh = {
        "messages": [{"role": "user", "content": "New"}, {"role": "assistant", "content": "n"}]
    }
    chats = raw.with_name("copied.jsonl")
    chats.write_text(json.dumps(fresh) + "\n" + json.dumps(line) + "\n")
    write_shards(chats, tmp_path / "copied")
    with pytest.raises(
        ValueError, match=r"share no sample .* got 1 shared, .*000000001.*000000005"
    ):
        check_disjoint([dev], [str(tmp_path / "copied")])


def a_result(score: float, loss: float, flops: float) -> dict[str, Any]:
    return {"score": score, "loss": loss, "cost": {"flops": flops}}


def test_ties_go_to_the_cheaper_point() -> None:
    results = {
        OWN: a_result(0.5, 1.0, 9.0),
        Point(1, 4): a_result(0.7, 2.0, 3.0),
        Point(1, 8): a_result(0.7, 2.5, 2.0),
    }
    assert choose(results, "score") == Point(1, 8)
    assert choose(results, "loss") == OWN


def test_paired_difference() -> None:
    new, old = ({"answers": [{"score": s} for s in row]} for row in ([1, 1, 0, 1], [0, 1, 0, 0]))
    middle, margin = paired_difference(new, old)
    assert middle == 0.5
    assert margin == pytest.approx(1.96 * (1 / 3) ** 0.5 / 2)


def test_grid_and_mistakes(place: Path) -> None:
    assert grid([1, 5], [4, 8]) == [OWN, Point(1, 4), Point(1, 8), Point(5, 8)]
    with pytest.raises(ValueError, match=r"--min-pixels: must hold one that is at most"):
        grid([9], [8])
    assert CliRunner().invoke(command, ["--help"]).exit_code == 0
    typo = CliRunner().invoke(command, [*words(place), "--max-pixel=1"])
    assert typo.exit_code == 2 and "--max-pixels" in typo.output
    number = CliRunner().invoke(command, [*words(place), "--max-pixels=4,x"])
    assert number.exit_code == 2 and "must be numbers of pixels" in number.output


def test_the_plot_shows_every_point_within_its_frame(out: Path) -> None:
    found = json.loads((out / "resolution.json").read_text())
    for name, flops, score in (("a", 1e9, 0.2), ("b", 5e12, 1.0)):
        point = dict(found["dev"][1]) | {"point": name, "score": score}
        point["cost"] = dict(point["cost"]) | {"flops": flops}
        found["dev"].append(point)
    root = ElementTree.fromstring(draw_search(found))
    width, height = map(float, root.attrib["viewBox"].split()[2:])
    circles = [element for element in root.iter() if element.tag.endswith("circle")]
    for circle in circles:
        assert 0 < float(circle.attrib["cx"]) < width
        assert 0 < float(circle.attrib["cy"]) < height
    assert sum(len(circle) for circle in circles) == len(found["dev"])  # each has its title
    assert sum(circle.attrib["r"] == "9" for circle in circles) == 1
    assert (out / "resolution.svg").read_text().startswith("<svg")


def test_labels_of_points_at_one_place_are_one_text(out: Path) -> None:
    found = json.loads((out / "resolution.json").read_text())
    twin = dict(found["dev"][1]) | {"point": "twin", "max_pixels": 7_000_000}
    found["dev"].append(twin)
    texts = [
        e for e in ElementTree.fromstring(draw_search(found)).iter() if e.get("class") == "small"
    ]
    places = [(float(text.attrib["x"]), float(text.attrib["y"])) for text in texts]
    assert all(
        abs(a - x) >= 10 or abs(b - y) >= 10
        for i, (a, b) in enumerate(places)
        for x, y in places[:i]
    )
    assert any("7M" in text.text and "," in text.text for text in texts)
