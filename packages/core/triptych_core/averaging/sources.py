"""Inputs as the user names them: what each is, and which of them are taken."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from triptych_core.averaging.hf_folder import is_hf_folder, open_hf_folder
from triptych_core.averaging.own_checkpoint import is_own_checkpoint, open_own_checkpoint
from triptych_core.averaging.stored import Source
from triptych_core.averaging.universal import is_universal, open_universal
from triptych_core.checkpoint.folders import checkpoints


def expand(paths: Sequence[Path]) -> list[Path]:
    """The inputs, with a run's folder replaced by its checkpoints, oldest first.

    Raises:
        ValueError: a path is no folder.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise ValueError(
                f"{path}: must be a folder, got {'a file' if path.exists() else 'nothing there'}; "
                "name a model's directory, a checkpoint or a run"
            )
        inside = checkpoints(path)
        found += inside if inside and not is_hf_folder(path) else [path]
    twice = [path for path in found if sum(other.samefile(path) for other in found) > 1]
    if twice:
        raise ValueError(f"{twice[0]}: must be named once, got it twice; use weights instead")
    return found


def open_source(path: Path, like: Path | None = None, check: bool = False) -> Source:
    """An input's tables, whichever kind it is.

    Raises:
        ValueError: it is of no kind that is known, or broken.
    """
    source = _open_weights(path, like, check)
    adapters = sorted(name for name in source.tensors if ".lora_" in name)
    if adapters:
        raise ValueError(
            f"{path}: must hold whole weights, got adapters beside them ({len(adapters)} tensors, "
            f"as {adapters[0]}); average the exports of such runs, into which they are merged: an "
            "average of A and B is not the average of their product"
        )
    return source


def _open_weights(path: Path, like: Path | None, check: bool) -> Source:
    if is_hf_folder(path):
        return open_hf_folder(path)
    if is_own_checkpoint(path):
        return open_own_checkpoint(path, like, check)
    if is_universal(path):
        return open_universal(path, like)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path}: must hold whole weights, got an adapter; merge it into its model first, "
            "since an average of A and B is not the average of their product"
        )
    if any(path.glob("*zero_pp_rank_*_optim_states.pt")):
        raise ValueError(
            f"{path}: must be a universal checkpoint, got DeepSpeed's own; convert it by "
            "`python -m deepspeed.checkpoint.ds_to_universal`"
        )
    raise ValueError(
        f"{path}: must be a Hugging Face directory, a checkpoint of a run or a universal one, got "
        f"{sorted(file.name for file in path.iterdir())[:5]}; name the folder that holds weights"
    )


def in_order(sources: list[Source]) -> list[Source]:
    """Oldest first where all steps are known, else as the user named them."""
    if all(source.step is not None for source in sources):
        return sorted(sources, key=lambda source: source.step or 0)
    return sources


def take_last(
    sources: list[Source], last: int | None, spacing: int | None, window: int | None
) -> list[Source]:
    """The `last` newest within the newest `window` steps, at least `spacing` steps apart.

    Raises:
        ValueError: there are fewer, or steps are asked for that are not known.
    """
    if (spacing or window) and any(source.step is None for source in sources):
        unknown = next(source.path for source in sources if source.step is None)
        raise ValueError(
            f"--spacing and --window: must have the step of every input, got none for {unknown}; "
            "name it checkpoint-STEP or leave them out"
        )
    taken: list[Source] = []
    for source in reversed(in_order(sources)):
        if last is not None and len(taken) == last:
            break
        if taken and spacing and (taken[-1].step or 0) - (source.step or 0) < spacing:
            continue
        if taken and window and (taken[0].step or 0) - (source.step or 0) >= window:
            break
        taken.append(source)
    if last is not None and len(taken) < last:
        raise ValueError(
            f"--last: must be at most the {len(taken)} inputs there are to take, got {last}; "
            "name more or lower --spacing"
        )
    return taken[::-1]
