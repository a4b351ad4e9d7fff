"""The sections every stage's configuration has: each key with its type, default and meaning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Unit = Annotated[float, Field(ge=0.0, le=1.0)]


class Section(BaseModel):
    """A part of the configuration tree: typed, documented, closed to unknown keys."""

    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where a run lives and how long it is."""

    dir: Path = Field(Path("runs/default"), description="run folder; everything written goes here")
    steps: int = Field(1000, ge=1, description="optimizer steps in the whole run")
    seed: int = Field(
        0,
        ge=0,
        description="of all generators; and of weights and data, unless they have their own",
    )
    device: Literal["auto", "cpu"] = Field(
        "auto", description="auto: what DeepSpeed's accelerator finds; cpu: never a GPU"
    )
    hang_seconds: Literal["auto"] | Annotated[float, Field(ge=0)] = Field(
        "auto",
        description="a rank that does nothing for so long ends the job, with stacks of all ranks; "
        "auto: 10 s or 3 times the slowest step; 0: never",
    )
    grace_seconds: float = Field(
        25.0,
        gt=0,
        description="after SIGTERM, SIGUSR1 or Ctrl-C a rank leaves without a checkpoint if "
        "stopping takes longer; DeepSpeed's launcher kills after 30 s",
    )


class ScheduleConfig(Section):
    """The learning rate over steps, as a factor on every group's own rate."""

    kind: Literal["constant", "cosine", "linear", "wsd"] = Field("cosine", description="shape")
    warmup_steps: int = Field(0, ge=0, description="steps of linear rise from 0")
    decay_steps: int = Field(0, ge=0, description="wsd only: steps of linear fall at the end")
    min_ratio: Unit = Field(0.0, description="the factor reached at the last step")


class MuonConfig(Section):
    """Muon: momentum whose matrices are made orthogonal."""

    lr: float | None = Field(
        None,
        gt=0,
        description="peak rate of matrices, by default optim.lr; optim.lr_by_part moves it in the "
        "same proportion",
    )
    momentum: float = Field(0.95, ge=0, lt=1, description="decay of the momentum")
    nesterov: bool = Field(True, description="look ahead by one step of momentum")
    ns_steps: int = Field(5, ge=1, description="Newton-Schulz steps")
    lr_scale: Literal["match_rms_adamw", "original"] = Field(
        "match_rms_adamw",
        description="of a matrix (M, N): 0.2 sqrt(max(M, N)), which makes updates as large as "
        "AdamW's, so that its lr and weight decay can be kept; or sqrt(max(1, M/N))",
    )


class OptimConfig(Section):
    """AdamW, or Muon for matrices and AdamW for the rest, with fp32 master weights."""

    name: Literal["adamw", "muon"] = Field(
        "adamw",
        description="muon: for weights of linear layers; embeddings, output layer, convolutions, "
        "norms and biases stay with AdamW",
    )
    lr: float = Field(1e-4, gt=0, description="peak learning rate")
    lr_by_part: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict, description="peak rate of a named part, e.g. {vision: 1e-5}"
    )
    weight_decay: float = Field(0.01, ge=0, description="on matrices; never on norms and biases")
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="added to the root of the second moment")
    max_grad_norm: float = Field(1.0, ge=0, description="clip the global norm; 0 = never")
    state_dtype: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="of AdamW's moments; bf16 halves them and rounds stochastically. Muon's "
        "momentum stays fp32",
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keep an fp32 moving average of the weights, of this decay (e.g. 0.999); "
        "evaluation and export are then of it",
    )
    ema_warmup: bool = Field(
        False, description="a decay of at most (1 + t) / (10 + t) at step t: forget the start soon"
    )
    muon: MuonConfig = MuonConfig()


class ZeroConfig(Section):
    """What is partitioned over data-parallel ranks."""

    stage: Literal[0, 1, 2, 3, "auto"] = Field(
        "auto",
        description="0 nothing, 1 optimizer states, 2 + gradients, 3 + parameters; auto: the "
        "lowest that fits the device by the plan",
    )
    offload_optimizer: bool = Field(False, description="keep optimizer states in host memory")
    offload_params: bool = Field(False, description="keep parameters in host memory (stage 3)")
    bucket_size: int = Field(
        500_000_000,
        ge=1,
        description="elements per reduce and all-gather bucket; our own engine takes at most 25 "
        "million, under stage 3 a layer",
    )
    persistence_threshold: int = Field(
        100_000,
        ge=0,
        description="stage 3: parameters below this many elements are gathered "
        "once a step, not with their layer; what is offloaded has them whole",
    )
    max_live: int = Field(
        1_000_000_000,
        ge=1,
        description="stage 3: elements that may be whole at the same time; the last layers stay so "
        "between forward and backward as far as it goes",
    )

    @property
    def offloads(self) -> bool:
        """Whether anything is kept in host memory."""
        return self.offload_optimizer or self.offload_params


