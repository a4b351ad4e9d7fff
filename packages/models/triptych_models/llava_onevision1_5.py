"""LLaVA-OneVision-1.5 as a packed-sequence module: RICE over native resolutions before a Qwen3.

arXiv 2509.23661. Transformers 5.22 does not ship it: the classes here are put together of RICE (see
rice.py) and transformers' own Qwen3, and read lmms-lab's folders by the names of their tensors.
After `import triptych_models.llava_onevision1_5`, AutoModelForImageTextToText reads such a folder
without code of its own. Positions are plain ones, whatever the images.

It takes images alone. Transformers has no class to be equal to, and version 1.5 is one of images
(github.com/EvolvingLMMs-Lab/LLaVA-OneVision-2, issue 82). What the published code has for videos is
Qwen2-VL's: it may be given patches of two frames, where those of the tower have one.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    Qwen3Model,
)
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .flops import Work, one_merger_flops, tower_blocks
from .lora import adapter_flops
from .qwen3_vl import Qwen3VL
from .read_config import check_values
from .rice import Rice, RiceConfig, rice_features
from .vision import normalize_pixels


class LlavaOnevision15TextConfig(Qwen3Config):
    """The section text_config of config.json: a Qwen3's."""

    model_type = "LLaVAOneVision1_5_text"
    base_config_key = "text_config"


class LlavaOnevision15Config(PretrainedConfig):
    """config.json as published."""

    model_type = "llavaonevision1_5"
    sub_configs: ClassVar = {"vision_config": RiceConfig, "text_config": LlavaOnevision15TextConfig}

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 151655
    video_token_id: int = 151656
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name, section in self.sub_configs.items():
            given = getattr(self, name)
            if not isinstance(given, PretrainedConfig):
                setattr(self, name, section(**(given or {})))
        super().__post_init__(**kwargs)


class LlavaOnevision15PreTrainedModel(PreTrainedModel):
    """What both classes say of themselves."""

    config_class = LlavaOnevision15Config
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True


class LlavaOnevision15Model(LlavaOnevision15PreTrainedModel):
    """The tower and the language model, without a head."""

    def __init__(self, config: LlavaOnevision15Config) -> None:
        super().__init__(config)
        self.visual = Rice(config.vision_config)
        self.language_model = Qwen3Model._from_config(config.text_config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        embeddings: nn.Module = self.language_model.embed_tokens
        return embeddings

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """input_ids (B, L), pixel_values (P, patch_dim) scaled, image_grid_thw (num_images, 3)."""
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if pixel_values is not None:
            features = self.visual(pixel_values, image_grid_thw).to(inputs_embeds.dtype)
            is_image = (input_ids == self.config.image_token_id)[:, :, None]
            inputs_embeds = inputs_embeds.masked_scatter(is_image, features)
        outputs: BaseModelOutputWithPast = self.language_model(
            inputs_embeds=inputs_embeds, **kwargs
        )
        return outputs


class LlavaOnevision15ForConditionalGeneration(LlavaOnevision15PreTrainedModel, GenerationMixin):
    """The model with its head, for loading, saving and generation."""

    _tied_weights_keys: ClassVar = {"lm_head.weight": "model.language_model.embed_tokens.weight"}

    def __init__(self, config: LlavaOnevision15Config) -> None:
        super().__init__(config)
        self.model = LlavaOnevision15Model(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The table of tokens."""
        return self.model.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """As the model's, with logits (B, L, V)."""
        kwargs.pop("logits_to_keep", None)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_grid_thw=image_grid_thw,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        return CausalLMOutputWithPast(logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool = False, use_cache: bool = True, **kwargs: Any
    ) -> dict[str, Any]:
        """Images go in with the prompt, not with each new token."""
        inputs: dict[str, Any] = super().prepare_inputs_for_generation(
            *args, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if use_cache and not is_first_iteration:
            inputs["pixel_values"] = inputs["image_grid_thw"] = None
        return inputs


AutoConfig.register("rice_vit", RiceConfig, exist_ok=True)
AutoConfig.register("LLaVAOneVision1_5_text", LlavaOnevision15TextConfig, exist_ok=True)
AutoConfig.register("llavaonevision1_5", LlavaOnevision15Config, exist_ok=True)
AutoModelForImageTextToText.register(
    LlavaOnevision15Config, LlavaOnevision15ForConditionalGeneration, exist_ok=True
)
register_checkpoint_conversion_mapping(
    "llavaonevision1_5",
    [
        WeightRenaming(r"^visual\.", "model.visual."),
        WeightRenaming("model.visual.class_embedding", "model.visual.class_token.embedding"),
        WeightRenaming("model.visual.class_pos_emb", "model.visual.class_token.angles"),
        WeightRenaming(r"^model\.(?!visual\.|language_model\.)", "model.language_model."),
    ],
    overwrite=True,
)


class LlavaOnevision15(Qwen3VL):
    """The LLaVA-OneVision-1.5 above, `self.hf`, fed with packed rows as Qwen3-VL is."""

    hf_class = LlavaOnevision15ForConditionalGeneration
    model_type = "llavaonevision1_5"

    def __init__(self, hf_config: PretrainedConfig, **settings: Any) -> None:
        vision = hf_config.vision_config
        values = (
            ("vision_config.model_type", vision.model_type, ("rice_vit",)),
            ("vision_config.temporal_patch_size", vision.temporal_patch_size, (1,)),
            ("vision_config.embed_dim", vision.embed_dim, (vision.hidden_size,)),
            (
                "vision_config.text_hidden_size",
                vision.text_hidden_size,
                (hf_config.text_config.hidden_size,),
            ),
        )
        check_values("a llavaonevision1_5", values, "take another model")
        super().__init__(hf_config, **settings)

    def image_rules(self) -> dict[str, Any]:
        """What the data's processor must say of images, by the name of its attribute."""
        return super().image_rules() | {"position_axes": 1}

    def parts(self) -> dict[str, list[nn.Module]]:
        """Modules of each part; every parameter is in exactly one."""
        visual = self.hf.model.visual
        return {
            "vision": [
                visual.patch_embed,
                visual.class_token,
                visual.pre_layernorm,
                visual.blocks,
            ],
            "projector": [visual.merger],
            "language": [self.hf.model.language_model, self.hf.lm_head],
        }

    def flops(self, batch: Mapping[str, Any]) -> float:
        """Forward and backward FLOPs of one packed row; see triptych_models.flops."""
        config, parts, adapted = self.hf.config, self.trainable_parts(), self.lora is not None
        vision = config.vision_config

        def blocks(grids: list[tuple[int, ...]]) -> Work:
            rows: list[tuple[int, ...]] = [(t, 1, h * w + 1) for t, h, w in grids]  # a class token
            return tower_blocks(vision.hidden_size, vision.intermediate_size, vision.depth, rows)

        return one_merger_flops(config, batch, blocks, parts, adapted=adapted) + adapter_flops(
            self, batch
        )

    def _image_features(
        self, pixel_values: Tensor, grid_thw: Tensor, cu_seqlens: Tensor, max_seqlen: int
    ) -> tuple[Tensor, list[Tensor]]:
        scaled = normalize_pixels(pixel_values, self.image_mean, self.image_std)
        visual = self.hf.model.visual
        features = rice_features(visual, scaled, grid_thw, cu_seqlens, max_seqlen, self.run_layer)
        return features, []
