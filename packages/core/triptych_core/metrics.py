"""One JSON line a step, a console bar, and Weights & Biases."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import resource
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triptych_core.config import StageConfig, dump_config, is_due
from triptych_core.lines import keep_steps_until
from triptych_core.readout import FinishedStep, Readout, StepRecord
from triptych_core.report.expert_load import describe_load

# Dense bf16 peaks in TFLOP/s, from the vendors' data sheets; the first name found counts.
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "A100": 312.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


class Metrics:
    """Writes `metrics.jsonl` and shows progress; a context manager used on every rank.

    Loss, counts and FLOPs are those of all ranks; memory and waiting for data the main rank's.

    Every step has its line, but lines are written at the end of an interval of `log.every` steps,
    when one more step has been queued: reading never stalls the device. When an exception leaves
    the context, the steps that the device has done are written. Only the main rank reads.
    """

    def __init__(
        self,
        config: StageConfig,
        *,
        rank: int,
        world_size: int,
        start_step: int = 0,
        unit: str = "tokens",
    ) -> None:
        self._config = config
        self._unit = unit  # of what a batch's num_tokens counts
        self._is_main = is_main = rank == 0
        self._peak = peak_flops(config) * world_size
        self._readout = Readout()
        self._first_step = start_step + 1
        self._progress: Progress | None = None
        self._wandb: Any = None
        self._last_step: int | None = None  # of the last line written by this run
        if is_main:
            self._open(start_step)

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.flush()
        else:
            self._rescue()
        if self._progress is not None:
            self._progress.stop()
        if self._is_main:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def record(self, record: StepRecord) -> None:
        """Keep this step; write the interval before, if that has ended.

        A step lasts from one call to the next, in the device's own time.
        """
        if not self._is_main:
            return
        self._write(self._readout.take())
        self._readout.add(record)
        step, log = record.step, self._config.log
        if is_due(step, log.every, self._config.run.steps) or step == self._first_step:
            self._readout.fetch()

    def restart_clock(self) -> None:
        """Leave out of step times what happened since the last step: evaluation, saving."""
        self.flush()
        get_accelerator().synchronize()
        self._readout.restart_clock()

    def record_evaluation(
        self, step: int, figures: dict[str, float], examples: Sequence[dict[str, Any]]
    ) -> None:
        """Add an evaluation's numbers to the line of its step, and show it on Weights & Biases.

        Before the first step there is no such line; `evaluation.jsonl` has that one too.
        """
        if not self._is_main:
            return
        self.flush()
        if step == self._last_step and figures:
            _extend_last_line(self._config.run.dir / "metrics.jsonl", figures)
        if self._wandb is not None:
            self._wandb.log({**figures, **_wandb_panel(examples)}, step=step)

    def flush(self) -> None:
        """Write all steps so far; waits for the device to finish them."""
        if self._is_main:
            self._write(self._readout.take_all())

    def _rescue(self) -> None:
        """Write what can be known of the steps so far without waiting for anyone."""
        if self._is_main:
            with suppress(RuntimeError):  # the device may be what failed; that error goes on
                self._write(self._readout.take_finished())

    def note(self, text: str) -> None:
        """Print one line below those of the steps so far, on the main rank."""
        self.flush()
        if self._is_main:
            self._say(text)

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def _open(self, start_step: int) -> None:
        config = self._config
        path = config.run.dir / "metrics.jsonl"
        keep_steps_until(path, start_step)
        self._file = path.open("a")
        self._console = Console(stderr=False)
        if config.log.progress and self._console.is_terminal:
            self._progress = Progress(
                TextColumn("[bold]{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[status]}"),
                console=self._console,
            )
            self._task = self._progress.add_task(
                config.run.dir.name, total=config.run.steps, completed=start_step, status=""
            )
            self._progress.start()
        if config.log.wandb != "off":
            self._wandb = _start_wandb(config, config.log.wandb)

    def _write(self, steps: Sequence[FinishedStep]) -> None:
        if not steps:
            return
        lines = [self._line(step) for step in steps]
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
        self._last_step = lines[-1]["step"]
        if self._wandb is not None:
            for line in lines:
                self._wandb.log(line, step=line["step"])
        self._show(lines)

    def _line(self, step: FinishedStep) -> dict[str, Any]:
        num_targets, num_tokens, flops, bad_samples = step.counts
        record, seconds = step.record, step.seconds
        # Tables, of experts say, are long: one in an interval.
        is_shown = is_due(record.step, self._config.log.every, self._config.run.steps)
        return {
            "step": record.step,
            "loss": step.loss,
            "num_targets": num_targets,
            f"num_{self._unit}": num_tokens,
            f"{self._unit}_per_second": num_tokens / seconds,
            "mfu": flops / seconds / self._peak if math.isfinite(self._peak) else None,
            "flops": flops,
            "grad_norm": step.grad_norm,
            "lr": record.lr,
            "data_wait_seconds": record.data_wait_seconds,
            "step_seconds": seconds,
            "packing_fill": num_tokens / record.capacity,
            "bad_samples": bad_samples,
            "peak_memory_bytes": peak_memory_bytes(),
            "time": step.time,
            **{key: value for key, value in step.figures.items() if is_shown or _is_number(value)},
            **(describe_load(step.figures) if is_shown else {}),
        }

    def _show(self, lines: Sequence[dict[str, Any]]) -> None:
        """The last step's loss, and the speed over all of these; waiting for data slows it down."""
        last = lines[-1]
        seconds = sum(line["step_seconds"] for line in lines)
        share = sum(line["flops"] for line in lines) / seconds / self._peak
        mfu = f"  mfu {share:.1%}" if math.isfinite(share) else ""
        speed = sum(line[f"num_{self._unit}"] for line in lines) / seconds
        wait = sum(line["data_wait_seconds"] for line in lines) / seconds
        unit = "tok" if self._unit == "tokens" else self._unit
        status = f"loss {last['loss']:.4f}  {speed:,.0f} {unit}/s{mfu}  data wait {wait:.1%}"
        if self._progress is not None:
            self._progress.update(self._task, completed=last["step"], status=status)
        else:
            self._say(f"step {last['step']}/{self._config.run.steps}  {status}")