class EngineConfig(Section):
    """How a step is computed."""

    precision: Literal["bf16", "fp32"] = Field("bf16", description="of weights and activations")
    gradient_accumulation_steps: int = Field(1, ge=1, description="packs per rank and step")
    reduce_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="in which gradients cross ranks; bf16 halves the traffic and rounds"
    )
    checkpointing: Literal["none", "selective", "full", "offload", "auto"] = Field(
        "none",
        description="what a layer keeps for its backward: all; selective: what matrix products and "
        "attention gave; full: its input only; offload: that in host memory. The rest is computed "
        "again. auto: what is fastest of what fits by the plan",
    )
    mlp_chunks: int = Field(
        1,
        ge=1,
        description="the language layers' MLPs take a row in so many chunks and compute each again "
        "in its backward; for long rows",
    )
    zero: ZeroConfig = ZeroConfig()

    @property
    def stage(self) -> int:
        """The ZeRO stage, once it is settled."""
        assert self.zero.stage != "auto", "settle the configuration first"
        return self.zero.stage

    @model_validator(mode="after")
    def _check_combinations(self) -> EngineConfig:
        zero = self.zero
        if zero.offload_params and zero.stage not in (3, "auto"):
            raise ValueError(
                f"engine.zero.offload_params: must go with stage 3, got stage {zero.stage}; "
                "set engine.zero.stage=3 or offload only the optimizer"
            )
        if zero.offload_optimizer and zero.stage == 0:
            raise ValueError(
                "engine.zero.offload_optimizer: must go with stage 1, 2 or 3, got stage 0; "
                "set engine.zero.stage=1"
            )
        if self.mlp_chunks > 1 and self.checkpointing == "selective":
            raise ValueError(
                "engine.mlp_chunks: must be 1 with engine.checkpointing=selective, which keeps "
                f"what the MLP's products gave, got {self.mlp_chunks}; take full or offload"
            )
        return self


class ParallelConfig(Section):
    """What ranks share beside the states that ZeRO partitions."""

    sequence: int = Field(
        1,
        ge=1,
        description="consecutive ranks that hold one packed row between them, each its part of the "
        "tokens (Ulysses); must divide the ranks, data.seq_len and the attention heads",
    )
    tensor: int = Field(
        1,
        ge=1,
        description="consecutive ranks that divide the language layers' weights between them, each "
        "its part of heads and MLPs (DeepSpeed's AutoTP); must divide the ranks, the key heads and "
        "the MLPs' width; with engine.zero.stage 1, 2 or 3",
    )

    expert: int = Field(
        1,
        ge=1,
        description="consecutive ranks that divide every layer's experts between them and send "
        "each other their tokens; must divide the ranks and the experts",
    )

    @property
    def ranks_per_row(self) -> int:
        """How many ranks read the same row."""
        return self.sequence * self.tensor

    def check_ranks(self, world_size: int) -> None:
        """Raise ValueError unless so many ranks can be grouped by the rows they hold."""
        n, tensor, size = self.sequence, self.tensor, self.ranks_per_row
        if world_size % size:
            key = "parallel.sequence" if tensor == 1 else "parallel.tensor"
            what = f"{key}{' times parallel.sequence' if n > 1 and tensor > 1 else ''}"
            raise ValueError(
                f"{what}: must divide the number of ranks ({world_size}), got {size}; "
                f"start a multiple of {size} ranks or lower it"
            )

    def check_row(self, seq_len: int) -> None:
        """Raise ValueError unless a row of seq_len tokens can be cut into equal parts."""
        if seq_len % self.sequence:
            raise ValueError(
                f"data.seq_len: must be a multiple of parallel.sequence ({self.sequence}), got "
                f"{seq_len}; take {seq_len - seq_len % self.sequence or self.sequence}"
            )


class CheckpointConfig(Section):
    """When the state is saved and what is kept."""

    save: bool = Field(True, description="save at all; false for measurements")
    every: int = Field(500, ge=0, description="steps between saves; 0 = only the last step")
    keep: int = Field(2, ge=1, description="how many checkpoints stay on disk")
    background: bool = Field(
        True,
        description="write while training goes on, from a copy in host memory of what the rank "
        "holds: weights and optimizer states in fp32, divided by the ranks",
    )
    resume: Literal["auto", "never"] = Field(
        "auto",
        description="auto: go on from the run folder's newest checkpoint if there is one; "
        "never: refuse a folder that has any",
    )
    resume_anyway: bool = Field(
        False,
        description="go on although the model's configuration is another than the checkpoint's; "
        "run.json keeps what differed",
    )


class EvaluationConfig(Section):
    """Held-out samples: their loss, and greedy answers compared with the expected ones."""

    shards: list[str] = Field(default_factory=list, description="held-out shards; empty = none")
    every: int = Field(0, ge=0, description="steps between evaluations; 0 = only before and after")
    max_new_tokens: int = Field(32, ge=1, description="longest answer, in tokens")
    batch_size: int = Field(32, ge=1, description="questions answered at once, per rank")
    max_questions: int = Field(2000, ge=0, description="how many questions to answer; 0 = none")
    num_examples: int = Field(48, ge=0, description="answers kept with images for the report")


class LogConfig(Section):
    """What is written while a run goes on."""

    every: int = Field(
        10,
        ge=1,
        description="steps between console lines; metrics.jsonl has every step, written then",
    )
    progress: bool = Field(True, description="show a progress bar")
    wandb: Literal["off", "offline", "online"] = Field("off", description="Weights & Biases")
    wandb_project: str = Field("triptych", description="project name there")
    peak_tflops: float | None = Field(
        None, gt=0, description="device peak for MFU; by default taken from the device's name"
    )
