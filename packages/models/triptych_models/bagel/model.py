"""Bagel as a packed-sequence module with its two losses inside: next tokens and rectified flow."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import PretrainedConfig

from ..image_model import ImageModel
from ..layout import decoder, tower
from ..lora import adapter_flops
from ..offload import InputStore
from ..output import LossOutput
from ..read_config import check_values, read_config
from ..sequence import SequenceGroup
from ..vision import normalize_pixels
from .config import BagelConfig
from .flops import bagel_flops
from .layout import lay_out
from .network import BagelForConditionalGeneration, Pattern, Segments


class Bagel(ImageModel):
    """The mixture of transformers, `self.hf`, fed with packed rows.

    Text and the tower's features run through one set of weights, latents through the other; a row
    without latents runs the other on none, so that every rank calls the same submodules.
    """

    hf_class = BagelForConditionalGeneration
    model_type = "bagel"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        check_config(hf_config)
        super().__init__(hf_config, **settings)

    def forward(
        self,
        *,
        shift_labels: Tensor,
        num_targets: int,
        second_weight: Tensor | float = 1.0,
        image_weight: float = 1.0,
        num_second_targets: int = 0,
        **batch: Any,
    ) -> LossOutput:
        """Summed loss of next tokens, plus image_weight times second_weight times that of latents.

        A latent's is the mean square over its values of what the model says less the velocity
        noise - data (arXiv 2505.14683, section 3). second_weight is what makes a mean of each when
        both are divided by the number of tokens' targets. batch as in `hidden_states`.
        """
        self.input_store = InputStore()
        hidden_states = self.hidden_states(**batch)
        text = self.hf.lm_head(hidden_states, shift_labels, num_targets, None)
        image = second_weight * self.latent_loss(hidden_states, **batch)
        figures = {"text_loss": text.detach(), "image_loss": image.detach()}
        return LossOutput(text + image_weight * image, num_targets, figures)

    def hidden_states(
        self,
        *,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        pixel_values: Tensor | None = None,
        image_positions: Tensor | None = None,
        vision_cu_seqlens: Tensor | None = None,
        vision_max_seqlen: int | None = None,
        latents: Tensor | None = None,
        latent_noise: Tensor | None = None,
        latent_times: Tensor | None = None,
        latent_positions: Tensor | None = None,
        **layout: Any,
    ) -> Tensor:
        """Hidden states (1, T, H) after the final norms, documents kept apart.

        input_ids (1, T) int64, cu_seqlens (num_docs + 1,) int32, pixel_values (P, patch_dim) uint8,
        row by row of each image; latents and latent_noise (L, latent_dim) fp32, latent_times (L,)
        fp32, 0 data and 1 noise; image_positions, latent_positions (tokens,) int64. layout is what
        `layout.lay_out` adds; where it did not, it is found here, which reads the row on the host.
        """
        if "token_order" not in layout:
            found = self.lay_out(
                input_ids=input_ids,
                cu_seqlens=cu_seqlens,
                image_positions=image_positions,
                latent_positions=latent_positions,
                latent_times=latent_times,
                **layout,
            )
            layout = {name: _to(value, input_ids.device) for name, value in found.items()}
        language = self.hf.model.language_model
        row = language.embed_tokens(input_ids)[0]  # (T, H)
        features = self._image_features(
            pixel_values, layout["patch_places"], vision_cu_seqlens, vision_max_seqlen, row
        )
        row = _replaced(row, image_positions, features)
        row = _replaced(
            row,
            latent_positions,
            self._latent_features(
                latents, latent_noise, latent_times, layout["latent_places"], row
            ),
        )
        return self._run_row(row, cu_seqlens, max_seqlen, layout)

    def latent_loss(
        self,
        hidden_states: Tensor,
        *,
        latents: Tensor | None = None,
        latent_noise: Tensor | None = None,
        latent_times: Tensor | None = None,
        latent_positions: Tensor | None = None,
        **batch: Any,
    ) -> Tensor:
        """Squared errors of velocities, () fp32, over latents that are not data."""
        velocity = self.velocities(hidden_states, latent_positions)
        if latents is None or latent_noise is None or latent_times is None:
            return velocity.sum()  # of nothing: it hangs on the graph
        error = (velocity - (latent_noise - latents)).square().mean(-1)  # (L,)
        return (error * (latent_times > 0)).sum()

    def velocities(self, hidden_states: Tensor, latent_positions: Tensor | None) -> Tensor:
        """Where the row's latent patches move, (L, latent_dim), fp32 (fp64 for fp64 weights)."""
        if latent_positions is None:
            latent_positions = torch.zeros(0, dtype=torch.int64, device=hidden_states.device)
        said: Tensor = self.hf.model.llm2vae(hidden_states[0, latent_positions])
        return said.to(torch.promote_types(said.dtype, torch.float32))

    def lay_out(self, **batch: Any) -> dict[str, Any]:
        """`layout.lay_out` of a row wherever it is: what it adds, on the host."""
        with unset_fake_temporarily():
            host = {name: _to(value, torch.device("cpu")) for name, value in batch.items()}
            made = lay_out(host, self.hf.config)
        return {name: value for name, value in made.items() if value is not host.get(name)}

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        return {
            "patch_size": self.hf.config.vit_config.patch_size,
            "merge_size": 1,
            "temporal_patch_size": 1,
            "image_token_id": self.hf.config.image_token_id,
        }

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        model = self.hf.model
        language = model.language_model
        drawing, reading = [language.norm_moe_gen], [language.embed_tokens, language.norm]
        for layer in language.layers:
            for module in (layer, layer.self_attn):
                for name, child in module.named_children():
                    if child is not layer.self_attn:
                        (drawing if name.endswith("_moe_gen") else reading).append(child)
        return {
            "vision": [model.vision_tower],
            "projector": [model.connector, model.vit_pos_embed],
            "language": [*reading, self.hf.lm_head],
            "generation": [
                *drawing,
                model.time_embedder,
                model.vae2llm,
                model.llm2vae,
                model.latent_pos_embed,
            ],
        }

    def tower_layers(self) -> Sequence[nn.Module]:
        """The layers of the tower that run."""
        blocks: Sequence[nn.Module] = tower(self.hf).encoder.layers
        return blocks

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        parts, adapted = self.trainable_parts(), self.lora is not None
        base = bagel_flops(self.hf.config, batch, parts, adapted=adapted)
        return base + adapter_flops(self, batch)

    def set_sequence(self, group: SequenceGroup) -> None:
        """Refused for more than one rank: segments of a row are not dealt out."""
        if group.size > 1:
            raise ValueError(
                f"parallel.sequence: must be 1 for a Bagel, got {group.size}; "
                "take engine.checkpointing=offload for long rows"
            )
        super().set_sequence(group)

    def dummy_image(self, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
        """A black image of one patch: grid (1, 3) on the host, uint8 patches on device."""
        vision = self.hf.config.vit_config
        patch_dim = vision.num_channels * vision.patch_size**2
        pixels = torch.zeros(1, patch_dim, dtype=torch.uint8, device=device)
        with unset_fake_temporarily():  # read on the host, also where a plan runs on fake tensors
            grid = torch.tensor([[1, 1, 1]])
        return grid, pixels

    def _run_row(
        self, row: Tensor, cu_seqlens: Tensor, max_seqlen: int, layout: Mapping[str, Any]
    ) -> Tensor:
        """Embedded tokens (T, H) through the decoder → (1, T, H), in the row's own order."""
        language, order = decoder(self.hf), layout["token_order"]
        rotary = language.rotary_emb(row, layout["position_ids"][:, order])
        pattern = Pattern(cu_seqlens, max_seqlen, *_segments(layout))
        hidden_states, num_latents = row[order][None], layout["num_latents"]
        for layer in language.layers:
            hidden_states = self.run_layer(
                layer, hidden_states, rotary=rotary, pattern=pattern, num_latents=num_latents
            )
        text, latents = hidden_states.split([len(order) - num_latents, num_latents], dim=1)
        normed = torch.cat([language.norm(text), language.norm_moe_gen(latents)], dim=1)
        return torch.empty_like(normed).index_copy(1, order, normed)

    def _image_features(
        self,
        pixels: Tensor | None,
        places: Tensor,
        cu_seqlens: Tensor | None,
        max_seqlen: int | None,
        row: Tensor,
    ) -> Tensor:
        """Features (P, H) of patches; of a dummy image, none of which is kept, where none are."""
        model, visual, count = self.hf.model, tower(self.hf), len(places)
        if pixels is None or cu_seqlens is None or max_seqlen is None:
            _, pixels = self.dummy_image(row.device)
            places = torch.zeros(1, dtype=torch.int64, device=row.device)
            cu_seqlens = torch.arange(2, dtype=torch.int32, device=row.device)
            max_seqlen = 1
        scaled = normalize_pixels(pixels, self.image_mean, self.image_std)
        # Stored weights take a patch's pixels one after the other, each with its channels.
        scaled = scaled.unflatten(1, (len(self.image_mean), -1)).transpose(1, 2).flatten(1)
        hidden_states = visual.embeddings(scaled.to(row.dtype), places)
        for block in self.tower_layers():
            hidden_states = self.run_layer(
                block,
                hidden_states,
                attention_mask=None,
                cu_seqlens=cu_seqlens,
                max_seqlen=max_seqlen,
            )
        features = model.connector(visual.post_layernorm(hidden_states))
        features = features + model.vit_pos_embed(places)
        return features[:count]

    def _latent_features(
        self,
        latents: Tensor | None,
        noise: Tensor | None,
        times: Tensor | None,
        places: Tensor,
        row: Tensor,
    ) -> Tensor:
        """What stands for noisy latents (L, H); of none where there are none."""
        model = self.hf.model
        if latents is None or noise is None or times is None:
            latents = noise = row.new_zeros(0, self.hf.config.latent_dim)
            times = row.new_zeros(0)
        mixed = torch.lerp(latents, noise, times[:, None])
        embedded: Tensor = model.vae2llm(mixed.to(row.dtype))
        return embedded + model.time_embedder(times) + model.latent_pos_embed(places)


def read_bagel(path: Path) -> BagelConfig:
    """The configuration of a directory. Raises ValueError for that of another model."""
    config = read_config(path, Bagel.model_type, Bagel.rope_types)
    assert isinstance(config, BagelConfig)
    return config


def check_config(config: Any) -> None:
    """Raise ValueError for a Bagel of other parts than are computed here."""
    values = (
        ("llm_config.layer_module", getattr(config.llm_config, "layer_module", None), (None, MOT)),
        ("llm_config.qk_norm", getattr(config.llm_config, "qk_norm", True), (True,)),
        ("vit_config.rope", getattr(config.vit_config, "rope", False), (False,)),
        ("vit_config.attention_dropout", config.vit_config.attention_dropout, (0.0,)),
        ("interpolate_pos", getattr(config, "interpolate_pos", False), (False,)),
        ("visual_gen", getattr(config, "visual_gen", True), (True,)),
        ("visual_und", getattr(config, "visual_und", True), (True,)),
        (
            "vit_max_num_patch_per_side",
            config.vit_max_num_patch_per_side,
            (config.vit_config.image_size // config.vit_config.patch_size,),
        ),
    )
    check_values("a Bagel", values, "take BAGEL-7B-MoT's files")
    sparse = config.sparse_attention
    if sparse is not None and sparse.keys() != SPARSE:
        raise ValueError(
            f"model.path: config.json's sparse_attention must say {', '.join(sorted(SPARSE))}, got "
            f"{sparse}; correct it, or leave it out"
        )


MOT = "Qwen2MoTDecoderLayer"
SPARSE = {"block_size", "num_selected", "window"}


def _segments(layout: Mapping[str, Any]) -> list[Any]:
    """The rest of a Pattern, of a row that has images."""
    if "attended_order" not in layout:
        return []
    found = [
        Segments(*(layout[f"{kind}_{name}"] for name in Segments._fields))
        for kind in ("causal", "mutual")
    ]
    return [*found, layout["attended_order"]]


def _replaced(row: Tensor, positions: Tensor | None, features: Tensor) -> Tensor:
    if positions is None:
        positions = torch.zeros(0, dtype=torch.int64, device=row.device)
    return row.index_copy(0, positions, features.to(row.dtype))


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