def _is_number(value: Any) -> bool:
    return isinstance(value, float)


def peak_flops(config: StageConfig) -> float:
    """This device's peak FLOP/s, or infinity's absence: NaN when nobody knows it (CPUs)."""
    if config.log.peak_tflops is not None:
        return config.log.peak_tflops * 1e12
    if get_accelerator().device_name() == "cuda":
        name = torch.cuda.get_device_name()
        for chip, tflops in PEAK_TFLOPS.items():
            if chip in name:
                return tflops * 1e12
    return math.nan


def peak_memory_bytes() -> int:
    """The peak this rank ever took: of device memory, or of resident memory on a CPU."""
    if get_accelerator().device_name() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return int(get_accelerator().max_memory_allocated())


def _extend_last_line(path: Path, values: dict[str, float]) -> None:
    """More keys for the last object of a file of JSON lines, in one write: never half there."""
    with path.open("r+b", buffering=0) as file:
        file.seek(-2, os.SEEK_END)
        assert file.read() == b"}\n", path
        file.seek(-2, os.SEEK_END)
        file.write(f", {json.dumps(values)[1:]}\n".encode())


def _wandb_panel(examples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The questions that are kept, as a table, and their images with the answer below each."""
    import wandb

    if not examples:
        return {}
    columns = ["key", "question", "prompt", "expected", "answer", "score"]
    table = wandb.Table(columns=columns)
    images = []
    for example in examples:
        table.add_data(*(example.get(column) for column in columns))
        caption = "{prompt} → {answer} (expected: {expected})".format_map(example)
        # Not in the table: images in lists are not written with it.
        images += [wandb.Image(_open_image(uri), caption=caption) for uri in example["images"]]
    return {"eval/answers": table} | ({"eval/images": images} if images else {})


def _open_image(uri: str) -> Any:
    """The image in a data URI, for Weights & Biases, which brings Pillow along."""
    from PIL import Image

    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def _start_wandb(config: StageConfig, mode: Literal["offline", "online"]) -> Any:
    import wandb
    import yaml

    return wandb.init(
        project=config.log.wandb_project,
        name=config.run.dir.name,
        dir=str(config.run.dir),
        mode=mode,
        config=yaml.safe_load(dump_config(config)),
    )
