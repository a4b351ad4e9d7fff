"""Speed and memory of a training step on random packed rows: one process a variant, one table.

    python tools/make_bench_model.py bench/qwen3-1.7b --shape qwen3-1.7b
    python tools/bench_train.py bench/qwen3-1.7b bench/runs --variant plain --variant zero0

The model is of random weights, the loop is the stages' own (`triptych_core.loop.train`), but for
variants named plain, which are what a bare PyTorch loop does: the floor that an engine's cost is
counted from, and one rank's; those named deepspeed have DeepSpeed's engine where the stages take
our own. `guards=loss,watch,ledger` says what watches over the steps: by default the loss guard, in
zero0_unguarded nothing, in zero0_guarded all. Figures are of a rank, medians over the steps after
warm-up; every run keeps metrics.jsonl; a variant named twice runs twice. Shares of a step: waiting
for data; with --profile, of two more steps, the time in which the device waited for the host and
that in which it did nothing but communicate.

A mixture of experts on two devices:

    python tools/make_bench_model.py bench/moe --shape qwen3-30b-a3b-6l
    python tools/bench_train.py bench/moe bench/runs --ranks 2 --seq-len 8192 \\
        --variant stock_bf16_adam --variant zero1 --variant zero1_ep2
"""

import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import click
import torch
from bench_guards import guarded, read_guards
from step_profile import STEPS, Profile
from torch import Tensor

WARM_UP = 6
COMPILED = ["model.compile=layers"]
VARIANTS = {
    "plain": [*COMPILED, "loop=plain"],
    "plain_bf16_adam": [*COMPILED, "loop=plain_bf16_adam"],
    "plain_eager": ["loop=plain"],
    "plain_fp32": ["loop=plain", "engine.precision=fp32", "model.fuse=false"],
    "stock_bf16_adam": ["loop=plain_bf16_adam", "model=stock"],  # of a mixture, see bench_stock.py
    "zero0": [*COMPILED, "engine.zero.stage=0"],
    "zero0_bf16_states": [*COMPILED, "engine.zero.stage=0", "optim.state_dtype=bf16"],
    "zero0_unguarded": [*COMPILED, "engine.zero.stage=0", "guards="],
    "zero0_guarded": [*COMPILED, "engine.zero.stage=0", "guards=loss,watch,ledger"],
    "zero0_eager": ["engine.zero.stage=0"],
    "zero0_muon": [*COMPILED, "engine.zero.stage=0", "optim.name=muon"],
    "zero0_selective": [*COMPILED, "engine.zero.stage=0", "engine.checkpointing=selective"],
    "zero0_selective_bf16_states": [
        *COMPILED,
        "engine.zero.stage=0",
        "engine.checkpointing=selective",
        "optim.state_dtype=bf16",
    ],
    "zero0_full": [*COMPILED, "engine.zero.stage=0", "engine.checkpointing=full"],
    "zero0_offload": [*COMPILED, "engine.zero.stage=0", "engine.checkpointing=offload"],
    "zero1": [*COMPILED, "engine.zero.stage=1"],
    "zero1_deepspeed": [*COMPILED, "engine.zero.stage=1", "loop=deepspeed"],
    "zero1_eager": ["engine.zero.stage=1"],
    "zero1_muon": [*COMPILED, "engine.zero.stage=1", "optim.name=muon"],
    "zero1_bf16_reduce": [*COMPILED, "engine.zero.stage=1", "engine.reduce_dtype=bf16"],
    "zero2": [*COMPILED, "engine.zero.stage=2"],
    "zero2_deepspeed": [*COMPILED, "engine.zero.stage=2", "loop=deepspeed"],
    "zero3": [*COMPILED, "engine.zero.stage=3"],
    "zero3_deepspeed": [*COMPILED, "engine.zero.stage=3", "loop=deepspeed"],
    "zero3_eager": ["engine.zero.stage=3"],
    "zero3_bf16_reduce": [*COMPILED, "engine.zero.stage=3", "engine.reduce_dtype=bf16"],
    "zero3_selective": [*COMPILED, "engine.zero.stage=3", "engine.checkpointing=selective"],
    "zero3_keep": [*COMPILED, "engine.zero.stage=3", "engine.zero.max_live=4000000000"],
    "zero3_full": [*COMPILED, "engine.zero.stage=3", "engine.checkpointing=full"],
    "zero1_selective": ["engine.zero.stage=1", "engine.checkpointing=selective"],
    "zero1_full": [*COMPILED, "engine.zero.stage=1", "engine.checkpointing=full"],
}
VARIANTS |= {
    f"{name}_ep2": [*VARIANTS[name], "parallel.expert=2"]
    for name in ("zero1", "zero1_eager", "zero1_selective", "zero1_full", "zero3", "zero3_eager")
}


