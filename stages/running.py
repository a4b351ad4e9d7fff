"""What all stages share once model, data and engine are there: the run from resume to export.

No stage itself.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from triptych_core.config import StageConfig
from triptych_core.plan.config import PlanConfig

if TYPE_CHECKING:
    from torch import nn

    from triptych_core.checkpoint.saver import Saver
    from triptych_core.launch import Runtime
    from triptych_core.loop import Part
    from triptych_core.metrics import Metrics
    from triptych_core.plan.plan import Plan
    from triptych_data.plan.ledger import Ledger


# Of packed rows: keys, and what they are where batches are samples.
OF_ROWS = {
    "parallel.sequence": 1,
    "parallel.tensor": 1,
    "parallel.expert": 1,
    "engine.mlp_chunks": 1,
} | {
    f"plan.{name}": field.default
    for name, field in PlanConfig.model_fields.items()
    if name.startswith(("document_", "image_", "target_", "audio_"))
}


def share_seed(config: Any) -> None:
    """Let `model` and `data` draw from `run.seed` where they name no seed of their own."""
    for section in (config.model, config.data):
        if "seed" not in section.model_fields_set:
            section.seed = config.run.seed


def refuse(config: Any, wanted: dict[str, Any]) -> None:
    """Raise ValueError where a key, by its dotted path, is not what it must be in this stage."""
    for key, value in wanted.items():
        found = config
        for name in key.split("."):
            found = getattr(found, name)
        if found != value:
            raise ValueError(f"{key}: must be {value} in this stage, got {found}; leave it out")


def plan_samples(
    config: Any,
    model: "nn.Module",
    make_batch: "Callable[[int], dict[str, Any]]",
    *,
    begin: "Callable[[dict[str, Any]], Any] | None" = None,
    beside: "Sequence[nn.Module]" = (),
) -> "Plan":
    """What a step of `data.batch_size` samples needs and how long it takes.

    model: on the meta device. make_batch: so many samples. begin: before a micro-step's forward;
    what it returns is held as long. beside: frozen networks that the model asks.
    """
    from triptych_core.optim.groups import parameter_groups
    from triptych_core.plan.plan import SAMPLES, plan_run, tracer, weights_of
    from triptych_models.fake import FORMULAS, WORKSPACES, pretend
    from triptych_models.freeze import parameter_parts
    from triptych_models.matrices import matrix_shapes

    trainee: Any = model
    groups = parameter_groups(
        model.named_parameters(),
        config.optim,
        parameter_parts(trainee).__getitem__,
        matrix_shapes(model),
    )
    threshold = config.engine.zero.persistence_threshold
    weights = weights_of(model, groups, threshold, config.optim, trainee.layers(), beside)
    with pretend(model, *beside):
        trace = tracer(model, make_batch, WORKSPACES, formulas=FORMULAS, begin=begin, beside=beside)
        return plan_run(config, weights, trace, size=config.data.batch_size, unit=SAMPLES)


def begin_samples(config: Any, plan: "Callable[[Any], Plan]") -> "tuple[Any, Runtime, str | None]":
    """Join the other ranks and settle what the configuration leaves open, and why so."""
    from triptych_core.launch import launch
    from triptych_core.plan.settle import settle

    runtime = launch(config.run)
    if config.model.compile == "auto":
        config.model.compile = "layers" if runtime.on_cuda else "none"
    config, chosen = settle(config, plan)
    return config, runtime, chosen


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
    from triptych_core.checkpoint.together import on_main
    from triptych_core.engine.averaged import averaged_weights
    from triptych_core.engine.recompiles import RecompileWatch
    from triptych_core.faults.folder_lock import hold, release
    from triptych_core.faults.oversight import Oversight
    from triptych_core.faults.watch import Watch
    from triptych_core.launch import shutdown
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.plan.postmortem import suggest_remedy
    from triptych_core.run import close_run, describe_run, open_run

    engine, model, batches = job.engine, job.model, job.batches
    patience = config.run.grace_seconds + 5  # within which an ending run saves and goes
    on_main(partial(hold, config.run.dir, patience, partial(print, flush=True)))
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
    release(config.run.dir)
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
