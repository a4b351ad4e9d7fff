"""Time triptych-kernels against eager torch, torch.compile and other libraries.

    PYTHONPATH=packages/kernels python tools/bench_kernels.py --op rms_norm --mode full --out DIR

Needs click and the package; liger-kernel, quack-kernels, flash-attn and matplotlib are used when
they can be imported. On a CPU it is a rehearsal with tiny shapes: wall time alone, no ceilings.
"""

import gc
import importlib
import sys
from dataclasses import replace
from pathlib import Path

import click
import torch
from kernel_benchmarks.op import Call, Draw, Inputs, Op, Shape, Unavailable
from kernel_benchmarks.registry import OPS
from kernel_benchmarks.report import Row, machine_columns, plot, result_columns, table, write_csv
from kernel_benchmarks.timing import (
    Ceilings,
    ceilings,
    measure,
    number_of_sets,
    outputs_of,
    thunks_of,
)


@click.command(help=__doc__)
@click.option("--op", "names", multiple=True, type=click.Choice(list(OPS)), help="Default: all.")
@click.option("--provider", "providers", multiple=True, help="Default: all; eager, compile, ours …")
@click.option("--shapes", help="Of one op, its dims joined by x: 16384x2048,4096x2048.")
@click.option("--first", is_flag=True, help="Only the first shape of each op.")
@click.option("--mode", type=click.Choice(["fwd", "bwd", "full"]), default="full")
@click.option(
    "--ignored", type=click.FloatRange(0, 1), multiple=True, default=[0.0], help="Label share."
)
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), default="bfloat16")
@click.option("--compile-backend", default="inductor", help="What torch.compile is given.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="For CSV and PNG.")
def main(
    names: tuple[str, ...],
    providers: tuple[str, ...],
    shapes: str | None,
    first: bool,
    mode: str,
    ignored: tuple[float, ...],
    dtype: str,
    compile_backend: str,
    out: Path | None,
) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = names or tuple(OPS)
    check_options(names, providers, shapes)
    if out:
        out.mkdir(parents=True, exist_ok=True)
    bench = Bench(device, dtype, mode, compile_backend, providers)
    print(*bench.machine.values(), dtype)
    if bench.ceilings:
        print("ceilings: {:.2f} TB/s copied, {:.0f} TFLOP/s bfloat16".format(*bench.ceilings))
    rows: list[Row] = []
    for name in names:
        for shape in shapes_of(name, shapes, ignored, device, first):
            for row in bench.rows_of(name, shape):
                rows.append(row)
                print(row.op, row.shape, row.provider, row.note or "done", flush=True)
                if out:  # after each row, so that a crash loses none
                    write_csv(rows, out / "kernels.csv")
    if out and not plot(rows, out / "kernels.png"):
        print("no plot: matplotlib cannot be imported, or nothing was measured")
    for name in names:
        print(f"{name}: {' x '.join(OPS[name].dims)}")
    print(table(rows))
    if any(row.device_by == "events" for row in rows):
        print("* waits for the device: timed between events, not as a CUDA graph")


def check_options(names: tuple[str, ...], providers: tuple[str, ...], shapes: str | None) -> None:
    if shapes and len(names) != 1:
        raise click.UsageError("--shapes: exactly one --op must be given with it; name the op")
    known = {"compile"} | {provider for name in names for provider in OPS[name].providers}
    for provider in providers:
        if provider not in known:
            raise click.UsageError(
                f"--provider: must be one of {', '.join(sorted(known))}, got {provider}; correct it"
            )


def shapes_of(
    name: str, given: str | None, ignored: tuple[float, ...], device: torch.device, first: bool
) -> list[Shape]:
    op = OPS[name]
    sizes = list(op.shapes[: 1 if first else None]) if device.type == "cuda" else [op.tiny]
    if given:
        try:
            sizes = [tuple(int(size) for size in shape.split("x")) for shape in given.split(",")]
        except ValueError:
            sizes = []
        if not sizes or any(len(size) != len(op.dims) for size in sizes):
            raise click.UsageError(
                f"--shapes: must be {'x'.join(op.dims)}, joined by commas, got {given}; correct it"
            )
    shares = ignored if name == "linear_cross_entropy" else (0.0,)
    return [
        Shape(**dict(zip(op.dims, size, strict=True)), ignored=share)
        for size in sizes
        for share in shares
    ]


class Bench:
    """The machine and the choices that hold for every row."""

    def __init__(
        self,
        device: torch.device,
        dtype: str,
        mode: str,
        compile_backend: str,
        providers: tuple[str, ...],
    ) -> None:
        self.device = device
        self.dtype = dtype
        self.mode = mode
        self.compile_backend = compile_backend
        self.providers = providers
        self.machine = machine_columns(device)
        self.ceilings: Ceilings | None = ceilings(device)
        if device.type == "cuda":
            # A CUDA graph cannot capture the default stream, and backward runs where forward ran.
            torch.cuda.set_stream(torch.cuda.Stream())
        if mode == "bwd":  # repeated over one graph, which donated buffers would not survive
            importlib.import_module("torch._functorch.config").donated_buffer = False

    def rows_of(self, name: str, shape: Shape) -> list[Row]:
        """A row per provider, the failed ones with a note."""
        op = OPS[name]
        mode = self.mode if op.backward else "fwd"
        if op.backward is None and self.mode == "bwd":
            return []
        eager, *others = op.providers
        wanted = [p for p in (eager, "compile", *others) if p in (self.providers or (p,))]
        want = self.eager_outputs(op, shape)
        blank = Row(name, label(op, shape), mode, "", self.dtype, **self.machine)
        rows = []
        for provider in wanted:
            row = replace(blank, provider=provider)
            try:
                row = self.measured(row, op, shape, provider, want)
            except Unavailable as error:
                row = replace(row, note=str(error))
            except failures() as error:
                reason = str(error).strip().partition("\n")[0]
                row = replace(row, note=f"failed: {type(error).__name__}: {reason:.80}")
            rows.append(row)
            self.clean()
        return rows

    def measured(
        self, row: Row, op: Op, shape: Shape, provider: str, want: list[torch.Tensor] | None
    ) -> Row:
        call = self.resolve(op, provider)
        first = self.inputs(op, shape, 0)
        distance = None
        if want is not None and provider not in op.floors:
            distance = distance_from(call, self.inputs(op, shape, 0), want)
        sets = [first]
        for seed in range(1, number_of_sets(first, self.device)):
            sets.append(self.inputs(op, shape, seed))
        measured = measure(thunks_of(call, sets, row.mode), self.device)
        size = torch.finfo(getattr(torch, self.dtype)).bits // 8
        columns = result_columns(measured, op.work(shape, row.mode), size, self.ceilings)
        return replace(row, distance_from_eager=distance, **columns)

    def resolve(self, op: Op, provider: str) -> Call:
        if provider == "compile":
            function = op.providers[op.compiled]()
            torch.compiler.reset()  # or a few shapes would use up its limit of recompilations
            return torch.compile(function, backend=self.compile_backend, dynamic=False)
        if provider in op.cuda_only and self.device.type != "cuda":
            raise Unavailable("needs CUDA")
        return op.providers[provider]()

    def inputs(self, op: Op, shape: Shape, seed: int) -> Inputs:
        generator = torch.Generator(self.device).manual_seed(seed)
        return op.inputs(shape, Draw(self.device, getattr(torch, self.dtype), generator))

    def eager_outputs(self, op: Op, shape: Shape) -> list[torch.Tensor] | None:
        """What every provider should give; None where the plain form does not fit in memory."""
        tensors, constants = self.inputs(op, shape, 0)
        try:
            with torch.no_grad():
                return list(outputs_of(op.providers["eager"]()(*tensors, **constants)))
        except torch.OutOfMemoryError:
            return None
        finally:
            self.clean()

    def clean(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.synchronize()
            torch.cuda.empty_cache()


def failures() -> tuple[type[Exception], ...]:
    """What a library's call may raise: then its row is a note, and the others still run."""
    of_libraries = [
        getattr(sys.modules.get(module), name, RuntimeError)
        for module, name in (
            ("triton.errors", "TritonError"),
            ("cutlass.base_dsl.common", "DSLBaseError"),
        )
    ]
    of_python = (RuntimeError, ValueError, TypeError, AttributeError, ImportError, AssertionError)
    return (*of_python, *of_libraries)


def label(op: Op, shape: Shape) -> str:
    sizes = "x".join(str(getattr(shape, dim)) for dim in op.dims)
    return f"{sizes} ignored {shape.ignored:.0%}" if shape.ignored else sizes


def distance_from(call: Call, inputs: Inputs, want: list[torch.Tensor]) -> float:
    """The largest ||got - want|| / ||want|| over the outputs."""
    with torch.no_grad():
        got = outputs_of(call(*inputs.tensors, **inputs.constants))
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))
        for a, b in zip(got, want, strict=True)
    )


if __name__ == "__main__":
    main()
