"""Shares of a step, from a trace whose times are known."""

from __future__ import annotations

import sys

from tests.tiny import ROOT

sys.path.insert(0, str(ROOT / "tools"))

from step_profile import Shares, covered, read_shares


def event(name: str, start: float, end: float, cat: str = "kernel") -> dict[str, object]:
    return {"name": name, "cat": cat, "ts": start, "dur": end - start}


def test_shares_count_what_nothing_hides():
    events = [
        event("gemm", 0, 40),
        event("ncclDevKernel_AllGather", 30, 60),  # 20 of it alone
        event("Memcpy HtoD", 65, 70, "gpu_memcpy"),
        event("gemm", 80, 100),
        event("cudaLaunchKernel", 0, 200, "cuda_runtime"),  # the host's
        {"name": "thread_name", "ph": "M"},
    ]
    shares = read_shares(events)
    assert shares is not None
    assert (round(shares.idle, 9), round(shares.exposed, 9)) == Shares(0.15, 0.2)


def test_no_device_no_shares():
    assert read_shares([event("aten::mm", 0, 5, "cpu_op")]) is None


def test_a_union_counts_overlaps_once():
    assert covered([(5, 7), (0, 3), (1, 2), (2, 4)]) == 6.0
