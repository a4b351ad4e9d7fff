"""Faults put into the code one at a time: the test named for each must turn red.

A mutation is a text that stands once in a file of packages/ and what stands in its place. It is
made in a copy of packages/, never here.

    python -m tests.mutations ["mean of means" …]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
PARITY = "tests/stages/test_parity.py::test_a_step_equals_that_of_stock_in_fp64"
LEAKS = "tests/models/test_leaks.py::test_no_gradient_reaches_another_document"
TWICE = "tests/core/test_many_steps.py::test_a_module_that_runs_twice_gets_the_gradients_of_both"
SMALL = "tests/core/test_many_steps.py::test_updates_below_a_bit_of_bf16_add_up"
FROZEN = (
    "tests/stages/test_align.py::test_frozen_parts_are_bit_equal_after_ten_steps_and_have_no_states"
)
SAMPLES = "tests/stages/test_samples.py::test_gradients_equal_those_of_each_sample_alone"


class Mutation(NamedTuple):
    """`old` in packages/`file` becomes `new`; pytest's words name the guard."""

    file: str
    old: str
    new: str
    words: tuple[str, ...]


LOOP = "core/triptych_core/loop.py"
MUTATIONS = {
    "mean of means": Mutation(
        LOOP,
        "divisor = counts[0].clamp(min=1)",
        "divisor = torch.tensor(max(1, window[0]['num_targets']) * replicas * len(window))",
        (PARITY, "-k", "qwen3 and 2 and not moe"),
    ),
    "loss of one rank": Mutation(
        LOOP,
        "                    dist.all_reduce(loss)\n",
        "                    loss *= world_size\n",
        (PARITY, "-k", "qwen3 and 2 and not moe"),
    ),
    "balance by rows": Mutation(
        "models/triptych_models/mixture.py",
        "over, sequence = self.moe.aux_over, self.sequence",
        "over, sequence = 'row', self.sequence",
        (PARITY, "-k", "qwen2_moe"),
    ),
    "norm without holders": Mutation(
        "core/triptych_core/parallel/expert.py",
        "            dist.all_reduce(squares[-1], group=holders)\n",
        "            pass\n",
        (PARITY, "-k", "qwen2_moe"),
    ),
    "experts chosen without bias": Mutation(
        "models/triptych_models/experts.py",
        "score=shape.score, bias=bias",
        "score=shape.score, bias=None",
        ("tests/models/test_mixtures.py", "-k", "dots1 and packed"),
    ),
    "bias of one rank's load": Mutation(
        LOOP,
        "after_update(found,",
        "after_update({n: v.double() for n, v in figures.items()},",
        (PARITY, "-k", "dots1"),
    ),
    "no document mask": Mutation(
        "models/triptych_models/attention.py",
        "attention(q, k, v, cu_seqlens, max_seqlen, causal=causal, scale=scaling)",
        "attention(q, k, v, cu_seqlens[[0, -1]], len(q), causal=causal, scale=scaling)",
        (LEAKS, "-k", "qwen3"),
    ),
    "positions lost": Mutation(
        "data/triptych_data/batch.py",
        "torch.cat(positions, dim=1)  # (axes, T)",
        "torch.zeros_like(torch.cat(positions, dim=1))",
        (SAMPLES,),
    ),
    "labels shifted twice": Mutation(
        "data/triptych_data/batch.py",
        "_row([s.shift_labels for s in samples]",
        "_row([s.shift_labels.roll(-1) for s in samples]",
        (SAMPLES,),
    ),
    "average of what is new": Mutation(
        "core/triptych_core/optim/ema.py",
        "1.0 - self.decay_at(",
        "self.decay_at(",
        ("tests/stages/test_ema.py::test_an_average_is_its_closed_form_of_the_weights_that_were",),
    ),
    "experts divided by their holders": Mutation(
        "core/triptych_core/parallel/expert.py",
        'parameter.ds_zero_placement_family = "autoep_expert"',
        'parameter.ds_zero_placement_family = ""',
        (PARITY, "-k", "qwen2_moe"),
    ),
    "last gradient alone": Mutation(
        "core/triptych_core/engine/division.py",
        "place.add_(parameter.grad)",
        "place.copy_(parameter.grad)",
        (TWICE,),
    ),
    "no dummy image": Mutation(
        "models/triptych_models/qwen3_vl.py",
        "features, deepstack = self._no_image_features(input_ids.device)",
        "features, deepstack = hidden_states[0, :0], []",
        (
            "tests/models/test_qwen3_vl.py"
            "::test_images_or_not_the_same_modules_run_in_the_same_order",
        ),
    ),
    "idle experts get what lay in memory": Mutation(
        "kernels/triptych_kernels/moe_passes.py",
        "    grad = F.grouped_mm(d_out.t(), rows, offs=offsets)\n",
        "    grad = F.grouped_mm(d_out.t(), rows, offs=offsets)\n"
        "    grad[offsets.diff(prepend=offsets.new_zeros(1)) == 0] = 1\n",
        ("tests/models/test_qwen3_moe.py::test_an_expert_without_tokens_has_zero_gradients",),
    ),
    "frozen parts train": Mutation(
        "models/triptych_models/freeze.py",
        "module.requires_grad_(False)",
        "module.requires_grad_(True)",
        (FROZEN,),
    ),
    "masters are rounded": Mutation(
        "core/triptych_core/engine/light.py",
        "        self._held.spread()\n",
        "        self._held.spread()\n"
        "        [flat.master.copy_(flat.master.bfloat16()) for flat in self.flats()]\n",
        (SMALL, "-k", "0-fp32"),
    ),
    "gradient of one use": Mutation(
        "models/triptych_models/head.py",
        "            self.weight,\n",
        "            self.weight.detach(),\n",
        (PARITY, "-k", "qwen3 and 2 and not moe"),
    ),
    "integers are averaged": Mutation(
        "core/triptych_core/averaging/agree.py",
        "if not stored.dtype.is_floating_point and not recipe.is_excluded(name)",
        "if name == ''",
        ("tests/tools/test_average_inputs.py::test_integers_must_be_equal",),
    ),
    "one group's decay in all": Mutation(
        "core/triptych_core/checkpoint/load.py",
        "    load_stretches(engine, Payloads(path / name for name in names), dtypes)\n",
        "    load_stretches(engine, Payloads(path / name for name in names), dtypes)\n"
        "    groups = engine.optimizer.param_groups\n"
        "    [g.update(weight_decay=groups[0]['weight_decay']) for g in groups]\n",
        ("tests/stages/test_muon.py::test_a_resumed_run_repeats_every_bit[1]",),
    ),
    "dropout let by": Mutation(
        "models/triptych_models/read_config.py",
        "if text.attention_dropout:",
        "if False:",
        ("tests/models/test_qwen3.py::test_what_packed_rows_cannot_compute_is_refused",),
    ),
    "another default": Mutation(
        "core/triptych_core/engine/build.py",
        '"contiguous_gradients": stage < 3,',
        '"contiguous_gradients": True,',
        (
            "tests/core/test_deepspeed_snapshot.py"
            "::test_defaults_and_names_are_those_of_the_version_we_admitted",
        ),
    ),
}


def turns_red(mutation: Mutation) -> bool:
    """Whether its test fails with it."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "packages"
        shutil.copytree(ROOT / "packages", copy)
        file = copy / mutation.file
        file.write_text(changed(mutation, file.read_text()))
        paths = os.pathsep.join(str(path) for path in sorted(copy.iterdir()))
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutation.words],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": paths},
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode not in (0, 1):  # neither green nor red: no test, no import, no pytest
        raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return done.returncode == 1


def changed(mutation: Mutation, text: str) -> str:
    """The text with the fault in it; AssertionError unless there is one place for it."""
    assert text.count(mutation.old) == 1, f"{mutation.file}: must have once {mutation.old!r}"
    return text.replace(mutation.old, mutation.new)


if __name__ == "__main__":
    results = []
    for name in sys.argv[1:] or MUTATIONS:
        results.append(turns_red(MUTATIONS[name]))
        print(f"{'red  ' if results[-1] else 'GREEN'} {name}", flush=True)
    sys.exit(not all(results))
