"""Where the device's time goes in a step: a profile of two steps and the shares read off it."""

import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch

STEPS = 2
ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
Interval = tuple[float, float]


class Shares(NamedTuple):
    """Shares of the profiled time, each of 1."""

    idle: float  # nothing runs: the device waits for the host
    exposed: float  # only communication runs


class Profile:
    """Profiles the two steps after `begin`: profile.txt, trace.json.gz and shares.json."""

    def __init__(self, directory: Path, begin: int) -> None:
        self.directory = directory
        self.begin = begin
        self.on_cuda = torch.cuda.is_available()
        kinds = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(
            activities=[kinds.CPU, *([kinds.CUDA] if self.on_cuda else [])]
        )

    def __call__(self, step: int) -> None:
        if step not in (self.begin, self.begin + STEPS):
            return
        if self.on_cuda:
            torch.cuda.synchronize()
        if step == self.begin:
            self.profiler.start()
        else:
            self.profiler.stop()
            self.write()

    def write(self) -> None:
        key = "self_cuda_time_total" if self.on_cuda else "self_cpu_time_total"
        table = self.profiler.key_averages().table(
            sort_by=key, row_limit=45, max_name_column_width=90
        )
        (self.directory / "profile.txt").write_text(table)
        trace = self.directory / "trace.json.gz"
        self.profiler.export_chrome_trace(str(trace))
        shares = read_shares(json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"])
        if shares is not None:
            (self.directory / "shares.json").write_text(json.dumps(shares._asdict()))


def read_shares(events: Iterable[dict[str, Any]]) -> Shares | None:
    """Idle and exposed time from a trace in Chrome's format; None where no device took part."""
    computing: list[Interval] = []
    busy: list[Interval] = []
    for event in events:
        if event.get("cat") in ON_DEVICE:
            interval = (event["ts"], event["ts"] + event["dur"])
            busy.append(interval)
            if not event["name"].startswith("nccl"):
                computing.append(interval)
    if not busy:
        return None
    whole = max(end for _, end in busy) - min(start for start, _ in busy)
    return Shares(
        idle=1 - covered(busy) / whole, exposed=(covered(busy) - covered(computing)) / whole
    )


def covered(intervals: list[Interval]) -> float:
    """Length of the union."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total
