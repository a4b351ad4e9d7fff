"""RAE: a decoder that learns to give back images from what a frozen encoder has of them.

Zheng et al., arXiv 2510.11690. The decoder learns by L1, a perceptual distance and what a
discriminator says of its images; that learns at the same time by the same images. How much the
decoder heeds it is a number, the adaptive weight of VQGAN (arXiv 2012.09841): so much that both
losses pull equally at the decoder's last layer, by their gradients over all ranks and micro-steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..checkpointing import Checkpointed, compile_forward
from ..freeze import Holder, OwnParameters
from ..offload import InputStore
from ..output import LossOutput
from .augment import augment
from .config import AdversaryConfig, RAEModelConfig
from .costs import Costs, decoder_flops, discriminator_flops
from .discriminator import Discriminator, as_stored, deceit, hinge
from .encoder import Encoder
from .features import VitFeatures, digest, resized
from .perceptual import Perceptual

SumOverRanks = Callable[[Tensor], None]
EPS = 1e-6  # beside the norm of the discriminator's pull
MADE, STORED, REAL = 0, 1, 2  # for which use of an image which of its numbers are


class Judges(NamedTuple):
    """What says how good a reconstruction is, all of it frozen; None: not asked."""

    perceptual: Perceptual | None
    perceptual_weight: float
    features: VitFeatures | None
    """of the discriminator"""
    adversary: AdversaryConfig


class Judged(NamedTuple):
    """What the judges said of a micro-batch, as sums over its images."""

    l1: Tensor
    perceptual: Tensor
    deceit: Tensor
    losses: Tensor
    """(N,), of L1 and, times its weight, the perceptual distance"""
    slopes: Tensor
    """(1 or 2, N, L, P), to the decoder's output: of L1 and perceptual distance; of the deceit"""
    pulls: Tensor
    """(2, P, H): of both to its last layer's weight; empty where only one is asked for"""
    made: Tensor
    """(N, 3, S, S), the reconstructions"""


