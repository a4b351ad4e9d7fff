"""Every shipped recipe is a plan of rightly configured stages; one of three real steps runs."""

import json
import shutil

import pytest
import yaml

from tests.tiny import ROOT, make_model_dir, make_shards
from triptych_core.pipeline.command import run_command

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_dry_run_checks_every_stage_of_a_shipped_recipe(path, tmp_path, capfd):
    (tmp_path / "rows").mkdir()
    words = []
    for name, argument in (yaml.safe_load(path.read_text()).get("arguments") or {}).items():
        folder = ROOT / f"stages/configs/qwen3_{'vl_' if name == 'vision' else ''}tiny"
        given = {"model": folder, "shards": tmp_path / "rows"}.get(argument["kind"])
        words += [f"{name}={given}"] if given and "default" not in argument else []
    out = f"--dir={tmp_path / 'out'}"
    assert not run_command(["run", str(path), out, "--dry-run", *words]), capfd.readouterr().err
    told = capfd.readouterr().out
    assert told.count("waiting") == len(yaml.safe_load(path.read_text())["steps"])
    assert not (tmp_path / "out").exists()


RECIPE = """
arguments: {model: {kind: model}, rows: {kind: shards}}
steps:
  sft: {stage: stages/sft.py, ranks: 1, set: {model.init: random, <<: &all {
    model.path: "{model}", run: {steps: 2, device: cpu}, engine: {precision: fp32},
    data: {shards: ["{rows}"], seq_len: 512, num_workers: 0},
    evaluation: {shards: ["{rows}"], max_new_tokens: 2}}}}
  align: {stage: stages/align.py, ranks: 1, set: {<<: *all, model.path: "{sft.export}"}}
  average:
    run: [tools/average_checkpoints.py, "{sft.export}", "{align.export}", --output, "{dir}/model"]
    makes: {model: {kind: model}}
"""


def records(out):
    return list(json.loads((out / "state.json").read_text())["steps"].values())


def test_stages_and_a_tool_run_from_a_recipe_to_a_report(tmp_path, capfd):
    model, rows = make_model_dir(tmp_path / "model"), make_shards(tmp_path / "data", 8)
    for name in ("stages", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    recipe, out = tmp_path / "try.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    words = ["run", str(recipe), f"--dir={out}", f"model={model}", f"rows={rows}"]
    assert run_command([*words, "align.optim.ler=1"]) == 2
    assert "align.optim.ler: must be a key of optim" in capfd.readouterr().err
    assert not out.exists()
    assert not run_command(words), capfd.readouterr()
    assert [record["status"] for record in records(out)] == ["done"] * 3
    assert (out / "average/model/averaging.json").is_file()
    page = (out / "report.html").read_text()
    assert page.count('class="card chart"') == 2
    assert 'href="align/report.html"' in page
    assert "http" not in page.replace("http-equiv", "")
    assert not run_command(words)
    assert {
        record["attempts"]
        for record in json.loads((out / "state.json").read_text())["steps"].values()
    } == {1}
    shutil.rmtree(out / "align/export")
    assert not run_command(["status", str(recipe), f"--dir={out}"])
    told = capfd.readouterr().out
    assert "align    cut" in told
    assert "average  done" in told
