"""Gradients of the families on a GPU, as a stage computes them, against plain torch in fp32.

    python tools/check_families_gpu.py bench/check

Of each family (but dots1 and the two LLaVAs, which have no published shape here) a few layers of
published widths, all of whose kinds are among them, on random weights and one row or batch. Three
times the same step: plain torch in fp32 with torch's own attention, which is the truth; the same in
bf16, which is what rounding costs; and ours, in bf16, compiled, on the kernels that are taken here:
once as memory happens to be and once after what is free was filled with NaN, which shows what is
read before it is written. The rule is FlashAttention's: of the loss and of each tensor's gradient
our error may be at most twice that of plain bf16, and a little. Where that is half of a gradient or
more it says little: `blind` counts such. A case is a process of its own. Exit code 1 when any is
off.
"""

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from bench_families import CASES, DEEPSTACK, OMNI_TOWERS
from bench_train import make_batches, on_device
from make_bench_model import BARE, write_json, write_published
from torch import Tensor, nn

Build = Callable[[torch.dtype, bool], nn.Module]
"""of a dtype, plain or ours"""
OWN = 1e-2  # of a gradient's norm, beside twice plain bf16's error
WHOLE = 1e-4  # of the norm of all, for gradients that are 0 but for rounding
IMAGES: dict[str, Any] = {"image_share": 0.5, "image_tokens": 900}
SOUND: dict[str, Any] = {"audio_share": 0.25, "audio_seconds": 7.0}
FOUR = "num_hidden_layers=4"  # three of Gated DeltaNet and one of attention
FEW = "text_config.num_hidden_layers=2"
CLIPS = (16, 21, 60, 104)  # latents of 81 frames at 480p


class Case(NamedTuple):
    published: str
    """a family of published.py"""
    values: tuple[str, ...]
    """what config.json says otherwise"""
    shape: dict[str, Any]
    """of its row, see triptych_models.pretend"""


ROWS = {
    "qwen2": Case("qwen2", ("num_hidden_layers=2",), {}),
    "qwen3": Case("qwen3", ("num_hidden_layers=2",), {}),
    "qwen3_moe": Case("qwen3_moe", ("num_hidden_layers=2",), {}),
    "qwen2_moe": Case("qwen2_moe", ("num_hidden_layers=2",), {}),
    "mixtral": Case("mixtral", ("num_hidden_layers=2",), {}),
    "qwen3_vl": Case("qwen3_vl", (FEW, *DEEPSTACK), IMAGES),
    "qwen3_vl_moe": Case("qwen3_vl_moe", ("text_config.num_hidden_layers=3", *DEEPSTACK), IMAGES),
    "qwen2_5_vl": Case("qwen2_5_vl", ("num_hidden_layers=2", *OMNI_TOWERS[:2]), IMAGES),
    "internvl": Case("internvl", CASES["internvl3-2b"].shallow, IMAGES),
    "llava_onevision": Case("llava_onevision", CASES["llava-onevision-7b"].shallow, IMAGES),
    "llavaonevision1_5": Case("llavaonevision1_5", CASES["llava-onevision-1.5-4b"].shallow, IMAGES),
    "bagel": Case(
        "bagel",
        ("llm_config.num_hidden_layers=2", "vit_config.num_hidden_layers=3"),
        IMAGES | {"drawn_images": 2, "latent_side": 32},
    ),
    "qwen2_5_omni": Case("qwen2_5_omni_thinker", (FEW, *OMNI_TOWERS), IMAGES | SOUND),
    "qwen3_omni": Case(
        "qwen3_omni_moe_thinker",
        ("text_config.num_hidden_layers=3", *DEEPSTACK, "audio_config.encoder_layers=2"),
        IMAGES | SOUND,
    ),
    "aero": Case("aero", (FEW, "audio_config.encoder_layers=2"), SOUND),
    "qwen3_next": Case("qwen3_next", (FOUR, "num_experts=64"), {}),
    "qwen3_5": Case("qwen3_5", (f"text_config.{FOUR}", "vision_config.depth=2"), IMAGES),
    "qwen3_5_moe": Case("qwen3_5_moe", (f"text_config.{FOUR}", "vision_config.depth=2"), IMAGES),
    "qwen3_5_text": Case("qwen3_5_text", (FOUR,), {}),
    "qwen3_5_moe_text": Case("qwen3_5_moe_text", (FOUR,), {}),
}
SAMPLES = ("wan", "sit", "rae")
NAMES = (*ROWS, *SAMPLES)


class Step(NamedTuple):
    loss: Tensor
    gradients: dict[str, Tensor]


