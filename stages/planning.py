"""What is known of a run on packed rows before anything is built: its configuration and plan.

No stage itself: a stage says what of the configuration it sets otherwise.
"""

from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator
from running import share_seed

from triptych_core.config import StageConfig, did_you_mean
from triptych_data.config import CostConfig, DataConfig
from triptych_data.tensors.config import TensorDataConfig
from triptych_models.bagel.settings import DrawConfig
from triptych_models.catalogue import FAMILIES, Part
from triptych_models.config import ModelConfig

if TYPE_CHECKING:
    from triptych_core.launch import Runtime
    from triptych_core.plan.plan import Plan


class GenerationData(TensorDataConfig):
    """What `data` is of stages on latents."""

    KEY: ClassVar[str] = "generation.data"


class GenerationConfig(DrawConfig):
    """Images that a row holds beside its chats, their latents kept by `triptych-data latents`."""

    data: GenerationData


class PackedConfig(StageConfig):
    """Sections of every stage that trains a model on packed rows; a stage says its own defaults."""

    model: ModelConfig
    data: DataConfig
    generation: GenerationConfig | None = Field(
        None, description="latents that are learnt in the same rows; of a model that draws"
    )
    export: bool = Field(True, description="write run.dir/export, a Hugging Face directory")

    @model_validator(mode="after")
    def _check_parts(self) -> Self:
        trained = [part for part in get_args(Part) if part not in self.model.freeze]
        if not trained:
            raise ValueError("model.freeze: must leave a part to train, got all; name fewer")
        for part in self.optim.lr_by_part:
            if part not in trained:
                raise ValueError(
                    f"optim.lr_by_part.{part}: must be a part that trains, got '{part}'"
                    f"{did_you_mean(part, trained)}"
                )
        return self

    @model_validator(mode="after")
    def _check_row(self) -> Self:
        self.parallel.check_row(self.data.seq_len)
        if self.parallel.tensor > 1 and self.model.compile == "layers":
            raise ValueError(
                "model.compile: must be none with parallel.tensor, got layers; its sums over ranks "
                "break a layer's graph"
            )
        return self

    @model_validator(mode="after")
    def _check_lora(self) -> Self:
        if self.model.lora is None:
            return self
        for key, value, wanted in (
            ("model.freeze", self.model.freeze, []),
            ("model.compile", self.model.compile == "layers", False),
            ("parallel.tensor", self.parallel.tensor, 1),
            ("parallel.expert", self.parallel.expert, 1),
        ):
            if value != wanted:
                said = "layers" if key == "model.compile" else value
                raise ValueError(
                    f"{key}: must be left out with model.lora, got {said}; all of the base is "
                    "frozen, and its layers are neither compiled nor cut"
                )
        return self

    @model_validator(mode="after")
    def _check_generation(self) -> Self:
        if self.generation is None:
            return self
        if self.generation.data.text_field is None:
            raise ValueError(
                "generation.data.text_field: must name the words of an image, got nothing; name "
                "the field of the samples' JSON"
            )
        if self.generation.weight == 0 and "generation" not in self.model.freeze:
            raise ValueError(
                "generation.weight: must be above 0 for a part that trains, got 0; weights without "
                "a gradient would decay: add generation to model.freeze"
            )
        if self.replay.step != "no":
            raise ValueError(
                f"replay.step: must be no with generation, got {self.replay.step}; only rows of "
                "chats are replayed"
            )
        return self

    @model_validator(mode="after")
    def _share_seed(self) -> Self:
        share_seed(self)
        if self.generation is not None and "seed" not in self.generation.data.model_fields_set:
            self.generation.data.seed = self.run.seed
        return self


def require_part(config: PackedConfig, part: Part, what: str, remedy: str) -> None:
    """Raise ValueError unless the model's family has this part, which a stage is about."""
    family = config.model.find_family()
    if part not in FAMILIES[family].parts:
        raise ValueError(
            f"model.path: must hold {what}, got {config.model.path} ({family}); {remedy}"
        )


def settle_parts(config: PackedConfig) -> str | None:
    """Freeze what rows without latents cannot train, and say so: without a gradient weights would
    still decay. Raises ValueError for settings of such a part, and if no other is left to train."""
    part: Part = "generation"
    if config.generation is not None or part not in FAMILIES[config.model.find_family()].parts:
        return None
    lora = config.model.lora
    for key, is_named in (
        (f"optim.lr_by_part.{part}", part in config.optim.lr_by_part),
        ("model.lora.targets", lora is not None and part in lora.targets),
    ):
        if is_named:
            raise ValueError(
                f"{key}: must leave {part} out of a run of chats alone, got it; set "
                "generation.data.shards for latents to learn"
            )
    if lora is not None or part in config.model.freeze:
        return None
    config.model.freeze = [*config.model.freeze, part]
    config.model.check_path()
    return f"{part}, since the rows hold no latents to learn"


