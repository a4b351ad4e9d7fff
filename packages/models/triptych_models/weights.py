"""Fill a model's weights, at random or from safetensors, whole or sharded over ranks.

A parameter may live in pieces on many ranks (ZeRO-3). `gather` makes parameters whole for the time
of a `with` block and keeps what rank 0 wrote into them; every rank runs the same blocks.
"""

import json
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from .expert_weights import draw_experts, router_biases, stored_names, stored_pieces
from .experts import Experts
from .layout import ear, stored_name, stored_prefixes, text_config, tower

# Norms that multiply by 1 + weight; they begin with 0.
ZERO_CENTRED = ("Qwen3NextRMSNorm", "Qwen3_5RMSNorm", "Qwen3_5MoeRMSNorm")

Gather = Callable[[list[nn.Parameter]], AbstractContextManager[Any]]


def whole(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """The gather of parameters that are whole already."""
    return nullcontext()


def own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, nn.Parameter]]]:
    """Each module with the parameters it holds itself, by full name; a tied one comes once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        own = {
            f"{prefix}.{name}": parameter
            for name, parameter in module.named_parameters(recurse=False)
            if id(parameter) not in seen
        }
        seen.update(id(parameter) for parameter in own.values())
        if own:
            yield module, own


@torch.no_grad()
def fill_modules(
    modules: Iterable[tuple[nn.Module, dict[str, nn.Parameter]]],
    read: Callable[[str], Tensor],
    gather: Gather,
    *,
    where: Path,
    remedy: str,
) -> None:
    """Copy `read(name)` into each parameter of `own_parameters`, a module at a time.

    Raises ValueError, with `where` and `remedy`, for a tensor of another shape.
    """
    for _, own in modules:
        with gather(list(own.values())):
            for name, parameter in own.items():
                key = name.removeprefix(".")
                value = read(key)
                if value.shape != parameter.shape:
                    raise ValueError(
                        f"{where}: {key} must be {list(parameter.shape)}, got "
                        f"{list(value.shape)}; {remedy}"
                    )
                parameter.copy_(value)


@torch.no_grad()
def initialize(hf: PreTrainedModel, seed: int, gather: Gather = whole) -> None:
    """Draw weights by transformers' rule: normal(0, initializer_range), biases 0, norms 1.

    Drawn in fp32 on the host from one generator, then cast: the same seed gives bit-identical
    weights for any device, number of ranks and sharding.
    """
    generator = torch.Generator().manual_seed(seed)
    sections = {
        id(module): getattr(hf.config, name)
        for name, part in (("vision_config", tower(hf)), ("audio_config", ear(hf)))
        if part is not None
        for module in part.modules()
    }
    for module, own in own_parameters(hf):
        section = sections.get(id(module), text_config(hf.config))
        std = getattr(section, "initializer_range", 0.02)  # SigLIP's section does not say it
        with gather(list(own.values())):
            for name, parameter in own.items():
                if name.endswith(".image_newline"):  # LLaVA-OneVision's line break
                    std = section.hidden_size**-0.5
                if name.endswith((".lambda_1", ".lambda_2")):  # InternVL's scales of layers
                    parameter.fill_(section.layer_scale_init_value)
                    continue
                parameter.copy_(initial_value(module, name, parameter, std, generator))
    for bias in router_biases(hf).values():
        bias.zero_()


def initial_value(
    module: Any, name: str, parameter: Tensor, std: float, generator: torch.Generator
) -> Tensor:
    """First value of a parameter, fp32 on the host; the rule of PreTrainedModel._init_weights,
    unless the module has a rule of its own."""
    if hasattr(module, "first_value"):
        own: Tensor = module.first_value(name.rpartition(".")[2])
        return own
    if name.endswith(".bias"):
        return constant(0.0, parameter)
    if "Norm" in type(module).__name__:
        return constant(float(type(module).__name__ not in ZERO_CENTRED), parameter)
    if name.endswith(".dt_bias"):
        return constant(1.0, parameter)
    if name.endswith(".A_log"):  # the logarithm of what is uniform in [0.01, 16)
        drawn = torch.normal(0.0, 1.0, parameter.shape, generator=generator, device="cpu")
        return (0.01 + 15.99 * torch.special.ndtr(drawn)).log()
    if isinstance(module, Experts):
        return draw_experts(module, parameter, std, generator)
    # torch.normal, because zero.Init redirects torch.randn, full … to its own device and dtype
    value = torch.normal(0.0, std, parameter.shape, generator=generator, device="cpu")
    padding = getattr(module, "padding_idx", None)
    if padding is not None:
        value[padding] = 0.0
    return value


def constant(value: float, like: Tensor) -> Tensor:
    return torch.full_like(like, value, dtype=torch.float32, device="cpu")


@torch.no_grad()
def load_weights(hf: PreTrainedModel, directory: Path, gather: Gather = whole) -> None:
    """Read model.safetensors, or its shards by index, into the model, one module at a time.

    Names are those of published folders, or of transformers' modules. Raises ValueError that lists
    tensors missing, unexpected or of another shape.
    """
    files = weight_files(directory)
    prefixes = stored_prefixes(hf.config, files)
    modules: list[tuple[Any, dict[str, nn.Parameter]]] = [
        (module, {stored_name(name, prefixes): p for name, p in own.items()})
        for module, own in own_parameters(hf)
    ]
    biases = router_biases(hf)
    wanted = {*biases} | {
        each
        for module, own in modules
        for name in own
        if not is_left_out(module, name, files)
        for each in stored_names(module, name, files)
    }
    misfits = []
    with ExitStack() as stack:
        readers = {
            file: stack.enter_context(open_weights(file)) for file in sorted(set(files.values()))
        }

        def shape_of(key: str) -> list[int]:
            return list(readers[files[key]].get_slice(key).get_shape())

        check_names(directory, wanted, files, readers, hf)

        def fill(key: str, rows: slice, place: Tensor) -> None:
            stored = readers[files[key]].get_slice(key)[rows]
            if stored.shape == place.shape:
                place.copy_(stored)
            else:
                misfits.append(f"{key} {list(stored.shape)} ≠ {list(place.shape)}")

        for module, own in modules:
            with gather(list(own.values())):
                for name, parameter in own.items():
                    if is_left_out(module, name, files):
                        parameter.copy_(module.first_value(name.rpartition(".")[2]))
                        continue
                    for piece in stored_pieces(module, name, parameter, files, shape_of):
                        fill(*piece)
        for name, bias in biases.items():  # on every rank whole
            fill(name, slice(None), bias)
    if misfits:
        raise ValueError(
            f"{directory}: shapes in the files must equal the model's, got {', '.join(misfits)}; "
            "check that config.json belongs to these weights"
        )


def is_left_out(module: nn.Module, name: str, files: Collection[str]) -> bool:
    """Whether a folder lacks a weight that it may lack, which then begins as at random."""
    return name not in files and getattr(module, "is_optional", False)


def weight_files(directory: Path) -> dict[str, Path]:
    """File of each stored tensor; ValueError if the directory has no safetensors."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return {name: directory / file for name, file in read_index(index).items()}
    # Bagel is published as the averages of its weights, under that name.
    single, averages = directory / "model.safetensors", directory / "ema.safetensors"
    single = averages if averages.is_file() and not single.is_file() else single
    if not single.is_file():
        raise ValueError(
            f"model.path: must hold model.safetensors or its index, got {directory}; "
            "set model.init=random to start without weights"
        )
    with open_weights(single) as reader:
        return dict.fromkeys(reader.keys(), single)


