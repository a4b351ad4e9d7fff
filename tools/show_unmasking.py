"""Ask a masked diffusion model, and show how its answer is filled in, a line a step.

    python tools/show_unmasking.py runs/sft/export "What is the capital of France?"
    python tools/show_unmasking.py MODEL "…" --max-new-tokens 64 --block-length 16

A dot is a mask. MODEL is a folder with a diffusion.json, such as the export of a run with
model.diffusion.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
from evaluate import run_command


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("question")
@click.option("--max-new-tokens", default=32, type=click.IntRange(min=1), help="masks to fill in")
@click.option("--block-length", type=click.IntRange(min=1), help="[default: MODEL's]")
@click.option("--tokens-per-step", type=click.IntRange(min=1), help="[default: MODEL's]")
@click.option("--device", default="cpu", help="of torch, such as cuda")
def show_unmasking(
    model: Path, question: str, max_new_tokens: int, device: str, **options: int | None
) -> None:
    """Print the answer of MODEL to QUESTION after every step, and how sure its tokens were."""
    loaded, processor = open_model(model, device, options)
    from triptych_models.masked_diffusion.sampler import Unmasked, fill_in, show_trace

    trace: list[Unmasked] = []
    prompt = encode(processor, question)
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": processor.eos_token_id}
    [answer] = fill_in(loaded, [prompt], **ends, trace=trace)

    def decode(ids: list[int]) -> str:
        return processor.decode(ids, skip_special_tokens=False)

    lines = show_trace(trace, decode, prompt=0, max_new_tokens=max_new_tokens)
    for event, line in zip(trace, lines, strict=True):
        click.echo(f"{event.step:4d}  {min(event.confidence):4.0%}  {line!r}")
    click.echo(processor.decode(answer))


def open_model(path: Path, device: str, options: dict[str, int | None]) -> tuple[Any, Any]:
    """The model, its sampler told otherwise where options say so, and its processor."""
    import torch

    from triptych_data.processor import Processor
    from triptych_models.config import ModelConfig
    from triptych_models.families import build_model
    from triptych_models.masked_diffusion.config import FILE, read_diffusion

    diffusion = read_diffusion(path)
    if diffusion is None:
        raise ValueError(
            f"{path}: must hold a {FILE}, got none; name the export of a run with model.diffusion"
        )
    given = {name: value for name, value in options.items() if value is not None}
    config = ModelConfig(path=path, compile="none", diffusion=diffusion.model_copy(update=given))
    config.check_path()
    model = build_model(config, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    return model.to(device), Processor.from_directory(path)


def encode(processor: Any, question: str) -> Any:
    """The prompt of a chat that asks this."""
    from triptych_data.sample import RawSample

    turns = [("user", question), ("assistant", "")]
    messages = [{"role": role, "content": text} for role, text in turns]
    return processor.encode_prompt(RawSample("question", "QUESTION", {"messages": messages}, []))[0]


if __name__ == "__main__":
    run_command(show_unmasking)
