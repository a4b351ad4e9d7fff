"""Rows of results: as a table, a CSV file and a plot."""

import csv
import importlib.util
import subprocess
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch

from .op import Work
from .timing import Ceilings, Measured

_ROOT = Path(__file__).parents[2]
_TALLEST = 8.0


@dataclass(frozen=True)
class Row:
    """One provider on one shape; times in microseconds. None where nothing was measured."""

    op: str
    shape: str
    mode: str
    provider: str
    dtype: str
    device: float | None = None
    device_p20: float | None = None
    device_p80: float | None = None
    device_by: str = ""
    wall: float | None = None
    wall_p20: float | None = None
    wall_p80: float | None = None
    terabytes_per_s: float | None = None
    teraflops_per_s: float | None = None
    percent_of_copy: float | None = None
    percent_of_matmul: float | None = None
    peak_mib: float | None = None
    distance_from_eager: float | None = None
    note: str = ""
    machine: str = ""
    torch: str = ""
    triton: str = ""
    commit: str = ""


def machine_columns(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "machine": name,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": _commit(),
    }


def _version(package: str) -> str:
    if importlib.util.find_spec(package) is None:
        return ""
    return str(getattr(importlib.import_module(package), "__version__", ""))


def _commit() -> str:
    """The checked-out commit; "" where this is no checkout, as on a machine without git."""
    try:
        run = subprocess.run(
            ["git", "-C", _ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True
        )
    except FileNotFoundError:
        return ""
    return run.stdout.strip()


def result_columns(
    measured: Measured, work: Work, element_size: int, ceilings: Ceilings | None
) -> dict[str, float | str | None]:
    device, by, wall, peak = measured
    columns: dict[str, float | str | None] = {
        "wall": wall.median,
        "wall_p20": wall.p20,
        "wall_p80": wall.p80,
        "peak_mib": peak,
    }
    if device is None or ceilings is None:
        return columns
    terabytes = work.elements * element_size / device.median / 1e6
    teraflops = work.flops / device.median / 1e6
    return columns | {
        "device": device.median,
        "device_p20": device.p20,
        "device_p80": device.p80,
        "device_by": by,
        "terabytes_per_s": terabytes,
        "teraflops_per_s": teraflops,
        "percent_of_copy": 100 * terabytes / ceilings.terabytes,
        "percent_of_matmul": 100 * teraflops / ceilings.teraflops,
    }


def write_csv(rows: list[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)])
        writer.writeheader()
        for row in rows:
            writer.writerow({k: _short(v) for k, v in asdict(row).items()})


def _short(value: float | str | None) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value or "")


def table(rows: list[Row]) -> str:
    """Short: a line a row, the ceiling that is nearer, times against the eager row's."""
    head = ("op", "shape", "mode", "provider", "device us", "wall us", "% of", "MiB", "gain", "")
    lines = [head, *[_line(row, rows) for row in rows]]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if 4 <= i < 9 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def _line(row: Row, rows: list[Row]) -> tuple[str, ...]:
    start = (row.op, row.shape, row.mode, row.provider)
    if row.wall is None:
        return (*start, "", "", "", "", "", row.note)
    device = "" if row.device is None else f"{row.device:.1f}{'*' * (row.device_by == 'events')}"
    copy, matmul = row.percent_of_copy or 0, row.percent_of_matmul or 0
    bound = f"{copy:.0f} copy" if copy >= matmul else f"{matmul:.0f} matmul"
    peak = "" if row.peak_mib is None else f"{row.peak_mib:.0f}"
    return (
        *start,
        device,
        f"{row.wall:.1f}",
        bound if row.device else "",
        peak,
        _gain(row, rows),
        "",
    )


def _gain(row: Row, rows: list[Row]) -> str:
    """How many times faster than eager, by device time where there is one."""
    for other in rows:
        same = (other.op, other.shape, other.mode) == (row.op, row.shape, row.mode)
        if same and other.provider == "eager" and other.wall and row.wall:
            pair = (other.device, row.device) if row.device else (other.wall, row.wall)
            return f"{pair[0] / pair[1]:.2f}x" if pair[0] and pair[1] else ""
    return ""


def plot(rows: list[Row], path: Path) -> bool:
    """Bars of the time a call, one panel an op and mode; False where matplotlib is missing."""
    measured = [row for row in rows if row.wall is not None]
    if importlib.util.find_spec("matplotlib") is None or not measured:
        return False
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    panels = list(dict.fromkeys((row.op, row.mode) for row in measured))
    providers = list(dict.fromkeys(row.provider for row in measured))
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(6 * columns, 3.6 * lines), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    for axis, (op, mode) in zip(axes.flat, panels, strict=False):
        here = [row for row in measured if (row.op, row.mode) == (op, mode)]
        _draw_bars(axis, here, providers)
        axis.set_title(f"{op}, {mode}")
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=f"C{i % 10}") for i in range(len(providers))]
    figure.legend(handles, providers, loc="outside lower center", ncols=len(providers))
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return True


def _draw_bars(axis: object, rows: list[Row], providers: list[str]) -> None:
    """Heights are multiples of the fastest of the shape, cut at _TALLEST."""
    shapes = list(dict.fromkeys(row.shape for row in rows))
    here = [provider for provider in providers if any(row.provider == provider for row in rows)]
    on_device = all(row.device for row in rows)
    width = 0.8 / len(here)
    for shape in shapes:
        times = {r.provider: r.device if on_device else r.wall for r in rows if r.shape == shape}
        for provider, time in times.items():
            x = shapes.index(shape) + (here.index(provider) - (len(here) - 1) / 2) * width
            height = min(time / min(times.values()), _TALLEST)
            axis.bar(x, height, 0.95 * width, color=f"C{providers.index(provider) % 10}")
            axis.annotate(
                f"{time:.0f}" if time >= 100 else f"{time:.3g}",
                (x, height),
                ha="center",
                va="bottom",
                fontsize=6,
            )
    slanted = {"rotation": 12, "ha": "right"} if len(shapes) > 3 else {}
    axis.set_xticks(range(len(shapes)), shapes, fontsize=7, **slanted)
    axis.set_xlim(-0.6, len(shapes) - 0.4)
    axis.margins(y=0.12)
    axis.set_ylabel(f"{'device' if on_device else 'wall'} time / fastest (us above)")
