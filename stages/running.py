"""What all stages share once model, data and engine are there: the run from resume to export.

No stage itself.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from triptych_core.config import StageConfig
from triptych_core.sections import EngineConfig, ZeroConfig

if TYPE_CHECKING:
    from triptych_core.checkpoint.saver import Saver
    from triptych_core.launch import Runtime
    from triptych_core.loop import Part
    from triptych_core.metrics import Metrics
    from triptych_core.plan.plan import Plan
    from triptych_data.plan.ledger import Ledger


class UnplannedZero(ZeroConfig):
    """What is partitioned; no plan chooses here."""

    stage: Literal[0, 1, 2, 3] = Field(
        0, description="0 nothing, 1 optimizer states, 2 + gradients, 3 + parameters"
    )


class UnplannedEngine(EngineConfig):
    """How a step is computed."""

    checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        "none", description="what a block keeps for its backward; see packages/models"
    )
    zero: UnplannedZero = UnplannedZero()


def share_seed(config: Any) -> None:
    """Let `model` and `data` draw from `run.seed` where they name no seed of their own."""
    for section in (config.model, config.data):
        if "seed" not in section.model_fields_set:
            section.seed = config.run.seed


class Trainee(Protocol):
    """A rank's share of a run, ready to train."""

    @property
    def engine(self) -> Any: ...
    @property
    def model(self) -> Any:
        """an nn.Module with `layers()` and `flops(batch)`"""

    @property
    def batches(self) -> Any:
        """a data iterator with `doing()`"""

    @property
    def part(self) -> "Part":
        """of a batch, what this rank computes"""


def carry_out(
    config: StageConfig,
    runtime: "Runtime",
    job: Trainee,
    facts: dict[str, Any],
    *,
    test: "Callable[[Metrics, int], None]",
    export: Callable[[], None] | None,
    plan: "Callable[[Any], Plan] | None" = None,
    ledger: "Callable[[int], Ledger] | None" = None,
    compiles: bool = False,
    **loop: Any,
) -> None:
    """Go on from the newest checkpoint, train, test, save, export; every rank takes part.

    facts: for run.json. test: called before the first step and after each. export: called with the
    weights that are to be kept. plan: for a remedy where memory runs out. ledger: of a run that
    begins after a step. loop: what `train` and `Metrics` are told of this kind of batches.
    """
    from triptych_core.checkpoint.saver import Saver, resume
    from triptych_core.engine.averaged import averaged_weights
    from triptych_core.engine.recompiles import RecompileWatch
    from triptych_core.faults.oversight import Oversight
    from triptych_core.faults.watch import Watch
    from triptych_core.launch import shutdown
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.plan.postmortem import suggest_remedy
    from triptych_core.run import close_run, describe_run, open_run

    engine, model, batches = job.engine, job.model, job.batches
    resumed = resume(engine, config, batches)
    start_step = resumed.step
    open_run(config, runtime, facts, resumed)
    unit = loop.pop("unit", "tokens")
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    with Metrics(config, **ranks, start_step=start_step, unit=unit) as metrics:
        metrics.note(describe_run(config, runtime, facts, start_step))
        watch = Watch(config.run, model, model.layers(), batches.doing)
        oversight = Oversight(
            engine, config, metrics.note, resumed, asked=watch.stop, heart=watch.heart
        )
        save = Saver(engine, config, batches, metrics, oversight)

        def leave(step: int) -> None:
            _leave(config, save, metrics, step, is_main=runtime.is_main)

        oversight.leave = leave
        stream = iter(batches)
        on_step: list[Callable[[int], None]] = [lambda step: test(metrics, step), save]
        if ledger is not None:
            book = ledger(start_step)
            stream, on_step = book.watch(stream), [book.write, *on_step]
        if compiles:
            on_step = [RecompileWatch(start_step), *on_step]
        if start_step == 0:
            test(metrics, 0)
        with suggest_remedy(config, plan):
            train(
                engine,
                stream,
                config,
                flops=model.flops,
                metrics=metrics,
                part=job.part,
                start_step=start_step,
                on_step=on_step,
                oversight=oversight,
                **loop,
            )
    if export is not None:
        with averaged_weights(engine):
            export()
    close_run(config, runtime)
    watch.close()
    shutdown()


def _leave(
    config: StageConfig, save: "Saver", metrics: "Metrics", step: int, *, is_main: bool
) -> None:
    """What is done before the end of a run that was asked to stop; every rank takes part."""
    from triptych_core.report.page import write_report

    save.save_now(step)
    metrics.flush()
    if is_main:
        write_report(config.run.dir)
