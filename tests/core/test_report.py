"""The run report: self-contained, escaped, complete on partial runs, with sane axes."""

import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from triptych_core.report.chart import MAX_POINTS, choose_axis, short, smooth, thin
from triptych_core.report.evaluation import interval, scores
from triptych_core.report.page import write_report

PIXEL = "data:image/png;base64,iVBORw0KGgo="


def step_record(step: int, **changed: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 6.0 / step,
        "num_targets": 100,
        "num_tokens": 4000,
        "tokens_per_second": 8000.0,
        "mfu": 0.4,
        "grad_norm": 1.0,
        "lr": 1e-4,
        "data_wait_seconds": 0.002,
        "step_seconds": 0.5,
        "peak_memory_bytes": 3 * 2**30,
        "packing_fill": 0.99,
        "time": 1.8e9 + step,
    } | changed


def evaluation(step: int, share: float, answer: str) -> dict[str, Any]:
    example = {
        "key": "a",
        "question": "which <digit>",
        "prompt": "Which & what?",
        "expected": "7",
        "answer": answer,
        "images": [PIXEL, "https://example.org/x.png", 'data:image/png;base64,"><script>'],
    }
    return {
        "step": step,
        "heldout_loss": 2.5 - share,
        "exact_match": {"which <digit>": share, "sum": share / 2},
        "majority": {"which <digit>": 0.1, "sum": 0.2},
        "counts": {"which <digit>": 300, "sum": 100},
        "examples": [example],
    }


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def make_run(run_dir: Path, steps: int = 200) -> Path:
    run_dir.mkdir(exist_ok=True)
    write_lines(run_dir / "metrics.jsonl", [step_record(s) for s in range(1, steps + 1)])
    write_lines(
        run_dir / "evaluation.jsonl", [evaluation(0, 0.05, "<b>"), evaluation(steps, 0.9, "7 ")]
    )
    facts = {
        "started": "2026-03-04T09:12:00+00:00",
        "finished": 1.8e9,
        "device": "H100",
        "world_size": 2,
        "versions": {"torch": "2.14.1"},
        "parameters": {"vision": 1234567},
        "command": "sft.py <script>alert(1)</script>",
    }
    (run_dir / "run.json").write_text(json.dumps(facts))
    (run_dir / "config.yaml").write_text("run:\n  dir: runs/x # <i>\n")
    return run_dir


