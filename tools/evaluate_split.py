"""A Hugging Face directory on a device, and what it makes of a split of held-out shards."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from rich.progress import Progress

    from triptych_core.evaluation.evaluate import Answer

Result = dict[str, Any]
ROUND = 64  # rows are as long as the longest sample, and this makes lengths come again


@dataclass(frozen=True)
class Settings:
    """How a split is asked; bounds of None are those of the model's folder."""

    min_pixels: int | None = None
    max_pixels: int | None = None
    max_new_tokens: int = 32
    batch_size: int = 16
    max_questions: int = 2000
    seq_len: int | None = None


@dataclass
class Loaded:
    """A model on its device; to `heldout_loss` it is an engine."""

    path: Path
    model: Any
    device: torch.device
    is_warm: bool = False

    def __call__(self, **batch: Any) -> Any:
        """Summed loss of a row."""
        return self.model(**batch)

    def eval(self) -> None:
        """It is for nothing else."""

    def train(self) -> None:
        """It stays as it is."""


class Spent(NamedTuple):
    """What one question cost."""

    prompt_tokens: int
    image_tokens: int
    answer_tokens: int
    flops: float


@dataclass
class Meter:
    """What this rank's questions cost, and the seconds in which it answered."""

    spent: dict[int, Spent] = field(default_factory=dict)
    seconds: float = 0.0


def open_model(path: Path, dtype: str = "auto") -> Loaded:
    """The whole model on this rank's device. Raises ValueError for a folder that is not one."""
    import torch
    from deepspeed.accelerator import get_accelerator

    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.masked_diffusion.config import read_diffusion

    config = ModelConfig(path=path, compile="none", diffusion=read_diffusion(path))
    config.check_path()
    device = torch.device(get_accelerator().current_device_name())
    if dtype == "auto":
        dtype = "fp32" if device.type == "cpu" else "bf16"
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    model = build_model(config, dtype=kept).to(device).eval().requires_grad_(False)
    return Loaded(path, model, device)


