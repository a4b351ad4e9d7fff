from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.models import tiny
from tests.models.conftest import Build
from tests.models.stock import stock_twin
from triptych_models.catalogue import FAMILIES
from triptych_models.config import ModelConfig
from triptych_models.export import export
from triptych_models.families import build_model
from triptych_models.weights import load_weights


def test_initialisation_is_a_function_of_the_seed(build: Build) -> None:
    first, again, other = build(seed=3), build(seed=3), build(seed=4)
    half = build(seed=3, dtype=torch.bfloat16)
    for (name, p), q, h in zip(
        first.named_parameters(), again.parameters(), half.parameters(), strict=True
    ):
        assert torch.equal(p, q), name
        assert torch.equal(p.bfloat16(), h), name
    weight = "hf.lm_head.weight"
    assert not torch.equal(first.get_parameter(weight), other.get_parameter(weight))


def test_initialisation_follows_transformers_rule(build: Build) -> None:
    """Same constants; drawn weights have the same spread (a stock draw is another draw)."""
    model = build()
    stock = stock_twin(model)
    stock.init_weights()
    ours = dict(model.hf.named_parameters())
    for name, expected in stock.named_parameters():
        if expected.std() == 0:
            assert torch.equal(ours[name], expected), name
        else:
            assert ours[name].std().item() == pytest.approx(0.1, rel=0.15), name
            assert expected.std().item() == pytest.approx(0.1, rel=0.15), name


def test_padding_embedding_starts_at_zero(tmp_path: Path) -> None:
    path = tiny.write_model_dir(tmp_path / "padded")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(
        config.replace('"vocab_size"', f'"pad_token_id": {tiny.PAD}, "vocab_size"')
    )
    model = build_model(ModelConfig(path=path, init="random"), dtype=torch.float32)
    embedding = model.hf.model.language_model.embed_tokens.weight
    assert not embedding[tiny.PAD].any()
    assert embedding[tiny.PAD - 1].any()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000])
def test_loading_an_export_gives_bit_equal_weights(
    build: Build, tmp_path: Path, tied: bool, max_shard_bytes: int
) -> None:
    model = build(tied=tied)
    out = tmp_path / "export"
    source = tmp_path / f"tiny-{tied}"
    export(model.hf, out, source, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    assert (out / "model.safetensors").is_file() == (max_shard_bytes == 10**9)
    loaded = build(path=out)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    tie = loaded.hf.lm_head.weight is loaded.hf.model.language_model.embed_tokens.weight
    assert tie == tied


@pytest.fixture
def exported(build: Build, tmp_path: Path) -> Path:
    out = tmp_path / "export"
    export(build(tied=True).hf, out, tmp_path / "tiny-True", dtype=torch.float32)
    return out


def rewrite(directory: Path, change: dict[str, torch.Tensor | None]) -> None:
    tensors = load_file(directory / "model.safetensors")
    for name, tensor in change.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor
    save_file(tensors, directory / "model.safetensors")


NORM = "model.language_model.norm.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({NORM: None}, rf"missing \['{NORM}'\]"),
        ({"stranger": torch.zeros(1)}, r"unexpected \['stranger'\]"),
        ({NORM: torch.ones(31)}, rf"{NORM} \[31\] ≠ \[32\]"),
        ({"lm_head.weight": torch.zeros(300, 32)}, "lm_head.weight must equal"),
    ],
)
def test_loading_is_strict(
    build: Build, exported: Path, change: dict[str, torch.Tensor | None], message: str
) -> None:
    rewrite(exported, change)
    with pytest.raises(ValueError, match=message):
        build(path=exported)


def test_a_tied_head_may_be_stored_twice(build: Build, exported: Path) -> None:
    embedding = load_file(exported / "model.safetensors")[EMBEDDING]
    rewrite(exported, {"lm_head.weight": embedding.clone()})
    assert torch.equal(build(path=exported).hf.lm_head.weight, embedding)


def test_a_directory_without_weights_or_of_another_family_is_refused(
    build: Build, tmp_path: Path
) -> None:
    path = tiny.write_model_dir(tmp_path / "bare")
    with pytest.raises(ValueError, match=r"model.path: must hold model.safetensors"):
        build(path=path)
    (path / "config.json").write_text('{"model_type": "qwen3"}')
    with pytest.raises(ValueError, match="model_type must be qwen3_vl, got qwen3"):
        build(path=path, family="qwen3_vl")
    (path / "config.json").write_text('{"model_type": "llama"}')
    known = ", ".join(FAMILIES)
    with pytest.raises(ValueError, match=f"model_type must be one of {known}, got llama"):
        build(path=path)
    with pytest.raises(ValueError, match=r"model.path: must hold a config.json"):
        build(path=tmp_path / "nowhere")


def test_load_weights_casts_to_the_models_dtype(build: Build, exported: Path) -> None:
    model = build(tied=True, dtype=torch.bfloat16)
    load_weights(model.hf, exported)
    stored = load_file(exported / "model.safetensors")
    for name, parameter in model.hf.named_parameters():
        assert torch.equal(parameter, stored[name].bfloat16()), name