def begin(config: PackedConfig) -> "tuple[PackedConfig, Runtime, str | None]":
    """Join the other ranks and settle what the configuration leaves open, and why so."""
    from triptych_core.launch import launch
    from triptych_core.plan.settle import settle

    runtime = launch(config.run)
    config.parallel.check_ranks(runtime.world_size)  # before a plan is made for them
    config.model.compile = settle_compile(config, on_cuda=runtime.on_cuda)
    settle_cost(config)  # first: a configuration that was settled names everything
    config, chosen = settle(config, plan)
    return config, runtime, chosen


def settle_compile(config: PackedConfig, *, on_cuda: bool) -> Literal["none", "layers"]:
    """What model.compile=auto comes to on this device."""
    if config.model.compile != "auto":
        return config.model.compile
    parallel = config.parallel
    if config.model.lora is not None or parallel.tensor > 1:
        return "none"
    return "layers" if on_cuda else "none"


def settle_cost(config: PackedConfig) -> None:
    """Let `data.cost` be what this model computes on packs, unless something of it is named."""
    import torch

    from triptych_models.layout import ear, tower
    from triptych_models.pack_cost import pack_cost
    from triptych_models.pretend import build_pretend_model

    if "cost" not in config.data.model_fields_set:
        model = build_pretend_model(config.model, dtype=torch.float32)
        sees, hears = tower(model.hf) is not None, ear(model.hf) is not None
        ratios = pack_cost(model.flops, images=sees, sound=hears)
        config.data.cost = CostConfig.model_validate(ratios)


def plan(config: PackedConfig) -> "Plan":
    """What a step needs and how long it takes, from config.json alone."""
    from triptych_core.engine.build import compute_dtype
    from triptych_core.optim.groups import parameter_groups
    from triptych_core.plan.plan import plan_run, tracer, weights_of
    from triptych_models.experts import ExpertGroup
    from triptych_models.fake import CROSSINGS, WORKSPACES, pretend
    from triptych_models.freeze import parameter_parts
    from triptych_models.matrices import matrix_shapes
    from triptych_models.pretend import build_pretend_model, pretend_batch, pretend_part
    from triptych_models.sequence import SequenceGroup

    # Of both its first rank.
    sequence = SequenceGroup(size=config.parallel.sequence)
    model = build_pretend_model(
        config.model,
        dtype=compute_dtype(config.engine),
        sequence=sequence,
        experts=ExpertGroup(size=config.parallel.expert),
    )
    model.set_mlp_chunks(config.engine.mlp_chunks)
    part_of, matrices = parameter_parts(model).__getitem__, matrix_shapes(model)
    groups = parameter_groups(model.named_parameters(), config.optim, part_of, matrices)
    threshold = config.engine.zero.persistence_threshold
    weights = weights_of(model, groups, threshold, config.optim, model.layers())
    make_batch = partial(
        pretend_batch,
        model,
        document_len=config.plan.document_len,
        image_share=config.plan.image_share,
        target_share=config.plan.target_share,
        image_tokens=config.plan.image_tokens,
        audio_share=config.plan.audio_share,
        audio_seconds=config.plan.audio_seconds,
    )
    seq_len = config.data.seq_len + drawn_tokens(config)
    with pretend(model):
        trace = tracer(
            model,
            make_batch,
            WORKSPACES,
            crossings=CROSSINGS,
            part=partial(pretend_part, model=model),
            sequence=sequence.size,
        )
        return plan_run(config, weights, trace, size=seq_len)


def drawn_tokens(config: PackedConfig) -> int:
    """How much longer rows are by the images that are drawn in them, of the first one's size."""
    if config.generation is None:
        return 0
    from triptych_data.tensors.loader import open_batches
    from triptych_models.bagel.join import slot_tokens
    from triptych_models.bagel.model import read_bagel

    data = config.generation.data
    *_, height, width = open_batches(data, data.shards, None).shape
    latents = height * width // read_bagel(config.model.path).latent_patch_size ** 2
    return data.batch_size * slot_tokens(config.generation, latents)