class Errors(NamedTuple):
    """How far a step is from the truth, and how far it may be."""

    loss: float
    whole: float
    """of all gradients together, of their norm"""
    ratio: float
    """of the worst gradient's error to what it may be: above 1 it is off"""
    worst: str
    off: list[str]
    """all that are, the first eight"""
    blind: int
    """gradients that may be off by half of themselves"""


def step(model: nn.Module, batch: Mapping[str, Any]) -> Step:
    """A forward and a backward."""
    model.zero_grad(set_to_none=True)
    loss = model(**batch).loss_sum / batch["num_targets"]
    loss.backward()
    found = {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None}
    return Step(loss.detach().double(), found)


def errors(truth: Step, rounded: Step, ours: Step) -> Errors:
    """What the rule says of ours."""
    if truth.gradients.keys() != ours.gradients.keys():
        other = sorted(truth.gradients.keys() ^ ours.gradients.keys())
        return Errors(0.0, 0.0, math.inf, f"has a gradient or none: {other[0]}", other[:8], 0)
    whole = norm(truth.gradients)
    ratios, apart, blind = {}, {}, 0
    for name, wanted in truth.gradients.items():
        found, plain = ours.gradients[name], rounded.gradients[name]
        assert found.shape == wanted.shape == plain.shape, name
        apart[name], size = found - wanted, float(wanted.norm())
        may_be = 2 * float((plain - wanted).norm()) + OWN * size + WHOLE * whole
        ratios[name] = share(float(apart[name].norm()), may_be)
        blind += may_be >= size / 2
    loss, plain_loss = (
        float((s.loss - truth.loss).abs() / truth.loss.abs()) for s in (ours, rounded)
    )
    ratios["the loss"] = share(loss, 2 * plain_loss + 1e-3)
    worst = max(ratios, key=ratios.__getitem__)
    off = [name for name, each in ratios.items() if each > 1]
    return Errors(loss, norm(apart) / whole, ratios[worst], worst, off[:8], blind)


def share(error: float, may_be: float) -> float:
    """Of a bound; infinite where one of both is no number, or none."""
    if not math.isfinite(error) or not math.isfinite(may_be):
        return math.inf
    if error == 0:
        return 0.0
    return error / may_be if may_be else math.inf


def norm(gradients: Mapping[str, Tensor]) -> float:
    return float(torch.stack([g.norm() for g in gradients.values()]).norm())


def check(build: Build, batch: Mapping[str, Any], attention: str = "sdpa") -> dict[str, Any]:
    """The three steps of a model, ours twice; a row of the table."""
    with plain_torch(attention):
        truth = step(build(torch.float32, True), batch)
        free()
        rounded = step(build(torch.bfloat16, True), batch)
        free()
    model = build(torch.bfloat16, False)
    runs = [step(model, batch)]
    model.zero_grad(set_to_none=True)  # or it would find the right ones where it must write them
    poison()
    runs.append(step(model, batch))
    worst = max((errors(truth, rounded, ours) for ours in runs), key=lambda each: each.ratio)
    return {
        "tensors": len(truth.gradients),
        "loss": float(truth.loss),
        "norm": norm(truth.gradients),
        "plain": errors(truth, rounded, rounded)._asdict(),
        "ours": worst._asdict(),
        "ok": worst.ratio <= 1,
    }


@contextmanager
def plain_torch(attention: str) -> Iterator[None]:
    """No kernels of ours; products in the precision of their dtype."""
    from triptych_kernels import use_backend

    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    # Attention by torch, a document at a time, and Gated DeltaNet in chunks: the references keep
    # every score, and every state.
    with use_backend("reference", attention=attention, gated_delta_rule="chunked"):
        yield
    torch.backends.cudnn.allow_tf32 = before


