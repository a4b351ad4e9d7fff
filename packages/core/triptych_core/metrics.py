"""One JSON line a step, a console bar, and Weights & Biases."""

from __future__ import annotations

import json
import math
import resource
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

import torch
from deepspeed.accelerator import get_accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from triptych_core.config import StageConfig, dump_config
from triptych_core.lines import keep_steps_until

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


@dataclass
class StepRecord:
    """What the loop knows of a step; tensors stay on the device until the next step is queued."""

    step: int
    loss: torch.Tensor
    counts: torch.Tensor  # (4,) int64: targets, tokens, FLOPs, bad samples over all ranks
    grad_norm: Any
    lr: float
    capacity: int  # tokens the step's rows could hold
    data_wait_seconds: float


class Metrics:
    """Writes `metrics.jsonl` and shows progress; a context manager used on every rank.

    Loss, counts and FLOPs are those of all ranks; memory and waiting for data the main rank's.

    A step is written when the next one has been queued, so reading its loss never stalls the
    device. Only the main rank writes.
    """

    def __init__(
        self, config: StageConfig, *, rank: int, world_size: int, start_step: int = 0
    ) -> None:
        self._config = config
        self._is_main = is_main = rank == 0
        self._peak = peak_flops(config) * world_size
        self._pending: tuple[StepRecord, float] | None = None
        self._recorded_at = time.perf_counter()
        self._progress: Progress | None = None
        self._wandb: Any = None
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
        if self._progress is not None:
            self._progress.stop()
        if self._is_main:
            self._file.close()
        if self._wandb is not None:
            self._wandb.finish()

    def record(self, record: StepRecord) -> None:
        """Keep this step, write the one before.

        A step lasts from one call to the next; each call waits for the step before, so on a busy
        device that is the device's time.
        """
        self.flush()
        now = time.perf_counter()
        self._pending = record, now - self._recorded_at
        self._recorded_at = now

    def restart_clock(self) -> None:
        """Leave out of step times what happened since the last step: evaluation, saving."""
        self.flush()
        get_accelerator().synchronize()
        self._recorded_at = time.perf_counter()

    def flush(self) -> None:
        """Write the pending step; waits for the device to finish it."""
        pending, self._pending = self._pending, None
        if pending is not None and self._is_main:
            self._write(*pending)

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

    def _write(self, record: StepRecord, seconds: float) -> None:
        loss = float(record.loss)  # the one wait
        num_targets, num_tokens, flops, bad_samples = (int(n) for n in record.counts.tolist())
        norm = None if record.grad_norm is None else float(record.grad_norm)
        line = {
            "step": record.step,
            "loss": loss,
            "num_targets": num_targets,
            "num_tokens": num_tokens,
            "tokens_per_second": num_tokens / seconds,
            "mfu": flops / seconds / self._peak if math.isfinite(self._peak) else None,
            "flops": flops,
            "grad_norm": norm,
            "lr": record.lr,
            "data_wait_seconds": record.data_wait_seconds,
            "step_seconds": seconds,
            "packing_fill": num_tokens / record.capacity,
            "bad_samples": bad_samples,
            "peak_memory_bytes": peak_memory_bytes(),
            "time": time.time(),
        }
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(line, step=record.step)
        self._show(line)

    def _show(self, line: dict[str, Any]) -> None:
        mfu = "" if line["mfu"] is None else f"  mfu {line['mfu']:.1%}"
        status = f"loss {line['loss']:.4f}  {line['tokens_per_second']:,.0f} tok/s{mfu}"
        if self._progress is not None:
            self._progress.update(self._task, completed=line["step"], status=status)
        elif line["step"] % self._config.log.every == 0 or line["step"] == self._config.run.steps:
            self._say(f"step {line['step']}/{self._config.run.steps}  {status}")


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
