"""A stage of one's own on the installed packages: own family, own data, Triptych's engine.

    deepspeed train.py --config train.yaml optim.lr=1e-3

Nothing of Triptych's repository is needed, only its packages core and models.
"""

import sys

import my_family  # noqa: F401  (names the family)
from my_data import Sums, SumsConfig

from triptych_core.config import StageConfig, parse_args, run_main
from triptych_models.config import ModelConfig


class TrainConfig(StageConfig):
    """Sections of this stage."""

    model: ModelConfig
    data: SumsConfig = SumsConfig()


def main(config: TrainConfig) -> None:
    """Train, save, export."""
    # Not at the top: the configuration is checked before torch is imported.
    from triptych_core.checkpoint.saver import Saver, resume
    from triptych_core.engine.build import (
        build_engine,
        compute_dtype,
        gather_parameters,
        read_parameters,
        sharded_init,
    )
    from triptych_core.launch import launch, shutdown
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_core.run import close_run, open_run
    from triptych_models.export import export
    from triptych_models.families import build_model
    from triptych_models.freeze import parameter_parts

    config.model.check_path()
    runtime = launch(config.run)
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}
    batches = Sums(config.data, **ranks)
    dtype = compute_dtype(config.engine)
    with sharded_init(config.engine, runtime.world_size):
        gather = gather_parameters(config.engine)
        model = build_model(config.model, dtype=dtype, gather=gather)
    part_of = parameter_parts(model).__getitem__
    groups = parameter_groups(model.named_parameters(), config.optim, part_of)
    engine = build_engine(
        model,
        build_optimizer(groups, config.optim),
        config.engine,
        config.optim,
        runtime.world_size,
        model.layers(),
    )
    resumed = resume(engine, config, batches)
    open_run(config, runtime, {}, resumed)
    with Metrics(config, **ranks, start_step=resumed.step) as metrics:
        train(
            engine,
            iter(batches),
            config,
            flops=model.flops,
            metrics=metrics,
            start_step=resumed.step,
            on_step=[Saver(engine, config, batches, metrics)],
        )
    export(
        model.hf,
        config.run.dir / "export",
        config.model.path,
        dtype=dtype,
        gather=read_parameters(config.engine),
        is_main=runtime.is_main,
        overwrite=True,
    )
    close_run(config, runtime)
    shutdown()


if __name__ == "__main__":
    run_main(main, parse_args(TrainConfig, sys.argv[1:], __doc__ or ""))