def free() -> None:
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def poison() -> None:
    """Fill the device's free memory, as far as a step may take it, with NaN and give it back.

    Free blocks within what the allocator holds are taken first, the large before the small.
    """
    if not torch.cuda.is_available():
        return
    torch.cuda.empty_cache()
    held = []
    for power in range(30, 8, -1):
        for _ in range(8):
            with suppress(torch.OutOfMemoryError):  # of every byte 255: NaN in every dtype
                held.append(torch.full((2**power,), 255, dtype=torch.uint8, device="cuda"))
    torch.cuda.synchronize()
    del held


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Products that keep the size of what they are given, norms about 1, biases about 0; the same
    in every dtype, and as bf16 has them."""
    generator = torch.Generator(on_device()).manual_seed(0)
    for name, parameter in model.named_parameters():
        drawn = torch.empty(parameter.shape, device=on_device()).normal_(generator=generator)
        if parameter.ndim > 1:
            fan_in = parameter.shape[-1] if parameter.ndim == 3 else parameter[0].numel()
            drawn *= fan_in**-0.5
        else:
            drawn = drawn * 0.1 + ("norm" in name.lower() and name.endswith("weight"))
        parameter.copy_(drawn.bfloat16())


def made_ready(model: Any, plain: bool) -> nn.Module:
    """With its weights, compiled unless it is plain, to train."""
    fill(model)
    if not plain:
        model.compile_layers()
    trained: nn.Module = model.train()
    return trained


def packed(folder: Path, case: Case, seq_len: int) -> tuple[Build, dict[str, Any]]:
    """A family of packed rows: how to build it, and its row."""
    from triptych_core.loop import to_device
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_shell

    write_published(folder / "model", case.published, case.values)

    def build(dtype: torch.dtype, plain: bool) -> nn.Module:
        how = {"fuse": not plain, "compile": "none" if plain else "layers"}
        settings = ModelConfig.model_validate({"path": folder / "model", "init": "random"} | how)
        with on_device():
            model = build_shell(settings, dtype=dtype)
        return made_ready(model, plain)

    with torch.device("meta"):
        shell = build_shell(ModelConfig(path=folder / "model", init="random"), dtype=torch.bfloat16)
    # Lengths that are no multiples of any kernel's tiles.
    shape = {"image_share": 0.0, "image_tokens": 900, "document_len": seq_len * 3 // 7} | case.shape
    torch.manual_seed(0)  # of what a Bagel draws
    batch = dict(shell.take_part(next(make_batches(shell, seq_len, seed=0, **shape))))
    further = {}
    if second := batch.get("num_second_targets", 0):
        further["second_weight"] = batch["num_targets"] / second  # as the loop says it
    return build, dict(to_device(batch, on_device())) | further


def latents(folder: Path, family: str, clip: tuple[int, ...]) -> tuple[Build, dict[str, Any]]:
    """A diffusion model of two blocks and its batch."""
    from triptych_models.diffusion.build import build_shell
    from triptych_models.diffusion.config import DiffusionModelConfig, ObjectiveConfig

    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(on_device())

    settings: dict[str, Any] = {"family": family, "init": "random"}
    objective = ObjectiveConfig()
    folder.mkdir(parents=True)
    if family == "wan":
        write_json(folder / "config.json", BARE["wan-2.1-t2v-1.3b"] | {"num_layers": 2})
        settings["path"], objective = folder, ObjectiveConfig(shift=5.0)
        count, shape = 1, clip
        condition = {"text_features": randn(1, 512, 4096), "empty_text": randn(1, 512, 4096)}
    else:
        sit = {"size": "custom", "hidden_size": 1152, "num_layers": 2, "num_heads": 16}
        settings["sit"] = sit | {"learn_sigma": True}
        count, shape = 32, (4, 32, 32)
        condition = {"labels": torch.arange(count, device=on_device())}

    def build(dtype: torch.dtype, plain: bool) -> nn.Module:
        config = DiffusionModelConfig.model_validate(settings | {"compile": "none"})
        with on_device():
            model = build_shell(config, objective, dtype=dtype).to(on_device())
        return made_ready(model, plain)

    x = randn(count, *shape)
    times = torch.linspace(0.1, 0.9, count, device=on_device())
    ones = torch.ones(count, device=on_device())
    batch = {"latents": x, "noise": randn(*x.shape), "times": times, "drops": ones}
    return build, batch | {"weights": ones, "num_targets": x.numel()} | condition


def images(folder: Path, count: int) -> tuple[Build, dict[str, Any]]:
    """RAE's decoder of two blocks, its judges of all their blocks, and images."""
    from triptych_models.autoencoder.build import build_rae
    from triptych_models.autoencoder.config import (
        AdversaryConfig,
        PerceptualConfig,
        RAEModelConfig,
    )
    from triptych_models.autoencoder.pretend import NUMBERS, USES

    for name in ("dinov2-with-registers-base", "dino-vits8"):
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", BARE[name])
    frozen = {"path": folder / "dino-vits8", "init": "random"}
    judges = (
        PerceptualConfig.model_validate(frozen),
        AdversaryConfig.model_validate(frozen | {"discriminator_start": 1, "start": 1}),
    )
    decoder = {"size": "custom", "hidden_size": 1152, "num_layers": 2, "num_heads": 16}
    settings = {
        "encoder": {"path": folder / "dinov2-with-registers-base", "init": "random"},
        "decoder": decoder | {"intermediate_size": 4096},
    }

    def build(dtype: torch.dtype, plain: bool) -> nn.Module:
        config = RAEModelConfig.model_validate(settings | {"compile": "none"})
        model = build_rae(config, *judges, dtype=dtype).to(on_device())
        with torch.no_grad():
            for module in (model.decoder, *model.beside):
                for parameter in module.parameters():
                    parameter.copy_(parameter.bfloat16())
        if not plain:
            model.compile_layers()
        model.train().begin_step(1)
        return model

    generator = torch.Generator().manual_seed(0)
    side = 256
    batch = {
        "pixels": torch.randint(256, (count, 3, side, side), generator=generator).byte(),
        "noise": torch.randn(count, 256, 768, generator=generator),
        "levels": torch.rand(count, generator=generator),
        "draws": torch.rand(count, USES, NUMBERS, generator=generator),
        "weights": torch.ones(count),
    }
    return build, {name: each.to(on_device()) for name, each in batch.items()} | {
        "num_targets": count
    }


