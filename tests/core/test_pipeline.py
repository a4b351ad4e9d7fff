"""Recipes: what is refused before anything runs, and how contents are told apart."""

import os

import pytest

from triptych_core.pipeline.contents import STRETCH, WHOLE_BYTES, fingerprint, is_complete
from triptych_core.pipeline.plan import make_plan

SCRIPTS = ("make.py", "stage.py")
MAKE = "{run: [make.py, '{dir}'], makes: {model: {kind: model}, rows: {kind: shards}}}"


@pytest.fixture
def recipe(tmp_path):
    """Write a recipe of these lines beside two scripts; gives its path."""

    def write(text):
        for name in SCRIPTS:
            (tmp_path / name).write_text("")
        (tmp_path / "recipes").mkdir(exist_ok=True)
        path = tmp_path / "recipes" / "try.yaml"
        path.write_text(text)
        return path

    return write


def refused(path, *words):
    with pytest.raises(ValueError) as error:
        make_plan(path, words, path.parent / "out")
    return str(error.value)


def steps(*lines):
    return "steps:\n" + "".join(f"  {line}\n" for line in lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (steps("a: {stge: stage.py}"), "steps.a.stge: must be a key of steps.a, got 'stge'; did "),
        (steps("a: {stage: stage.py, run: [make.py]}"), "steps.a.stage: must be given, or run"),
        (steps("a: {about: nothing}"), "got neither"),
        (steps("a: {run: [make.py], set: {x: 1}}"), "steps.a.set: must go with a stage"),
        (steps("a: {stage: stage.py, makes: {x: {kind: file}}}"), "steps.a.makes: must be left"),
        (steps("a: {stage: stage.py, ranks: 0}"), "steps.a.ranks: must be at least 1"),
        (steps("a: {run: [make.py]}", "a: {run: [make.py]}"), "steps.a: must stand once"),
        (steps("A: {run: [make.py]}"), "steps.A"),
        (steps("dir: {run: [make.py]}"), "dir: must be a name of its own"),
        (steps("a: {stage: staeg.py}"), "must name files below its folder or one above it"),
        ("steps: {}", "steps"),
        (steps("a: {stage: stage.py, set: {x.y: 1, x: {y: 2}}}"), "steps.a.set.x.y: must stand"),
        ("steps: [", "must be YAML"),
        (
            steps(f"make: {MAKE}", "a: {stage: stage.py, set: {model.path: '{mak.model}'}}"),
            "steps.a: {mak.model} must be of a step, got 'mak'; did you mean 'make'?",
        ),
        (
            steps(f"make: {MAKE}", "a: {stage: stage.py, set: {model.path: '{make.modle}'}}"),
            "must be an output of make, got 'modle'; did you mean 'model'?",
        ),
        (
            steps(f"make: {MAKE}", "a: {stage: stage.py, set: {model.path: '{make}'}}"),
            "must name an output, got the step alone",
        ),
        (
            steps("a: {stage: stage.py, set: {x: '{langage}'}}"),
            "steps.a: {langage} must be an argument, got 'langage'",
        ),
        (
            steps("a: {stage: stage.py, set: {model.path: '{make.model}'}}", f"make: {MAKE}"),
            "must be of an earlier step, got make, which comes later; move it up",
        ),
        (
            steps(
                "a: {stage: stage.py, set: {model.path: '{b.export}'}}",
                "b: {stage: stage.py, set: {model.path: '{a.export}'}}",
            ),
            "steps: must not start from each other, got ",
        ),
        (
            steps(f"make: {MAKE}", "a: {stage: stage.py, set: {data.shards: ['{make.model}']}}"),
            "steps.a.set.data.shards: must be shards, got {make.model}, which is model",
        ),
        (
            steps(f"make: {MAKE}", "a: {stage: stage.py, set: {model: {path: '{make.rows}'}}}"),
            "steps.a.set.model.path: must be model, got {make.rows}, which is shards",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_runs(recipe, text, message):
    assert message in refused(recipe(text))


ARGUMENTS = """
arguments:
  language: {kind: model, about: a Qwen3}
  ranks: {kind: number, default: 2}
  rows: {kind: shards, default: "s3://bucket/{00..09}.tar"}
steps:
  make: {run: [make.py]}
  a:
    stage: stage.py
    ranks: "{ranks}"
    set: {model.path: "{language}", data: {shards: ["{rows}"], seq_len: 8}}
"""


def test_arguments_are_typed_and_words_are_checked(recipe, tmp_path):
    path = recipe(ARGUMENTS)
    assert "language: must be given (a Qwen3), got nothing; add language=…" in refused(path)
    assert "language: must be a local Hugging Face directory" in refused(path, f"language={path}")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = f"language={model}"
    assert "ranks: must be a number, got 'two'" in refused(path, given, "ranks=two")
    assert "ranks: must be a number of processes, got 0" in refused(path, given, "ranks=0")
    assert "did you mean 'language'" in refused(path, "langauge=x")
    assert "did you mean 'a.'" in refused(path, given, "aa.optim.lr=1")
    assert "must be a key of a stage, got make, which is a command" in refused(path, "make.x=1")
    step = make_plan(path, [given, "a.data.seq_len=16"], tmp_path / "out").steps["a"]
    assert step.ranks == 2
    assert step.inputs == {"{language}": model}
    assert step.given == {
        "stage": "stage.py",
        "model.path": "{language}",  # by its contents, wherever it stands
        "data.shards": ["s3://bucket/{00..09}.tar"],
        "data.seq_len": 16,
        "ranks": 2,
    }
    assert step.words[1:] == [
        f"model.path={model}",
        "data.shards=['s3://bucket/{00..09}.tar']",
        "data.seq_len=8",
        "data.seq_len=16",
        f"run.dir={tmp_path / 'out' / 'a'}",
    ]


def test_references_become_paths_and_an_order(recipe, tmp_path):
    text = steps(
        f"make: {MAKE}",
        "a: {stage: stage.py, set: {model.path: '{make.model}'}}",
        "b: {stage: stage.py, set: {model.path: '{a.export}'}}",
        "c: {run: [make.py, 'from={make.rows}/0.tar']}",
    )
    plan = make_plan(recipe(text), [], tmp_path / "out")
    assert plan.root == tmp_path
    assert plan.steps["b"].words[1] == f"model.path={tmp_path / 'out/a/export'}"
    assert plan.steps["c"].words[1] == f"from={tmp_path / 'out/make/rows'}/0.tar"
    assert plan.steps["c"].starts_from == ("make",)
    assert plan.after("a") == ["a", "b"]
    assert plan.after("make") == ["make", "a", "b", "c"]
    assert plan.needed["make"] == {"model", "rows"}


def test_a_fingerprint_tells_contents_and_names_but_no_times(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    size = 3 * WHOLE_BYTES
    big = folder / "model.safetensors"
    big.write_bytes(bytes(size))
    (folder / "config.json").write_text("{}")
    before = fingerprint(folder)
    os.utime(big, (1, 1))
    (folder / ".notes").write_text("of some tool")
    assert fingerprint(folder) == before
    for place in (0, STRETCH - 1, size - 1):
        with big.open("r+b") as file:
            file.seek(place)
            file.write(b"x")
        assert fingerprint(folder) != before
        with big.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert fingerprint(folder) == before
    (folder / "config.json").rename(folder / "other.json")
    assert fingerprint(folder) != before


def test_a_model_is_whole_when_all_its_files_are_there(tmp_path):
    assert not is_complete("model", tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert not is_complete("model", tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}')
    (tmp_path / "1.safetensors").write_text("")
    assert not is_complete("model", tmp_path)
    (tmp_path / "2.safetensors").write_text("")
    assert is_complete("model", tmp_path)
    (tmp_path / "run.json").write_text('{"finished": null}')
    assert not is_complete("run", tmp_path)
    (tmp_path / "run.json").write_text('{"finished": "now"}')
    assert is_complete("run", tmp_path)
