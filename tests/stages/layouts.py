"""The layouts whose steps are compared with the fp64 reference by test_parity.py.

A layout reads `3 sequence=2 x2 full`: ZeRO stage, ranks that hold a row or divide experts, packs of
a rank's step (1 if not said), and words of combinations.FEATURES. `from 4` begins with row 4 of
rows.py, whose rows 4 to 7 are padding alone, an image alone, no target, a single target. `forced`
sends every token to expert 0; `aux` lets the routers' balance loss outweigh all else; under
`alone` tokens have no loss, only routers. Together with the fp32 AdamW steps of combinations.EXACT:

    python -m tests.stages.layouts
"""

from __future__ import annotations

from typing import NamedTuple

from tests.stages.combinations import EXACT, FEATURES, MIXTURES

# Model and number of ranks -> layouts that one launch runs. Two ranks of qwen3_vl and qwen3_vl_moe
# are for the most part combinations.EXACT.
GRID = {
    ("qwen3_vl", 1): ["0 x8", "1 x4 full", "2 x2", "3 x8 offload", "0 from 4"],
    ("qwen3_vl", 2): ["0 x4", "1 x2 from 4", "2 x4 selective", "3 x2 from 4 full", "0 from 6"],
    ("qwen3_vl", 4): ["3 x2", "1", "3 sequence=4 full", "1 sequence=4 x2", "3 sequence=2 x2"],
    ("one_key_head", 2): ["3 sequence=2 x2 offload chunks", "1 full chunks", "0 sequence=2 x2"],
    ("one_key_head", 4): ["2 sequence=4 x2", "0 sequence=2 x2 full"],
    ("qwen3", 2): ["3 sequence=2 x2", "0 sequence=2 full", "2 x4", "1 x2 from 4"],
    ("qwen2", 2): ["3 x2", "1 sequence=2 selective"],
    ("qwen3_moe", 2): [
        *("0 x2", "3 expert=2 x2", "1 expert=2 x4", "2 expert=2 from 6", "3 expert=2 selective"),
        *("0 expert=2 x2 forced", "3 expert=2 x2 full forced"),
        *("0 x2 alone", "2 expert=2 x4 full alone", "3 expert=2 sequence=2 x2 alone"),
        *("0 expert=2 x2 aux", "3 full aux", "1 expert=2 sequence=2 x4 full aux"),
    ],
    ("qwen3_moe", 4): [
        *("0 expert=2", "3 expert=2 x2", "2 expert=4", "3 expert=4", "1 expert=4 sequence=2 x2"),
        *("3 expert=2 sequence=2 x2 aux", "2 expert=4 x2 full aux"),
    ],
    ("qwen2_moe", 2): ["0 expert=2", "1 expert=2", "2 expert=2", "3 expert=2 sequence=2 selective"],
    ("dots1", 2): ["0 x2", "1 expert=2 x2 full", "2 expert=2 from 6", "3 expert=2 sequence=2 aux"],
    ("qwen3_vl_moe", 2): ["3 x2", "2 expert=2 x4", "3 expert=2 x2 full forced"],
}


class Layout(NamedTuple):
    """How a step is divided."""

    model: str
    ranks: int
    stage: int
    sequence: int
    expert: int
    accumulation: int
    features: tuple[str, ...]
    first: int  # row

    @classmethod
    def read(cls, model: str, ranks: int, text: str) -> Layout:
        """Of a word of GRID."""
        stage, *words = text.split()
        values = dict(word.split("=") for word in words if "=" in word)
        accumulation = [int(word[1:]) for word in words if word[0] == "x"]
        first = int(words[words.index("from") + 1]) if "from" in words else 0
        features = tuple(w for w in words if w in FEATURES or w in ("forced", "aux", "alone"))
        sizes = int(values.get("sequence", 1)), int(values.get("expert", 1))
        return cls(model, ranks, int(stage), *sizes, *(accumulation or [1]), features, first)

    def words(self) -> list[str]:
        """Its settings."""
        return [
            "engine.precision=fp32",
            f"engine.zero.stage={self.stage}",
            f"parallel.sequence={self.sequence}",
            f"parallel.expert={self.expert}",
            f"engine.gradient_accumulation_steps={self.accumulation}",
            *(FEATURES[name] for name in self.features if name in FEATURES),
        ]

    def numbers(self) -> list[int]:
        """Of the rows that its step takes."""
        count = self.ranks // self.sequence * self.accumulation
        return [(self.first + i) % 8 for i in range(count)]


def layouts() -> list[Layout]:
    """All of GRID."""
    return [Layout.read(*key, text) for key, texts in GRID.items() for text in texts]


def others() -> list[tuple[str, str]]:
    """Mode and run of what test_combinations.py compares with the same reference: fp32, AdamW."""
    rounded = {"bf16", "muon", "states"}
    return [
        (mode, run) for mode, runs in EXACT.items() for run in runs if not rounded & {*run.split()}
    ]


def count() -> dict[str, int]:
    """Different layouts: of test_parity.py, of test_combinations.py against fp64, of both."""
    grid, combined = len(set(layouts())), len(set(others()))
    return {"parity": grid, "combinations": combined, "together": grid + combined}


if __name__ == "__main__":
    print(count(), f"with experts: {sum(m in MIXTURES for m, _ in others())} of combinations")
