"""Whether stock transformers takes the folder of a tiny model that make_tiny_model.py wrote."""

from pathlib import Path

import click


def check_text(path: Path) -> None:
    """Load the directory as a user would, run one forward pass, print the parameter count."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        logits = model(**tokenizer(["Which digit is this?"], return_tensors="pt")).logits
    total = sum(p.numel() for p in model.parameters())
    shape = tuple(logits.shape)
    click.echo(f"{path}: {total:,} parameters, {len(tokenizer)} tokens, logits {shape}")


def check(path: Path) -> None:
    """Load the directory as a user would, run one forward pass, print the parameter counts."""
    import torch
    from PIL import Image
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(path))
    processor = AutoProcessor.from_pretrained(path)
    content = [{"type": "image"}, {"type": "text", "text": "Which digit is this?"}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True
    )
    inputs = processor(text=[text], images=[Image.new("RGB", (64, 64))], return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    tower = getattr(model.model, "visual", getattr(model.model, "vision_tower", None))
    vision = sum(p.numel() for p in tower.parameters())
    total = sum(p.numel() for p in model.parameters())
    click.echo(
        f"{path}: {total:,} parameters ({vision:,} vision, {total - vision:,} language), "
        f"{len(processor.tokenizer)} tokens, logits {tuple(logits.shape)}"
    )


def check_bagel(path: Path) -> None:
    """Build the model, which transformers has not, and print its parameter counts."""
    import torch

    from triptych_models.config import ModelConfig
    from triptych_models.families import build_shell
    from triptych_models.freeze import count_parameters

    with torch.device("meta"):
        counts = count_parameters(build_shell(ModelConfig(path=path), dtype=torch.float32))
    parts = ", ".join(f"{count:,} {part}" for part, count in counts.items())
    click.echo(f"{path}: {sum(counts.values()):,} parameters ({parts})")
