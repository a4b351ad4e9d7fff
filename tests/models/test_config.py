import subprocess
import sys

import pytest
from pydantic import ValidationError

from triptych_models.config import ModelConfig


def test_unknown_keys_and_parts_are_refused() -> None:
    with pytest.raises(ValidationError, match="freezes"):
        ModelConfig(path="x", freezes=["vision"])
    with pytest.raises(ValidationError, match="vision"):
        ModelConfig(path="x", freeze=["tower"])


def test_every_field_says_what_it_is() -> None:
    assert all(field.description for field in ModelConfig.model_fields.values())


def test_config_is_importable_without_torch() -> None:
    code = "import sys, triptych_models.config; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