class RAE(Checkpointed):
    """A decoder that trains, with a discriminator that does, and frozen networks around them.

    What is frozen is whole on every rank, under every ZeRO stage, and in no checkpoint: it is no
    submodule, but goes to the device with the rest.

    Args:
        encoder: frozen.
        decoder: diffusers' RAEDecoder.
        config: of the model.
        judges: what the decoder learns by.
        sum_over_ranks: adds up a tensor over data ranks, in place.
    """

    def __init__(
        self,
        encoder: Encoder,
        decoder: Any,
        config: RAEModelConfig,
        judges: Judges,
        sum_over_ranks: SumOverRanks,
    ) -> None:
        super().__init__()
        self.decoder = decoder
        adversary, features = judges.adversary, judges.features
        self.discriminator: Discriminator | None = None
        if features is not None:
            layers = len(features.depths)
            self.discriminator = Discriminator(layers, features.width, adversary.kernel_size)
        self.config = config
        self.input_store = InputStore()
        self._judges, self._sum_over_ranks = judges, sum_over_ranks
        self._frozen: dict[str, Any] = {"encoder": encoder}
        if judges.perceptual is not None:
            self._frozen["perceptual"] = judges.perceptual
        if features is not None:
            self._frozen["features"] = features
        self.costs = Costs.measure(self._frozen, self.image_size, adversary.image_size)
        self._heeds = self._teaches = False  # the discriminator, in this step
        self._judged: list[Judged] = []  # of a window, before its forwards
        self._adaptive = torch.zeros(())

    @property
    def is_heeding(self) -> bool:
        """Whether the decoder learns by the discriminator in this step."""
        return self._heeds

    @property
    def beside(self) -> list[nn.Module]:
        """What is frozen."""
        return list(self._frozen.values())

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {name: digest(each) for name, each in self._frozen.items()}

    @property
    def image_size(self) -> int:
        """Side of the images, in pixels."""
        return int(self.decoder.image_size)

    @property
    def noise_shape(self) -> tuple[int, int]:
        """Of an image's latents (L, C)."""
        return int(self.decoder.num_patches), int(self.decoder.decoder_embed.in_features)

    def begin_step(self, step: int) -> None:
        """Before a step's first forward, on every rank."""
        adversary = self._judges.adversary
        has = self.discriminator is not None
        self._teaches = has and step >= adversary.discriminator_start
        self._heeds = has and step >= adversary.start
        self._judged = []
        if self.discriminator is not None and self._teaches:
            for conv in self.discriminator.convs():
                conv.is_due = True

    @torch.no_grad()
    def survey(self, window: Iterable[Mapping[str, Any]]) -> None:
        """After `begin_step`, of several micro-batches: find the adaptive weight of all of them.

        It takes the decoder one forward more, which is why one alone is not surveyed. Batches are
        on the device. Every rank takes part.
        """
        if not self._heeds:
            return
        weights = []
        for batch in window:
            decoded = self._reconstruct(batch["pixels"], batch["noise"], batch["levels"])
            seen = {name: batch[name] for name in ("weights", "draws")}
            self._judged.append(self._judge(*decoded, **seen))
            weights.append(batch["weights"])
        self._adaptive = self._weigh(self._judged, weights)

    def forward(
        self,
        *,
        pixels: Tensor,
        weights: Tensor,
        num_targets: int,
        noise: Tensor,
        levels: Tensor,
        draws: Tensor,
    ) -> LossOutput:
        """Summed loss of N images: L1 and, times its weight, the perceptual distance, fp32.

        Gradients are also those of deceiving the discriminator, and of its own loss; both are among
        the metrics. pixels (N, 3, S, S) uint8; weights (N,): 0 for one that is not there; noise
        (N, L, C) normal, levels (N,), draws (N, 3, 7) in [0, 1). In evaluation none of these are
        used, and there is no discriminator. num_targets: images that are there.
        """
        self.input_store = InputStore()
        images, hidden, logits = self._reconstruct(pixels, noise, levels)
        if not self.training:
            l1, perceptual = self._distances(self.pixels_of(logits), images)
            losses = (l1 + self._judges.perceptual_weight * perceptual) * weights
            return LossOutput(losses.sum(), num_targets, {}, losses.detach())
        if self._judged:
            judged = self._judged.pop(0)
        else:
            judged = self._judge(images, hidden, logits, weights, draws)
            if self._heeds:
                self._adaptive = self._weigh([judged], [weights])
        loss = judged.l1 + self._judges.perceptual_weight * judged.perceptual
        slope, *other = judged.slopes
        if other:
            slope = slope + self._judges.adversary.weight * self._adaptive * other[0]
        loss = loss + _without_value((logits.float() * slope).sum())
        metrics = {"l1": judged.l1, "perceptual": judged.perceptual}
        if self._heeds:
            metrics |= {"deceit": judged.deceit, "adaptive_weight": self._adaptive * weights.sum()}
        if self._teaches:
            found = self._teach(images, judged.made, draws, weights)
            loss = loss + _without_value(found["discriminator"])
            metrics |= {name: value.detach() for name, value in found.items()}
        return LossOutput(loss, num_targets, metrics, judged.losses)

    @torch.no_grad()
    def reconstruct(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> what the decoder makes of it, fp32, from 0 to 1 but for errors."""
        _, _, logits = self._reconstruct(pixels)
        return self.pixels_of(logits)

    def pixels_of(self, logits: Tensor) -> Tensor:
        """The decoder's output (N, L, P) as images (N, 3, S, S), fp32."""
        encoder = self._frozen["encoder"]
        flat: Tensor = self.decoder.unpatchify(logits.float())
        return flat * encoder.std + encoder.mean

    def _reconstruct(
        self, pixels: Tensor, noise: Tensor | None = None, levels: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images from 0 to 1, and the decoder's last hidden states (N, L, H) and output."""
        images = pixels.float() / 255
        tokens = self._frozen["encoder"](images).float()
        if self.training and self.config.noise:
            assert noise is not None and levels is not None
            tokens = tokens + (self.config.noise * levels).view(-1, 1, 1) * noise
        decoder = self.decoder
        x = decoder.decoder_embed(tokens.to(decoder.decoder_embed.weight.dtype))
        x = torch.cat([decoder.trainable_cls_token.expand(len(x), -1, -1), x], 1)
        x = x + decoder.decoder_pos_embed.to(x.dtype)
        for layer in decoder.decoder_layers:
            x = self.run_layer(layer, x)
        hidden = decoder.decoder_norm(x)[:, 1:]
        return images, hidden, decoder.decoder_pred(hidden)

    def _distances(self, made: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N,) each."""
        l1 = (made - images).abs().mean((1, 2, 3))
        judge = self._judges.perceptual
        return l1, torch.zeros_like(l1) if judge is None else judge(made, images)

    def _judge(
        self, images: Tensor, hidden: Tensor, logits: Tensor, weights: Tensor, draws: Tensor
    ) -> Judged:
        """No gradient goes on to the decoder: what would is in the result."""
        with torch.enable_grad():
            leaf = logits.detach().float().requires_grad_()
            made = self.pixels_of(leaf)
            distances = self._distances(made, images)
            l1, perceptual = (each @ weights for each in distances)
            factor = self._judges.perceptual_weight
            # To the image first: so a judge's graph is gone before the next one's comes.
            by_pixel = torch.autograd.grad(l1 + factor * perceptual, made)
            fooled = l1.new_zeros(())
            if self._heeds:
                fooled = deceit(self._score(self._see(made, draws[:, MADE]))) @ weights
                by_pixel += torch.autograd.grad(fooled, made)
            slopes = [
                torch.autograd.grad(made, leaf, each, retain_graph=True)[0] for each in by_pixel
            ]
        by = torch.stack(slopes)
        pulls = by.new_zeros(0)
        if self._heeds:
            pulls = by.flatten(1, 2).mT @ hidden.detach().flatten(0, 1).float()
        values = l1.detach(), perceptual.detach(), fooled.detach()
        losses = (distances[0] + factor * distances[1]).detach() * weights
        return Judged(*values, losses, by, pulls, made.detach())

    def _weigh(self, judged: Sequence[Judged], weights: Sequence[Tensor]) -> Tensor:
        """The adaptive weight, () fp32, alike on every rank."""
        pulls = torch.stack([each.pulls for each in judged]).sum(0)
        count = torch.stack([each.sum() for each in weights]).sum()
        flat = torch.cat([pulls.flatten(), count.view(1)])
        self._sum_over_ranks(flat)
        ours, theirs = (flat[:-1].view(2, -1) / flat[-1].clamp(min=1)).norm(dim=1)
        return (ours / (theirs + EPS)).clamp(0, self._judges.adversary.most)

    def _teach(
        self, images: Tensor, made: Tensor, draws: Tensor, weights: Tensor
    ) -> dict[str, Tensor]:
        """The discriminator's loss, and mean scores, as sums over images."""
        with torch.no_grad():
            shown = torch.cat([as_stored(made), images])
            numbers = torch.cat([draws[:, STORED], draws[:, REAL]])
            features = self._see(shown, numbers)
        fake, real = self._score(features).chunk(2)
        return {
            "discriminator": hinge(real, fake) @ weights,
            "score_made": fake.mean(1) @ weights,
            "score_real": real.mean(1) @ weights,
        }

    def _see(self, images: Tensor, numbers: Tensor) -> list[Tensor]:
        adversary = self._judges.adversary
        shown = augment(images, numbers, adversary.augment)
        features: list[Tensor] = self._frozen["features"](resized(shown, adversary.image_size))
        return features

    def _score(self, features: list[Tensor]) -> Tensor:
        assert self.discriminator is not None
        scores: Tensor = self.discriminator(features)
        return scores

    def parts(self) -> dict[str, list[Holder]]:
        """Modules of each part; every parameter is in exactly one."""
        decoder = self.decoder
        found: dict[str, list[Holder]] = {
            "embedders": [decoder.decoder_embed, OwnParameters(decoder)],
            "blocks": [decoder.decoder_layers],
            "head": [decoder.decoder_norm, decoder.decoder_pred],
        }
        if self.discriminator is not None:
            found["discriminator"] = [self.discriminator]
        return found

    def layers(self) -> list[nn.Module]:
        """Every layer: what repeats, and runs as a whole."""
        return list(self.decoder.decoder_layers)

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward of a step as it is now, with all parts training; not what is
        computed twice."""
        latents, width = self.noise_shape
        costs, config = self.costs, self.config.decoder
        each = costs.encoder + decoder_flops(config, latents, width)
        each += 2 * costs.perceptual + costs.perceptual_backward
        if self.discriminator is not None:
            head = self._judges.adversary.kernel_size
            layers, channels = len(self.discriminator.heads), self.discriminator.channels
            deceives, learns = discriminator_flops(layers, channels, costs.tokens, head)
            if self._heeds:
                pull = 2 * latents * config.hidden_size * 3 * config.patch_size**2
                each += costs.features + costs.features_backward + deceives + 2 * pull
            if self._teaches:
                each += 2 * costs.features + learns
        return len(batch["pixels"]) * each

    def fingerprint(self) -> dict[str, Any]:
        """What the weights mean, and which frozen ones they were trained beside."""
        kept = {"encoder", "input_size", "decoder"}
        return {"rae": self.config.model_dump(mode="json", include=kept), "frozen": self._digests}

    def compile_layers(self) -> None:
        """Compile every layer in place, of what is frozen, too, and the discriminator's norms."""
        self.is_compiled = True
        for layer in self.layers():
            compile_forward(layer)
        for frozen in self._frozen.values():
            frozen.compile_layers()
        if self.discriminator is not None:
            self.discriminator.compile_norms()

    def diffusers_config(self) -> dict[str, Any]:
        """The configuration of diffusers' AutoencoderRAE."""
        shape = self.config.decoder
        return {
            "_class_name": "AutoencoderRAE",
            **self._frozen["encoder"].config(),
            "decoder_hidden_size": shape.hidden_size,
            "decoder_num_hidden_layers": shape.num_layers,
            "decoder_num_attention_heads": shape.num_heads,
            "decoder_intermediate_size": shape.intermediate_size,
            "patch_size": shape.patch_size,
            "image_size": self.image_size,
            "noise_tau": self.config.noise,
        }

    def frozen_tensors(self) -> dict[str, Tensor]:
        """What diffusers' AutoencoderRAE holds beside its decoder, on the host, fp32."""
        found: dict[str, Tensor] = self._frozen["encoder"].tensors()
        return {name: value.detach().to("cpu", torch.float32) for name, value in found.items()}

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        for net in self._frozen.values():
            net._apply(fn)
        return super()._apply(fn, recurse)


def _without_value(loss: Tensor) -> Tensor:
    """Zero, with this gradient."""
    return loss - loss.detach()