def open_weights(file: Path) -> Any:
    """A safetensors file, open. Raises ValueError for one that is missing, cut off or damaged."""
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file}: must be a whole safetensors file, got {error}; copy or download it again"
        ) from error


def read_index(index: Path) -> dict[str, str]:
    """The file of each tensor. Raises ValueError for names that are none of files beside it."""
    try:
        weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{index}: must hold a weight_map, got {error!r}; copy or download it again"
        ) from error
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise ValueError(
                f"{index}: must name files of its own folder, got {file!r} for {name}; download it "
                "again"
            )
    return weight_map


def check_names(
    directory: Path,
    wanted: set[str],
    files: dict[str, Path],
    readers: dict[Path, Any],
    hf: PreTrainedModel,
) -> None:
    """ValueError unless exactly the wanted tensors are stored; a tied head may be stored twice.

    What stock leaves aside (layers that predict several tokens at once) may be stored, too.
    """
    (pair,) = hf._tied_weights_keys.items()  # lm_head.weight and the embedding's name
    prefixes = stored_prefixes(hf.config, files)
    head, embedding = tied = tuple(stored_name(name, prefixes) for name in pair)
    ignored = hf._keys_to_ignore_on_load_unexpected or ()
    stored = {name for name in files if not any(re.search(each, name) for each in ignored)}
    if hf.config.tie_word_embeddings and {head, embedding} <= stored:
        copies = [readers[files[name]].get_tensor(name) for name in tied]
        if not torch.equal(*copies):
            raise ValueError(
                f"{directory}: {head} must equal {embedding} when tie_word_embeddings is true, "
                "got two values; set tie_word_embeddings to false in config.json"
            )
        stored.remove(head)
    if stored != wanted:
        raise ValueError(
            f"{directory}: tensors must be those of the model, got missing "
            f"{sorted(wanted - stored)} and unexpected {sorted(stored - wanted)}; "
            "check that config.json belongs to these weights"
        )