def evaluate_split(
    loaded: Loaded,
    shards: Sequence[str],
    settings: Settings,
    progress: Progress | None = None,
    label: str = "",
) -> Result:
    """All numbers of the model on these shards, and its answers; the same on every rank.

    Raises ValueError for shards, samples or bounds that cannot be evaluated.
    """
    import torch.distributed as dist

    from triptych_core.evaluation.evaluate import (
        answer_questions,
        check_questions,
        heldout_loss,
        summarize,
    )
    from triptych_data.heldout import Heldout
    from triptych_models.masked_diffusion.noise import MaskRow

    diffusion = loaded.model.diffusion
    processor = open_processor(loaded, settings)
    heldout = Heldout(
        shards,
        processor,
        seq_len=settings.seq_len or longest_sample(shards, processor),
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        limit=settings.max_questions,
        finish=diffusion and MaskRow(diffusion, loaded.model.mask_token_id, seed=0),
    )
    if not heldout.questions:
        raise ValueError(
            f"--shards: must hold chats that end with an answer, got none in {', '.join(shards)}; "
            "name held-out shards of chats"
        )
    check_questions(heldout.questions)
    meter = Meter()
    answer = answerer(loaded, heldout, processor, settings, meter)
    if not loaded.is_warm:  # what happens once, in the first batch, is no point's cost
        answer([asked.index for asked in heldout.questions[: settings.batch_size]])
        loaded.is_warm = True
        meter.spent, meter.seconds = {}, 0.0
    stride = settings.batch_size * dist.get_world_size()
    steps = counted(answer, progress, label, -(-len(heldout.questions) // stride))
    answers = answer_questions(heldout.questions, steps, batch_size=settings.batch_size)
    evaluation = summarize(0, heldout_loss(loaded, heldout.batches()), answers, [])
    return {
        "model": str(loaded.path),
        "shards": list(shards),
        **settings_of(loaded, settings),
        "world_size": dist.get_world_size(),
        "loss": evaluation.heldout_loss,
        "score": evaluation.score,
        "scores": [asdict(score) for score in evaluation.scores],
        "exact_match": evaluation.exact_match,
        "majority": evaluation.majority,
        "counts": evaluation.counts,
        "cost": total_cost(meter),
        "answers": [
            describe(given, asked.where)
            for given, asked in zip(answers, heldout.questions, strict=True)
        ],
    }


def open_processor(loaded: Loaded, settings: Settings) -> Any:
    """The folder's processor with these bounds; bounds need a model that takes images."""
    from triptych_data.processor import Processor

    low, high = settings.min_pixels, settings.max_pixels
    processor = Processor.from_directory(loaded.path, min_pixels=low, max_pixels=high)
    bounds = {"--min-pixels": low, "--max-pixels": high}
    given = [name for name, value in bounds.items() if value is not None]
    if given and not processor.patch_size:
        raise ValueError(
            f"{given[0]}: must be left out for a model of text alone, got {loaded.path}"
        )
    loaded.model.check_processor(processor)
    return processor


def longest_sample(shards: Sequence[str], processor: Any) -> int:
    """Tokens of the longest sample, rounded up."""
    from triptych_data.plan.lengths import sample_lengths
    from triptych_data.shards.reader import Shards

    longest = int(sample_lengths(Shards.open(shards), processor).num_tokens.max(initial=1))
    return -(-longest // ROUND) * ROUND


def answerer(
    loaded: Loaded, heldout: Any, processor: Any, settings: Settings, meter: Meter
) -> Callable[[list[int]], list[str]]:
    """The model's answers to numbers of questions, measured."""
    from triptych_models.generate import generate

    def answer(questions: list[int]) -> list[str]:
        began = time.perf_counter()
        prompts = [heldout.prompt(question) for question in questions]
        rows = generate(
            loaded.model,
            prompts,
            max_new_tokens=settings.max_new_tokens,
            eos_token_id=processor.eos_token_id,
            pad_token_id=processor.pad_token_id,
        )
        meter.seconds += time.perf_counter() - began
        for question, prompt, row in zip(questions, prompts, rows, strict=True):
            length = min(len(row) + 1, settings.max_new_tokens)  # with what ends it
            most = settings.max_new_tokens
            meter.spent[question] = spent_on(loaded.model, processor, prompt, length, most)
        return [processor.decode(row) for row in rows]

    return answer


def spent_on(model: Any, processor: Any, prompt: Any, answer_tokens: int, most: int) -> Spent:
    """Tokens and FLOPs of one answer: causal attention over prompt and answer, with a cache.

    The last token is not computed on, padding of a batch not counted. A diffusion model computes
    the prompt and `most` tokens in each of its steps, were it to take all of them.
    """
    length = len(prompt.input_ids)
    batch = {
        "cu_seqlens": [0, length + answer_tokens - 1],
        "num_targets": answer_tokens,
        "image_grid_thw": prompt.image_grid_thw,
        "audio_lengths": prompt.audio_lengths if len(prompt.audio_lengths) else None,
    }
    stand_for_media = [processor.image_token_id, processor.video_token_id]
    image_tokens = sum(
        int((prompt.input_ids == token).sum()) for token in stand_for_media if token is not None
    )
    steps = 1
    if model.diffusion is not None:
        steps = -(-most // model.diffusion.tokens_per_step)
        batch["cu_seqlens"] = [0, length + most]
        batch["num_targets"] = min(most, model.diffusion.block_length)
    return Spent(length, image_tokens, answer_tokens, steps * float(model.flops(batch)))


def total_cost(meter: Meter) -> dict[str, float]:
    """Over all ranks, a question that several answered counted once; seconds of the slowest."""
    import torch.distributed as dist

    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (meter.spent, meter.seconds))
    spent = {index: each for found, _ in parts for index, each in found.items()}
    sums = {name: sum(getattr(each, name) for each in spent.values()) for name in Spent._fields}
    return {"questions": len(spent), **sums, "seconds": max(seconds for _, seconds in parts)}


def settings_of(loaded: Loaded, settings: Settings) -> Result:
    """What the numbers depend on, bounds as they came to be."""
    from triptych_data.media.rules import IMAGE_FILE, read_image_rules

    bounds = {"min_pixels": settings.min_pixels, "max_pixels": settings.max_pixels}
    if (loaded.path / IMAGE_FILE).exists():
        rules = read_image_rules(loaded.path, **bounds)[0]
        bounds = {"min_pixels": rules.min_pixels, "max_pixels": rules.max_pixels}
    dtype = next(loaded.model.parameters()).dtype
    return {**asdict(settings), **bounds, "dtype": str(dtype), "device": str(loaded.device.type)}


def describe(given: Answer, where: str) -> Result:
    """An answer for the JSON."""
    return {
        "where": where,
        "question": given.kind,
        "source": given.source,
        "metric": given.metric,
        "references": list(given.references),
        "answer": given.answer,
        "score": given.score,
    }


def counted(
    function: Callable[[list[int]], list[str]], progress: Progress | None, label: str, total: int
) -> Callable[[list[int]], list[str]]:
    """The function with a bar that each call moves on."""
    if progress is None:
        return function
    task = progress.add_task(label, total=total)

    def call(questions: list[int]) -> list[str]:
        answers = function(questions)
        progress.advance(task)
        progress.update(task, visible=not progress.tasks[task].finished)
        return answers

    return call
