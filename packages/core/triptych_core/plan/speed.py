"""How long a step should take: its work over what the device has been measured to do."""

from __future__ import annotations

from dataclasses import dataclass

from triptych_core.config import EngineConfig
from triptych_core.plan.memory import Weights, received
from triptych_core.plan.trace import MicroStep


@dataclass(frozen=True)
class Ceilings:
    """What a device reaches in practice; peak_flops is the data sheet's, which MFU refers to."""

    peak_flops: float
    product_flops: float
    bandwidth: float  # bytes per second of a copy, reads and writes together
    link: float  # bytes per second and rank between devices of one host
    launch: float  # seconds of host time per op in eager mode, autograd included


# H100 SXM: packages/kernels/BENCHMARKS.md (690-783 TFLOP/s for 8192³, 2.97-3.01 TB/s for a copy;
# small ops wait 7-12 us on the host). H200: the same chip, memory by the data sheets' ratio. The
# link is NVLink 4's 450 GB/s each way, of which NCCL reaches about four fifths; not measured here.
CEILINGS = {
    "H100": Ceilings(989e12, 700e12, 2.97e12, 360e9, 10e-6),
    "H200": Ceilings(989e12, 700e12, 4.26e12, 360e9, 10e-6),
}


@dataclass(frozen=True)
class SpeedPlan:
    """Seconds of a step by what they go to; the device and the host work side by side."""

    products: float
    recompute: float
    memory: float
    optimizer: float
    communication: float
    host: float
    flops: float  # of a rank and step, without recomputation
    peak_flops: float

    @property
    def seconds(self) -> float:
        """Of a step: the slower of device and host; communication counted as not hidden."""
        device = self.products + self.recompute + self.memory
        return max(device, self.host) + self.optimizer + self.communication

    @property
    def mfu(self) -> float:
        """Model FLOPs over the device's peak."""
        return self.flops / self.seconds / self.peak_flops


def plan_speed(
    weights: Weights,
    engine: EngineConfig,
    step: MicroStep,
    *,
    flops: float,
    recomputed: float,
    device: str,
    stage: int,
    ranks: int,
) -> SpeedPlan:
    """Time of one optimizer step.

    Args:
        weights: elements.
        engine: precision, accumulation.
        step: traffic and launches of a micro-step.
        flops: forward and backward FLOPs of a micro-step, as the model counts them.
        recomputed: FLOPs that checkpointing adds to them.
        device: a key of CEILINGS.
        stage: of ZeRO.
        ranks: data-parallel ranks.
    """
    ceilings, gas = CEILINGS[device], engine.gradient_accumulation_steps
    width = 2 if engine.precision == "bf16" else 4
    # What a rank updates: its share among the ranks that have the same of a group.
    alike = [(group, ranks // group.holders) for group in weights.groups]
    shares = [(group.numel / (n if stage > 0 else 1), group) for group, n in alike]
    per_rank = sum(share for share, _ in shares)
    states = sum(share * group.state_bytes for share, group in shares)
    # The norm and AdamW read gradients; AdamW reads and writes masters and states, writes weights.
    touched = per_rank * (2 * 4 + 2 * 4 + width) + 2 * states
    # Gradients: bf16 read, fp32 written.
    if stage > 0 or ranks * gas > 1:
        touched += weights.trained * (width + 4) * gas
    # Frozen weights are as if all ranks had them alike.
    frozen = (weights.numel - weights.trained) * (ranks - 1) / ranks
    crossing = sum(group.numel * (n - 1) / n for group, n in alike)
    reduced = 4.0 * crossing * (1 if stage < 2 else gas)
    if stage == 3 and not engine.zero.offloads:
        gathered = width * received(weights, engine, ranks)
    else:
        gathered = width * (crossing + frozen) * (2 * gas if stage == 3 else 1)
    return SpeedPlan(
        products=flops * gas / ceilings.product_flops,
        recompute=recomputed * gas / ceilings.product_flops,
        memory=step.traffic * gas / ceilings.bandwidth,
        optimizer=touched / ceilings.bandwidth,
        communication=(reduced + gathered + step.crossing * gas) / ceilings.link,
        host=step.launches * gas * ceilings.launch,
        flops=flops * gas,
        peak_flops=ceilings.peak_flops,
    )
