"""config.json of a Bagel: the keys of ByteDance-Seed/BAGEL-7B-MoT, and tokens of packed rows."""

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig, Qwen2Config, SiglipVisionConfig


class BagelConfig(PretrainedConfig):
    """A Qwen2 with two sets of weights, a SigLIP tower, and latents of an autoencoder.

    `vit_config` says how many blocks the tower's origin had; those behind `vit_select_layer`, -1
    for the last, are not there. `sparse_attention`: settings of native sparse attention, in which
    published models have none (block_size, num_selected, window).
    """

    model_type = "bagel"
    sub_configs: ClassVar = {"llm_config": Qwen2Config, "vit_config": SiglipVisionConfig}
    attribute_map: ClassVar = {"text_config": "llm_config", "vision_config": "vit_config"}

    def __init__(
        self,
        llm_config: Any = None,
        vit_config: Any = None,
        vae_config: dict[str, int] | None = None,
        latent_patch_size: int = 2,
        max_latent_size: int = 64,
        vit_max_num_patch_per_side: int = 70,
        vit_select_layer: int = -2,
        connector_act: str = "gelu_pytorch_tanh",
        timestep_shift: float = 1.0,
        sparse_attention: dict[str, int] | None = None,
        text_start_token_id: int = 151644,
        text_end_token_id: int = 151645,
        image_token_id: int = 151655,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        self.llm_config = _section(llm_config, Qwen2Config)
        self.vit_config = _section(vit_config, SiglipVisionConfig)
        self.vae_config = vae_config or {"downsample": 8, "z_channels": 16}
        self.latent_patch_size = latent_patch_size
        self.max_latent_size = max_latent_size
        self.vit_max_num_patch_per_side = vit_max_num_patch_per_side
        self.vit_select_layer = vit_select_layer
        self.connector_act = connector_act
        self.timestep_shift = timestep_shift
        self.sparse_attention = sparse_attention
        self.text_start_token_id = text_start_token_id
        self.text_end_token_id = text_end_token_id
        self.image_token_id = image_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    @property
    def latent_dim(self) -> int:
        """Values of one latent patch."""
        return int(self.latent_patch_size**2 * self.vae_config["z_channels"])

    @property
    def num_vit_blocks(self) -> int:
        """Of the tower that is there."""
        return int(self.vit_config.num_hidden_layers + 1 + self.vit_select_layer)


def _section(given: Any, kind: type[PretrainedConfig]) -> PretrainedConfig:
    return given if isinstance(given, PretrainedConfig) else kind(**(given or {}))


AutoConfig.register(BagelConfig.model_type, BagelConfig, exist_ok=True)