def run_one(folder: Path, name: str, seq_len: int, small: bool, cudnn: bool) -> dict[str, Any]:
    """A case, in this process."""
    from triptych_core.launch import avoid_cudnn_attention

    if not cudnn:
        avoid_cudnn_attention()
    if name in ROWS:
        # What a Bagel draws sees more keys than it is long, which torch's own attention has not.
        return check(
            *packed(folder, ROWS[name], seq_len), "reference" if name == "bagel" else "sdpa"
        )
    if name == "rae":
        return check(*images(folder, 2 if small else 8))
    return check(*latents(folder, name, (16, 2, 6, 8) if small else CLIPS))


@click.command(context_settings={"show_default": True})
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--case", "names", multiple=True, type=click.Choice(NAMES), help="only this")
@click.option("--seq-len", default=4096, help="tokens of a row")
@click.option(
    "--small/--whole", default=False, help="on a CPU: little latents, few images; rows as they are"
)
@click.option("--cudnn/--no-cudnn", default=False, help="leave cuDNN's attention on, as torch does")
@click.option("--at-once", default=3, help="cases that run at the same time")
@click.option("--timeout", default=200, help="seconds that a case may take")
@click.option("--one", is_flag=True, hidden=True, help="in this process")
def main(
    out: Path,
    names: tuple[str, ...],
    seq_len: int,
    small: bool,
    cudnn: bool,
    at_once: int,
    timeout: int,
    one: bool,
) -> None:
    """Check the families, with logs in OUT, where none of them has been."""
    if not torch.cuda.is_available() and not small:
        raise click.UsageError("must have a CUDA device, got none; --small rehearses on a CPU")
    if one:
        found = run_one(out, names[0], seq_len, small, cudnn)
        (out / "found.json").write_text(json.dumps(found))
        return
    waiting, failed = list(dict.fromkeys(names or NAMES)), 0
    for name in waiting:
        if (out / name).exists():
            raise click.UsageError(f"OUT: must have no {name}, got {out}; name another folder")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{where}, torch {torch.__version__}")
    head = (
        f"{'':20}{'loss':>9}{'gradient':>10}{'plain bf16':>12}{'ours':>9}{'worst':>8}{'blind':>7}"
    )
    print(f"{head}  worst: of its bound, the furthest tensor", flush=True)
    running: list[tuple[str, float, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < at_once:
            name = waiting.pop(0)
            words = [sys.executable, __file__, str(out / name), "--case", name, "--one"]
            words += ["--seq-len", str(seq_len), *["--small"] * small, *["--cudnn"] * cudnn]
            out.mkdir(parents=True, exist_ok=True)
            with (out / f"{name}.log").open("w") as file:
                process = subprocess.Popen(words, stdout=file, stderr=file)
            running.append((name, time.monotonic() + timeout, process))
        name, until, process = running.pop(0)
        line, ok = finish(process, out / name, until)
        failed += not ok
        print(f"{name:20}{line}", flush=True)
    sys.exit(failed > 0)


def finish(process: subprocess.Popen[bytes], folder: Path, until: float) -> tuple[str, bool]:
    """A row of the table when a case has ended, at a moment of the clock at last, and whether it is
    right."""
    try:
        process.wait(max(0.0, until - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return "  failed: it took longer than --timeout", False
    if process.returncode:
        said = [x for x in folder.with_suffix(".log").read_text().splitlines() if "Error" in x]
        return f"  failed ({process.returncode}): {said[-1][:120] if said else 'no word'}", False
    found = json.loads((folder / "found.json").read_text())
    plain, ours = found["plain"], found["ours"]
    line = f"{found['loss']:9.4f}{found['norm']:10.3g}{plain['whole']:12.2e}{ours['whole']:9.2e}"
    line += f"{ours['ratio']:8.2f}{ours['blind']:7}  {ours['worst']}"
    return line + ("" if found["ok"] else f"  OFF: {', '.join(ours['off'])}"), found["ok"]


if __name__ == "__main__":
    main()
