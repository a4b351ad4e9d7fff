"""Which settings go together: what test_combinations.py runs, and README's table of it.

python -m tests.stages.combinations
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# How ranks divide the work -> the settings that say so. Gradients are of two rows in each.
MODES = {
    "rows": [],
    "sequence": ["parallel.sequence=2", "engine.gradient_accumulation_steps=2"],
    "tensor": ["parallel.tensor=2", "engine.gradient_accumulation_steps=2"],
    "both": [
        *("parallel.sequence=2", "parallel.tensor=2"),
        "engine.gradient_accumulation_steps=2",
    ],
    "expert": ["parallel.expert=2"],
    "sequence and expert": [
        *("parallel.sequence=2", "parallel.expert=2"),
        "engine.gradient_accumulation_steps=2",
    ],
}
# Those whose model has experts: Qwen3-VL-MoE instead of Qwen3-VL.
MIXTURES = ("expert", "sequence and expert")
MODE_TITLES = {
    "rows": "rows (data parallel)",
    "sequence": "`parallel.sequence`",
    "tensor": "`parallel.tensor`",
    "both": "`sequence` and `tensor`",
    "expert": "`parallel.expert`",
    "sequence and expert": "`sequence` and `expert`",
}
FEATURES = {
    "bf16": "engine.precision=bf16",
    "full": "engine.checkpointing=full",
    "selective": "engine.checkpointing=selective",
    "offload": "engine.checkpointing=offload",
    "chunks": "engine.mlp_chunks=3",
    "compile": "model.compile=layers",
    "muon": "optim.name=muon",
    "states": "optim.state_dtype=bf16",
    "host": "engine.zero.offload_optimizer=true",
    "params": "engine.zero.offload_params=true",
}
# Each is one run of tests: a ZeRO stage and what goes with it.
_EVERYTHING = [
    *("0 full muon", "0 selective states bf16", "0 offload chunks"),
    *("1 full muon", "1 selective states bf16", "1 host offload chunks"),
    *("2 full muon", "2 selective states bf16", "2 host offload chunks"),
    *("3 full muon", "3 selective states bf16", "3 host params offload chunks"),
]
EXACT = {
    "rows": _EVERYTHING,
    "sequence": _EVERYTHING,
    "tensor": [
        *("1 full states", "1 bf16", "1 host offload chunks"),
        *("2 states offload chunks", "2 host bf16 full"),
        *("3 full states", "3 bf16 offload chunks", "3 host params full"),
    ],
    "both": ["1 full states", "3 offload chunks"],
    "expert": [
        *("0 full muon", "0 selective states", "1 full states", "1 offload muon"),
        *("2 selective muon", "2 full states", "3 offload states", "3 selective muon"),
        *("0 bf16", "1 bf16", "3 bf16"),
    ],
    "sequence and expert": ["0 full states", "1 selective muon", "2 offload bf16", "3 full states"],
}
# By torchrun, since torch.compile does not work in forked children.
COMPILED = {
    "rows": ["0 compile full", "3 compile offload"],
    "sequence": ["1 compile selective", "3 compile"],
    "expert": ["1 compile selective"],
    "sequence and expert": ["3 compile"],
}
# What goes through Inductor, whose kernels take most of the time: its layers hold all that the
# others' do. The others are traced, cut into forward and backward and run by AOTAutograd.
INDUCTOR = [("sequence and expert", "3 compile")]
# Mode, stage and feature of what is refused before a run starts.
REFUSED = [
    ("tensor", "0", ""),
    ("tensor", "auto", ""),
    ("tensor", "1", "selective"),
    ("tensor", "1", "compile"),
    ("tensor", "1", "muon"),
    ("expert", "3", "host"),
    ("rows", "1", "host muon"),
    ("rows", "1", "host states"),
    ("rows", "0", "host"),
    ("rows", "2", "params"),
    ("rows", "1", "chunks selective"),
]


def words(mode: str, run: str) -> list[str]:
    """A run's settings."""
    stage, *features = run.split()
    precision = [] if "bf16" in features else ["engine.precision=fp32"]
    return [
        *MODES[mode],
        f"engine.zero.stage={stage}",
        *precision,
        *(FEATURES[feature] for feature in features),
    ]


def refusal(mode: str, stage: str, features: str) -> str:
    """What a run that is refused says; AssertionError if it is not."""
    sys.path.insert(0, str(ROOT / "stages"))
    import sft

    from triptych_core.config import load_config

    needed = ["model.path=none", "data.shards=[none]", "data.seq_len=128"]
    try:
        load_config(sft.SftConfig, None, [*needed, *words(mode, f"{stage} {features}")])
    except ValueError as error:
        return str(error)
    raise AssertionError(f"{mode}, stage {stage}, {features}: must be refused")


def stages_of(mode: str, feature: str) -> str:
    """The ZeRO stages a feature was compared under."""
    runs = [run.split() for run in [*EXACT[mode], *COMPILED.get(mode, ())]]
    return " ".join(sorted({stage for stage, *features in runs if feature in ("", *features)}))


def markdown() -> str:
    """README's tables."""
    return "\n".join([*_exact_table(), "", *_refused_table()])


def _exact_table() -> Iterator[str]:
    yield "| | " + " | ".join(MODE_TITLES.values()) + " |"
    yield "|---|" + "---|" * len(MODES)
    for feature, setting in {"": "fp32, AdamW", **FEATURES}.items():
        cells = (stages_of(mode, feature) or _why_none(mode, feature) for mode in MODES)
        title = f"`{setting}`" if feature else setting
        yield f"| {title} | " + " | ".join(cells) + " |"


def _why_none(mode: str, feature: str) -> str:
    try:
        for stage in range(4):
            refusal(mode, str(stage), feature)
    except AssertionError:
        return "–"
    return "refused"


def _refused_table() -> Iterator[str]:
    yield "| refused | because |"
    yield "|---|---|"
    for mode, stage, features in REFUSED:
        key, reason = refusal(mode, stage, features).split(": ", 1)
        yield f"| `{key}` | {reason} |"


if __name__ == "__main__":
    print(markdown())
