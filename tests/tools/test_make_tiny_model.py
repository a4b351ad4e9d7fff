"""The shipped tiny model directories are what their maker writes, and they load."""

import json
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from tokenizers import Tokenizer

from triptych_models.catalogue import FAMILIES
from triptych_models.families import family_class

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tools"))
from make_tiny_model import KINDS, main  # noqa: E402
from tiny_languages import LANGUAGES, language_config  # noqa: E402

SHIPPED = ROOT / "stages/configs/qwen3_vl_tiny"
SHIPPED_TEXT = ROOT / "stages/configs/qwen3_tiny"


@pytest.mark.parametrize("kind", KINDS)
def test_shipped_directory_is_what_the_maker_writes(tmp_path: Path, kind: str) -> None:
    shipped = SHIPPED.with_name(KINDS[kind])
    # The maker ends by loading the directory with transformers and running one forward pass.
    done = CliRunner().invoke(main, [str(tmp_path), f"--kind={kind}"], catch_exceptions=False)
    assert done.exit_code == 0 and "parameters" in done.output
    for path in sorted(tmp_path.iterdir()):
        if path.name == "tokenizer.json":  # its layout changes with the tokenizers version
            made, kept = (Tokenizer.from_file(str(d / path.name)) for d in (tmp_path, shipped))
            assert made.get_vocab() == kept.get_vocab()
        else:
            assert path.read_text() == (shipped / path.name).read_text(), path.name


def test_every_language_family_has_a_tiny_model(tmp_path: Path) -> None:
    wanted = {name for name, family in FAMILIES.items() if "vision" not in family.parts}
    assert {*LANGUAGES, "qwen3"} == {name for name in wanted if "audio" not in FAMILIES[name].parts}
    qwen3 = json.loads((SHIPPED_TEXT / "config.json").read_text())
    for kind in LANGUAGES:
        (tmp_path / "config.json").write_text(json.dumps(language_config(kind, qwen3)))
        model = family_class(kind).from_directory(tmp_path, dtype=torch.float32)
        assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6, kind


def test_special_tokens_have_the_ids_of_the_config() -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    for key, token in (
        ("image_token_id", "<|image_pad|>"),
        ("video_token_id", "<|video_pad|>"),
        ("vision_start_token_id", "<|vision_start|>"),
        ("vision_end_token_id", "<|vision_end|>"),
    ):
        assert config[key] == tokenizer.token_to_id(token)
    assert config["text_config"]["eos_token_id"] == tokenizer.token_to_id("<|im_end|>")
    assert tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]
    rope = config["text_config"]["rope_parameters"]
    assert sum(rope["mrope_section"]) * 2 == config["text_config"]["head_dim"]


def test_text_survives_the_tokenizer() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))
    text = "<|im_start|>user\nIt's 12 + 30, naïve 数字 …\n\n  yes<|im_end|>\n"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