@click.command(context_settings={"show_default": True})
@click.argument("model", type=click.Path(exists=True, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--variant", "names", multiple=True, type=click.Choice(list(VARIANTS)))
@click.option("--ranks", default=1, help="processes, one a device")
@click.option("--steps", default=20, type=click.IntRange(WARM_UP + 2))
@click.option("--seq-len", default=16384, help="tokens a row")
@click.option("--document-len", default=1024, help="tokens a document")
@click.option("--image-share", default=0.0, help="of the tokens (vision-language models)")
@click.option("--image-tokens", default=1024, help="of an image")
@click.option("--audio-share", default=0.0, help="of the tokens (models that hear)")
@click.option("--audio-seconds", default=30.0, help="of a recording")
@click.option("--drawn-images", default=0, help="to draw beside each row (Bagel)")
@click.option("--latent-side", default=64, help="of their latents, not yet cut into patches")
@click.option(
    "--distinct-rows", default=0, help="go through so many rows again and again; 0 = never"
)
@click.option("--losses", type=click.Path(path_type=Path), help="plot the losses into this file")
@click.option("--together/--one-by-one", default=False, help="all variants at once, for losses")
@click.option("--profile/--no-profile", default=False, help="profile two steps more")
@click.option("--timeout", default=240, help="seconds a variant may take")
@click.option("--one", hidden=True, help="run this variant in this process")
@click.argument("overrides", nargs=-1)
def main(
    model: Path,
    out: Path,
    names: tuple[str, ...],
    ranks: int,
    timeout: int,
    one: str | None,
    losses: Path | None,
    together: bool,
    **settings: Any,
) -> None:
    """Train MODEL (a folder with config.json) a few steps per variant, into OUT."""
    if one is not None:
        run_variant(model, out / one, VARIANTS[one], **settings)
        return
    print(
        f"{'variant':28}{'tokens/s':>10}{'MFU':>8}{'peak GiB':>10}{'step ms':>9}{'loss':>9}"
        f"{'data':>7}{'host':>7}{'comm':>7}"
    )
    started = []
    for name in names or VARIANTS:
        used = 1 if is_plain(name) else ranks
        started.append((name, used, start_variant(model, out, name, used, settings)))
        if not together:
            print_figures(out, *started[-1], timeout)
    if together:
        for each in started:
            print_figures(out, *each, timeout)
    if losses is not None:
        plot_losses(out, [name for name, *_ in started], losses)


def is_plain(name: str) -> bool:
    """Whether a variant is a bare loop, of one process."""
    return any(word.startswith("loop=plain") for word in VARIANTS[name])


def start_variant(
    model: Path, out: Path, name: str, ranks: int, settings: dict[str, Any]
) -> subprocess.Popen[bytes]:
    """Start a variant in processes of its own."""
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    words = [sys.executable, *(several if ranks > 1 else []), __file__]
    words += [str(model), str(out), "--one", name]
    for key, value in settings.items():
        if key == "profile":
            words += ["--profile"] * value
        elif key != "overrides":
            words += [f"--{key.replace('_', '-')}", str(value)]
    (out / name).mkdir(parents=True, exist_ok=True)
    with (out / name / "log.txt").open("w") as log:
        return subprocess.Popen([*words, *settings["overrides"]], stdout=log, stderr=log)


def print_figures(
    out: Path, name: str, ranks: int, process: subprocess.Popen[bytes], timeout: int
) -> None:
    """Wait for a variant and print its row."""
    try:
        code = process.wait(timeout)
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait()
    row = figures(out / name, ranks) if code == 0 else failure(out / name, code)
    print(f"{name:28}{row}", flush=True)


def plot_losses(out: Path, names: list[str], path: Path) -> None:
    """Losses of all variants, and below how far each is from the first."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, (above, below) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6))
    wanted: list[float] = []
    for name in names:
        file = out / name / "metrics.jsonl"
        found = [json.loads(line)["loss"] for line in file.open()] if file.exists() else []
        wanted = wanted or found
        above.plot(range(1, len(found) + 1), found, label=name, linewidth=1)
        apart = [a - b for a, b in zip(found, wanted, strict=False)]
        below.plot(range(1, len(apart) + 1), apart, linewidth=1)
        if apart:
            worst = max(map(abs, apart))
            print(f"{name:28}{found[-1]:9.4f}  at most {worst:.4f} from {names[0]}")
    above.set_ylabel("loss")
    above.legend(fontsize="small")
    below.set_ylabel(f"minus that of {names[0]}")
    below.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(path)


def run_variant(
    model_dir: Path,
    run_dir: Path,
    words: list[str],
    *,
    steps: int,
    seq_len: int,
    distinct_rows: int,
    profile: bool,
    overrides: tuple[str, ...],
    **batch: Any,
) -> None:
    """Take the steps in this process."""
    from triptych_core.config import StageConfig, load_config
    from triptych_core.engine.build import deepspeed_init
    from triptych_core.launch import launch, shutdown
    from triptych_core.parallel.expert import make_expert_place
    from triptych_core.parallel.mesh import make_mesh
    from triptych_models.config import ModelConfig
    from triptych_models.experts import ExpertGroup
    from triptych_models.sequence import SequenceGroup

    words = [*words, *overrides]
    loop = next((w.partition("=")[2] for w in words if w.startswith("loop=")), "ours")
    of_model = dict(w.removeprefix("model.").split("=") for w in words if w.startswith("model."))
    rest = [w for w in words if not w.startswith(("model.", "model=", "loop=", "guards="))]
    guards = read_guards(words)
    config = load_config(
        StageConfig,
        None,
        [
            f"run.dir={run_dir}",
            f"run.steps={steps + STEPS * profile}",
            "optim.lr=1e-5",
            "log.every=1000",
            "log.progress=false",
            "schedule.kind=constant",
            *(["engine.zero.stage=0"] if loop.startswith("plain") else []),
            *([] if "loss" in guards else ["loss_guard.mode=off"]),
            *rest,
        ],
    )
    runtime = launch(config.run)
    settings = ModelConfig.model_validate({"path": model_dir, "init": "random", **of_model})
    mesh = make_mesh(config.parallel, runtime)
    sequence = SequenceGroup(mesh.sp_group, mesh.sp_size, mesh.sp_rank)
    place = make_expert_place(config.parallel, runtime)
    experts = ExpertGroup(place.group, place.size, place.rank, place.mark)
    if "model=stock" in words:
        model = build_stock(settings)
    else:
        born: Any = on_device
        if loop == "deepspeed" and config.engine.stage == 3:
            born = partial(deepspeed_init, config.engine, runtime.world_size)
        model = build(settings, config.engine, born, sequence, experts)
    batches = make_batches(model, seq_len, seed=mesh.dp_rank, **batch)
    if distinct_rows:
        batches = itertools.cycle(list(itertools.islice(batches, distinct_rows)))
    is_deepspeed = loop == "deepspeed"
    take = partial(
        train_ours, config=config, runtime=runtime, deepspeed=is_deepspeed, guards=guards
    )
    if loop.startswith("plain"):
        take = partial(train_plain, config=config, low_precision_states=loop != "plain")
    watch = Profile(run_dir, steps) if profile and runtime.rank == 0 else lambda step: None
    take(model, batches, watch=watch)
    shutdown()


def build(settings: Any, engine: Any, born: Any, sequence: Any, experts: Any) -> Any:
    """The model, filled where it is: the stages draw on the host, the same on any device."""
    from triptych_core.engine.build import compute_dtype, gather_parameters
    from triptych_models.families import build_shell

    with born():
        model = build_shell(settings, dtype=compute_dtype(engine), experts=experts)
    fill(model.hf, gather_parameters(engine))
    model.set_sequence(sequence)
    model.set_mlp_chunks(engine.mlp_chunks)
    if settings.compile == "layers":
        model.compile_layers()
    model.set_checkpointing(engine.checkpointing)
    return model


def build_stock(settings: Any) -> Any:
    """Transformers' own model in the place of ours."""
    from bench_stock import StockModel

    from triptych_models.pretend import build_pretend_model

    like = build_pretend_model(settings, dtype=torch.bfloat16)
    with on_device():
        model = StockModel(settings.path, like)
    fill(model.hf, lambda parameters: nullcontext())
    return model


def on_device() -> torch.device:
    """Where tensors are made within a `with` block."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@torch.no_grad()
def fill(hf: Any, gather: Any) -> None:
    """normal(0, 0.02), biases 0, norms 1, as an untrained model is."""
    from triptych_models.weights import own_parameters

    for module, own in own_parameters(hf):
        with gather(list(own.values())):
            for name, parameter in own.items():
                if "Norm" in type(module).__name__ and name.endswith("weight"):
                    parameter.fill_(1.0)
                else:
                    parameter.normal_(0.0, 0.0 if name.endswith("bias") else 0.02)


def make_batches(
    model: Any,
    seq_len: int,
    *,
    seed: int,
    drawn_images: int = 0,
    latent_side: int = 64,
    **shape: Any,
) -> Iterator[dict[str, Any]]:
    """Rows of random tokens, each of them a target; a new one every step, of the same shapes."""
    from triptych_models.pretend import pretend_batch

    generator = torch.Generator().manual_seed(seed)
    like = pretend_batch(model, seq_len, target_share=1.0, **shape)
    vocabulary = model.hf.config.get_text_config().vocab_size
    bounds = like["cu_seqlens"]
    starts = torch.repeat_interleave(bounds[:-1], bounds.diff(), output_size=seq_len)
    positions = (torch.arange(seq_len) - starts).expand_as(like["position_ids"]).contiguous()

    def tokens() -> Tensor:
        return torch.randint(vocabulary, (1, seq_len), generator=generator)

    while True:
        labels = torch.where(like["shift_labels"] == -100, -100, tokens())
        row = like | {
            "input_ids": tokens(),
            "shift_labels": labels,
            "position_ids": positions,
            "num_tokens": seq_len,
        }
        yield with_drawings(model, row, drawn_images, latent_side) if drawn_images else row


def with_drawings(model: Any, row: dict[str, Any], count: int, side: int) -> dict[str, Any]:
    """A Bagel's row with so many images to draw, of words of 60 tokens, before it."""
    from triptych_models.bagel.join import JoinImages
    from triptych_models.bagel.settings import DrawConfig

    config = model.hf.config
    latents = torch.randn(count, config.vae_config["z_channels"], side, side)
    images = {
        "latents": latents,
        "noise": torch.randn_like(latents),
        "times": torch.rand(count),
        "drops": torch.ones(count),
        "weights": torch.ones(count),
        "texts": ["words"] * count,
    }
    settings = DrawConfig(text_len=60, text_dropout=0.0)
    join = JoinImages(config, settings, lambda words: [1] * 60, 0)
    del row["token_order"]  # it is laid out again
    return join(row, images)


def train_ours(
    model: Any,
    batches: Any,
    *,
    config: Any,
    runtime: Any,
    watch: Any,
    deepspeed: bool,
    guards: list[str],
) -> None:
    """The loop and the engine of the stages; or DeepSpeed's engine where they take our own."""
    from triptych_core.engine.build import build_engine, deepspeed_engine
    from triptych_core.engine.recompiles import RecompileWatch
    from triptych_core.loop import train
    from triptych_core.metrics import Metrics
    from triptych_core.optim.groups import build_optimizer, parameter_groups
    from triptych_models.freeze import parameter_parts
    from triptych_models.matrices import matrix_shapes

    groups = parameter_groups(
        model.named_parameters(),
        config.optim,
        parameter_parts(model).__getitem__,
        matrix_shapes(model),
    )
    engine = (deepspeed_engine if deepspeed else build_engine)(
        model,
        build_optimizer(groups, config.optim),
        config.engine,
        config.optim,
        runtime.world_size,
        model.layers(),
    )
    with (
        Metrics(config, rank=runtime.rank, world_size=runtime.world_size) as metrics,
        guarded(guards, config, runtime, engine, metrics, batches) as watched,
    ):
        train(
            engine,
            watched.stream,
            config,
            flops=model.flops,
            metrics=metrics,
            part=model.take_part,
            on_step=[RecompileWatch(), watch, *watched.on_step],
            oversight=watched.oversight,
        )


def train_plain(
    model: Any, batches: Any, *, config: Any, low_precision_states: bool, watch: Any
) -> None:
    """A bare loop on one device: torch's fused AdamW, on fp32 masters or on the bf16 weights."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    weights = list(model.parameters())
    masters = weights if low_precision_states else [p.detach().float() for p in weights]
    optim = config.optim
    optimizer = torch.optim.AdamW(
        masters,
        lr=optim.lr,
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        fused=True,
    )
    with (config.run.dir / "metrics.jsonl").open("w") as file:
        for step in range(1, config.run.steps + 1):
            started = time.perf_counter()
            batch = next(batches)
            flops = model.flops(batch)
            on_device = {
                key: value.to(device)
                if isinstance(value, Tensor) and key != "image_grid_thw"
                else value
                for key, value in batch.items()
                if key != "num_tokens"
            }
            loss = model(**on_device).loss_sum / batch["num_targets"]
            loss.backward()
            torch.nn.utils.clip_grad_norm_(weights, optim.max_grad_norm, foreach=True)
            if not low_precision_states:
                for master, weight in zip(masters, weights, strict=True):
                    master.grad = weight.grad.float()  # one at a time: the bf16 gradient goes
                    weight.grad = None
            optimizer.step()
            if not low_precision_states:
                with torch.no_grad():
                    torch._foreach_copy_(weights, masters)
            optimizer.zero_grad(set_to_none=True)
            shown = loss.item()
            seconds = time.perf_counter() - started
            line = {
                "step": step,
                "loss": shown,
                "step_seconds": seconds,
                "tokens_per_second": batch["num_tokens"] / seconds,
                "mfu": flops / seconds / 989e12,
                "peak_memory_bytes": torch.cuda.max_memory_allocated()
                if device.type == "cuda"
                else 0,
            }
            file.write(json.dumps(line) + "\n")
            file.flush()
            watch(step)


def figures(run_dir: Path, ranks: int) -> str:
    """Medians over the steps after warm-up; of a profiled run also how long the device waited."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    measured = lines[WARM_UP:-STEPS] if (run_dir / "profile.txt").exists() else lines[WARM_UP:]

    def median(key: str) -> float:
        return statistics.median(line.get(key) or 0.0 for line in measured)

    peak = max(line["peak_memory_bytes"] for line in measured) / 2**30
    shares = run_dir / "shares.json"
    waits = json.loads(shares.read_text()) if shares.exists() else {}
    again = (run_dir / "log.txt").read_text().count(" again: ")
    return (
        f"{median('tokens_per_second') / ranks:10,.0f}{median('mfu'):8.1%}{peak:10.1f}"
        f"{median('step_seconds') * 1000:9.1f}{measured[-1]['loss']:9.4f}"
        f"{median('data_wait_seconds') / median('step_seconds'):7.1%}"
        + "".join(f"{waits[key]:7.1%}" if waits else f"{'-':>7}" for key in ("idle", "exposed"))
        + f"  {again} compiled again" * (again > 0)
    )


def failure(run_dir: Path, code: int) -> str:
    """What a run that ended badly said last."""
    lines = [line for line in (run_dir / "log.txt").read_text().splitlines() if "Error" in line]
    return f"  failed ({code}): {lines[0][:110] if lines else 'no word'}"


if __name__ == "__main__":
    main()