class Page(HTMLParser):
    """Collects tags and addresses, and checks that tags close in order."""

    VOID = frozenset({"meta", "img", "br", "circle", "path", "line"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.stack: list[str] = []
        self.feed(text)
        assert self.stack == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag


def test_report_of_a_whole_run(tmp_path: Path) -> None:
    path = write_report(make_run(tmp_path / "digits"))
    assert path == tmp_path / "digits" / "report.html"
    text = path.read_text()
    page = Page(text)
    assert page.tags.count("svg") == 8
    assert page.addresses == [PIXEL]  # only the image that is inside the file
    for said in ("2 × H100", "vision 1,234,567", "torch 2.14.1", "2026-03-04 09:12 UTC"):
        assert said in text
    assert "which &lt;digit&gt;" in text
    assert "✓ right" in text
    assert "before: &lt;b&gt;" in text
    assert "90.0 %" in text
    assert "<script>alert" not in text
    assert "<i>" not in text
    assert page.tags.count("script") == 2


def test_hover_data_is_json_for_every_chart(tmp_path: Path) -> None:
    text = write_report(make_run(tmp_path)).read_text()
    found = re.search(r'<script type="application/json" id="charts">(.*?)</script>', text)
    assert found
    charts = json.loads(found[1])
    assert [line["name"] for line in charts[0]["lines"]] == ["each step", "smoothed", "held out"]
    for chart in charts:
        for line in chart["lines"]:
            assert len(line["steps"]) == len(line["readings"])


def test_missing_keys_nulls_and_nan_are_left_out(tmp_path: Path) -> None:
    records = [step_record(s, mfu=None, peak_memory_bytes=None) for s in (1, 2, 3)]
    records[1] |= {"loss": math.nan, "grad_norm": math.inf}
    del records[2]["lr"]
    write_lines(tmp_path / "metrics.jsonl", records)
    text = write_report(tmp_path).read_text()
    assert Page(text).tags.count("svg") == 6
    assert "Not recorded: Model FLOPs utilisation, Peak memory." in text
    assert "NaN" not in text
    assert "not finished, last step 3" in text


def test_evaluation_alone_makes_a_report(tmp_path: Path) -> None:
    write_lines(tmp_path / "evaluation.jsonl", [evaluation(10, 0.5, "3")])
    text = write_report(tmp_path).read_text()
    assert Page(text).tags.count("svg") == 1  # the held-out loss
    assert "✗ wrong" in text
    assert "Before" not in text


def test_a_killed_runs_half_line_is_skipped_and_later_lines_count(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step_record(1), step_record(2), step_record(2, lr=3)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert "last step 2" in write_report(tmp_path).read_text()


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: must be a JSON object with step"):
        write_report(tmp_path)


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must hold a metrics"):
        write_report(tmp_path)


def test_long_runs_are_thinned_and_keep_their_peaks(tmp_path: Path) -> None:
    values: list[float | None] = [1.0] * 50_000
    values[31_234], values[7] = 99.0, None
    steps, thinned = thin(range(50_000), values)
    assert len(steps) == len(thinned) <= MAX_POINTS
    assert steps == sorted(set(steps))
    assert 99.0 in thinned
    assert write_report(make_run(tmp_path, steps=12_000)).stat().st_size < 2_000_000


def test_smoothing_keeps_a_steep_start_and_skips_gaps() -> None:
    assert smooth([10.0, 1.0, 1.0, None, 1.0, 3.0], 2) == [10.0, 4.0, 3.25, 1.5, 5 / 3, 2.0]
    assert smooth([None, None], 1) == [None, None]


@pytest.mark.parametrize(
    ("values", "from_zero", "top", "labels"),
    [
        ([0.0, 1e-3], True, None, ["0", "2.5e-4", "5e-4", "7.5e-4", "1e-3"]),
        ([98.2, 99.9], False, 100.0, ["98", "98.5", "99", "99.5", "100"]),
        ([100.0, 100.0], False, 100.0, ["90", "95", "100"]),
        ([1500.0, 19_800.0], True, None, ["0", "5k", "10k", "15k", "20k"]),
        ([0.02, 6.0], False, None, ["0.01", "0.03", "0.1", "0.3", "1", "3", "10"]),
        ([0.0, 0.0], True, None, None),
        ([5.0], False, None, None),
        ([-3.0, 4.0], False, None, ["-4", "-2", "0", "2", "4"]),
    ],
)
def test_axes_have_few_round_ticks_that_cover_the_values(
    values: list[float], from_zero: bool, top: float | None, labels: list[str] | None
) -> None:
    axis, _ = choose_axis(values, from_zero, top)
    assert axis.low <= min(values)
    assert axis.high >= max(values)
    assert 2 <= len(axis.ticks) <= 8
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)
    if labels is not None:
        assert [text for _, text in axis.ticks] == labels


def test_a_rare_peak_does_not_flatten_a_curve() -> None:
    axis, notes = choose_axis([1.0, 0.0] * 100 + [500.0], True, None)
    assert axis.high < 3
    assert notes == ["1 above the axis, up to 500"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.1234567, "0.1235"), (3e-5, "3e-5"), (1234, "1.234k"), (2.5e9, "2.5G")],
)
def test_short_numbers(value: float, text: str) -> None:
    assert short(value) == text


def test_scores_over_all_questions_weigh_by_number() -> None:
    assert scores(evaluation(1, 0.8, ""))["all questions"] == pytest.approx(0.7)
    assert scores({"exact_match": {"a": 0.5}}) == {"a": 0.5}
    low, high = interval(0.5, 100)
    assert (round(low, 3), round(high, 3)) == (0.404, 0.596)
    assert interval(1.0, 10)[1] == 1.0


