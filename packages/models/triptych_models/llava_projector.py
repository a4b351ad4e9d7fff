"""LLaVA with another projector: a SigLIP tower, pixel unshuffle or a resampler, a text model.

Transformers has no directory for these before a SigLIP: the architecture is its
LlavaForConditionalGeneration with another module for the projector, and config.json has

    "model_type": "llava_projector",
    "projector": {"kind": "pixel_unshuffle", "factor": 2}
    "projector": {"kind": "resampler", "num_queries": 64, "num_heads": 16}

After `import triptych_models.llava_projector`, AutoModelForImageTextToText and AutoProcessor read a
folder as any other; without, transformers says that it does not know the model_type.
"""

from typing import Any

from transformers import AutoConfig, AutoModelForImageTextToText, LlavaConfig
from transformers import LlavaForConditionalGeneration as StockLlava

from .flops import Layer
from .llava import Llava
from .pixel_unshuffle import PixelUnshuffle
from .resampler import Resampler

KINDS: dict[str, type[PixelUnshuffle] | type[Resampler]] = {
    "pixel_unshuffle": PixelUnshuffle,
    "resampler": Resampler,
}
SETTINGS = {"pixel_unshuffle": {"factor"}, "resampler": {"num_queries", "num_heads"}}


class LlavaProjectorConfig(LlavaConfig):
    """LLaVA's config.json and `projector`, a dict of its kind and its settings."""

    model_type = "llava_projector"


class LlavaProjectorForConditionalGeneration(StockLlava):
    """Transformers' LLaVA whose projector is one of `KINDS`."""

    config_class = LlavaProjectorConfig

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        vision, settings = config.vision_config, dict(config.projector)
        self.model.multi_modal_projector = KINDS[settings.pop("kind")](
            vision.hidden_size,
            config.text_config.hidden_size,
            side=vision.image_size // vision.patch_size,
            **settings,
        )


AutoConfig.register("llava_projector", LlavaProjectorConfig, exist_ok=True)
AutoModelForImageTextToText.register(
    LlavaProjectorConfig, LlavaProjectorForConditionalGeneration, exist_ok=True
)


class LlavaProjector(Llava):
    """A LLaVA with one of these projectors, `self.hf`, fed with packed rows."""

    hf_class = LlavaProjectorForConditionalGeneration
    model_type = "llava_projector"

    @property
    def tokens_per_image(self) -> int:
        """Tokens that stand for an image, as many as the projector gives features."""
        return int(self.hf.model.multi_modal_projector.num_tokens)

    def projector_layers(self, images: int) -> list[Layer]:
        """The projector's products for so many images, to count their FLOPs."""
        layers: list[Layer] = self.hf.model.multi_modal_projector.layers(images)
        return layers

    @staticmethod
    def check_config(config: Any) -> None:
        """Raise ValueError for a projector that cannot be, or of other parts than are computed."""
        Llava.check_config(config)
        given = getattr(config, "projector", None)
        given = given if isinstance(given, dict) else {}
        settings = {name: value for name, value in given.items() if name != "kind"}
        wanted = SETTINGS.get(given.get("kind", ""))
        if wanted is None or settings.keys() != wanted:
            kinds = "; ".join(f"{kind}: {', '.join(sorted(s))}" for kind, s in SETTINGS.items())
            raise ValueError(
                "model.path: config.json's projector must have a kind and its settings "
                f"({kinds}), got {given}; make the folder with tools/assemble_vlm.py"
            )
        vision = config.vision_config
        KINDS[given["kind"]].check(
            config.text_config.hidden_size, vision.image_size // vision.patch_size, **settings
        )
