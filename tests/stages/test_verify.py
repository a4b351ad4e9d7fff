"""`--verify`: what is right passes, and each check turns red when what it looks at is broken."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from tests.ranks import run_ranks
from tests.tiny import make_model_dir, make_shards, sft_stage


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("verify")
    make_model_dir(path / "model")
    make_shards(path / "train", 40)
    return path


def config_for(workspace: Path, run_dir: Path, *more: str) -> Any:
    from triptych_core.config import load_config

    words = [
        *(f"run.dir={run_dir}", "run.device=cpu", "optim.ema_decay=0.9"),
        *(f"model.path={workspace / 'model'}", "model.init=random"),
        *(f"data.shards=[{workspace / 'train/shards'}]", "data.seq_len=256", "data.num_workers=0"),
        *("engine.precision=fp32", "engine.zero.stage=3", "verify.samples=3"),
        *("engine.gradient_accumulation_steps=2", "verify.only=true"),
    ]
    return load_config(sft_stage().SftConfig, None, [*words, *more])


def verified(workspace: Path) -> int:
    """`stages/sft.py --verify` in this process; its exit status."""
    try:
        sft_stage().main(config_for(workspace, workspace / "run"))
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_a_sound_configuration_passes_and_says_so(workspace, capfd):
    (workspace / "run/checkpoints/step-000001").mkdir(parents=True)  # the run's own stay
    assert run_ranks(verified, 2, workspace) == [0, 0]
    checks = json.loads((workspace / "run/verify.json").read_text())
    assert [check["status"] for check in checks] == ["pass"] * 6
    assert "bit-equal" in checks[4]["found"]
    said = capfd.readouterr().out
    assert all(f"PASS  {check['name']}: {check['found']}" in said for check in checks)
    page = (workspace / "run/verify.html").read_text()
    assert "All checks passed" in page and page.count("<article class=&quot;") == 0
    assert page.count('<article class="pass">') == 6 and "http" not in page.split("<iframe")[0]
    assert "&lt;article" in page.split("<iframe")[1]  # the samples, in their frame
    left = sorted(path.name for path in (workspace / "run").iterdir())
    assert left == ["checkpoints", "verify.html", "verify.json"]


def broken(workspace: Path) -> dict[str, Any]:
    """Each check while what it looks at is broken on this rank: status, and what was found."""
    from contextlib import ExitStack

    sys.path.insert(0, str(Path(sft_stage().__file__).parent))
    import planning
    import verifying
    import wiring

    folder = workspace / "broken"
    config, runtime, _ = planning.begin(config_for(workspace, folder))
    if runtime.is_main:
        (folder / "whole").mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    job = wiring.build_job(verifying.short_run(config, folder / "whole"), runtime)
    rows = verifying.first_rows(job)
    found = {"targets": verifying.check_targets(job, [masked(row) for row in rows])}
    faults = {
        "documents": (verifying.check_documents, leaking_attention()),
        "packing": (verifying.check_packing, running_positions(job)),
        "stock": (verifying.check_stock, other_norm(job)),
    }
    for name, (check, fault) in faults.items():
        more = {"folder": folder / "export"} if name == "stock" else {}
        with ExitStack() as stack:
            stack.enter_context(fault)
            found[name] = check(job, rows, **more)
        assert check(job, rows, **more).status == "pass", name
    verifying.take_steps(job, runtime)
    with forgotten_moments():
        found["resume"] = verifying.rehearse_resume(config, runtime, folder)
    with patch.object(verifying, "PackLoader", lambda *a, **k: job.batches):
        job.batches.position = 0
        found["ranks"] = verifying.check_ranks(config, runtime, folder)
    return {name: (check.status, check.found) for name, check in found.items()}


def masked(row: Any) -> Any:
    """The row, with documents that have no target."""
    return row._replace(alone=[alone | {"num_targets": 0} for alone in row.alone])


def leaking_attention() -> Any:
    """Attention for which a row is one document."""
    import triptych_models.attention as module

    sound = module.attention

    def leaky(q: Any, k: Any, v: Any, cu_seqlens: Any, max_seqlen: int, **more: Any) -> Any:
        whole = cu_seqlens[[0, -1]]
        return sound(q, k, v, whole, int(whole[-1]), **more)

    return patch.object(module, "attention", leaky)


def running_positions(job: Any) -> Any:
    """Positions that do not begin anew with a document, and what was alone goes on from 100."""
    sound = job.part

    def shifted(batch: dict[str, Any]) -> dict[str, Any]:
        tokens = batch["input_ids"].shape[-1]
        row = torch.arange(tokens).expand_as(batch["position_ids"]) ** 2 // 7
        many = len(batch["sample_keys"]) > 1
        return sound(batch) | ({"position_ids": row} if many else {})

    return patch.dict(job.__dict__, {"part": shifted})


def other_norm(job: Any) -> Any:
    """A final norm with another epsilon than the model's configuration says."""
    norm = job.model.hf.model.language_model.norm
    name = next(key for key in ("eps", "variance_epsilon") if hasattr(norm, key))
    return patch.object(norm, name, 0.05)


def forgotten_moments() -> Any:
    """A resume that loads weights but begins with fresh second moments."""
    import triptych_core.checkpoint.payload as module

    sound = module.Payloads.fill

    def fill(self: Any, target: Any) -> None:
        sound(self, target)
        if target.kind == "exp_avg_sq":
            target.tensor.zero_()

    return patch.object(module.Payloads, "fill", fill)


def test_each_check_turns_red_when_what_it_looks_at_is_broken(workspace):
    for found in run_ranks(broken, 2, workspace):
        assert found.keys() == {"targets", "documents", "packing", "stock", "resume", "ranks"}
        for name, (status, what) in found.items():
            assert status == "fail", f"{name}: {what}"