def test_command_line_without_torch(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "triptych_core.report.page"]
    done = subprocess.run([*command, make_run(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == str(tmp_path / "report.html")
    failed = subprocess.run([*command, tmp_path / "none"], capture_output=True, text=True)
    assert failed.returncode == 1
    assert "must hold a metrics.jsonl" in failed.stderr
    check = "import sys, triptych_core.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0


def test_scores_by_metric_and_source(tmp_path: Path) -> None:
    def scored(step: int, share: float) -> dict[str, Any]:
        line = evaluation(step, share, "seven")
        line["examples"][0] |= {"metric": "anls", "score": share}
        line["scores"] = [
            {"metric": "anls", "source": None, "score": share, "count": 400},
            {"metric": "anls", "source": "<scans>", "score": share / 2, "count": 100},
        ]
        return line

    write_lines(tmp_path / "metrics.jsonl", [step_record(1)])
    write_lines(tmp_path / "evaluation.jsonl", [scored(0, 0.1), scored(1, 0.625)])
    text = write_report(tmp_path).read_text()
    Page(text)
    assert "<th>ANLS</th>" in text
    assert "<th>– &lt;scans&gt;</th>" in text
    assert "<b>62.5 %</b>" in text and "<b>31.2 %</b>" in text and ">10.0 %<" in text
    assert "<b>ANLS 0.62</b>" in text  # neither right nor wrong
    assert "✗ wrong" not in text


def test_exact_match_alone_has_no_second_table(tmp_path: Path) -> None:
    line = evaluation(1, 0.5, "7")
    line["scores"] = [{"metric": "exact_match", "source": None, "score": 0.5, "count": 400}]
    write_lines(tmp_path / "evaluation.jsonl", [line])
    assert "<th>exact match</th>" not in write_report(tmp_path).read_text()


def test_figures_of_the_model_have_curves_of_their_own(tmp_path: Path) -> None:
    lines = [step_record(s, text_loss=1.0 / s, score_made=0.5, bad_samples=0) for s in (1, 2, 3)]
    lines[2]["eval/loss"] = 3.0
    write_lines(tmp_path / "metrics.jsonl", lines)
    (tmp_path / "run.json").write_text(json.dumps({"loss": "L1, an image; distance × 2"}))
    text = write_report(tmp_path).read_text()
    assert 'data-rest="L1, an image; …"' in text
    assert Page(text).tags.count("svg") == 8 + 2
    assert re.findall(r"<h3>(.*?)</h3>", text)[1:5] == [
        "Gradient norm",
        "Text loss",
        "Score made",
        "Learning rate",
    ]


def test_drawings_alone_are_no_evaluation(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [step_record(1)])
    drawn = {"step": 1, "heldout_loss": None, "exact_match": {}, "examples": [], "picture": PIXEL}
    write_lines(tmp_path / "evaluation.jsonl", [drawn])
    text = write_report(tmp_path).read_text()
    assert "Samples" in text and "held-out samples" not in text


def test_resumes_say_what_was_not_as_before(tmp_path: Path) -> None:
    resumes = [
        {
            "step": 133,
            "time": "2026-11-29T14:38:06+00:00",
            "world_size": [2, 2],
            "code": ["a", "a"],
        },
        {
            "step": 200,
            "time": 1.8e9,
            "world_size": [2, 4],
            "code": ["a", "b"],
            "changed": {"x": [1, 2]},
        },
    ]
    write_lines(tmp_path / "metrics.jsonl", [step_record(1)])
    (tmp_path / "run.json").write_text(json.dumps({"resumes": resumes}))
    assert (
        "after step 133, 2026-11-29 14:38 UTC; after step 200, 2027-01-15 08:00 UTC, "
        "on 4 ranks instead of 2, by other code, changed: x 1, 2"
    ) in write_report(tmp_path).read_text()
