from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from tests.models import tiny
from tests.models.conftest import Build
from tests.models.stock import stock_logits
from triptych_models.export import export

SHIPPED = Path(__file__).parents[2] / "stages/configs/qwen3_vl_tiny"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stock_transformers_loads_an_export_and_gives_equal_logits(
    build: Build, documents: list[tiny.Document], tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    model = build(tied=tied)
    out = tmp_path / "export"
    export(model.hf, out, tmp_path / f"tiny-{tied}", dtype=dtype, max_shard_bytes=50_000)
    stock, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert stock.dtype == dtype
    if dtype == torch.bfloat16:
        model.hf.to(dtype).float()  # round the weights alike, compute in fp32
        stock.float()
    batch = tiny.inputs_only(tiny.pack(documents, 96))
    logits = model.logits(**batch)[0]
    expected = torch.cat([stock_logits(stock, model, doc) for doc in documents])
    torch.testing.assert_close(
        logits[: len(expected)],
        expected,
        **({"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0, "atol": 2e-2}),
    )


def test_an_export_is_complete_or_absent(build: Build, tmp_path: Path) -> None:
    model = build()
    source, out = tmp_path / "tiny-False", tmp_path / "runs" / "export"
    leftover = out.with_name(".export.partial")
    leftover.mkdir(parents=True)
    (leftover / "model.safetensors").write_text("half")
    export(model.hf, out, source)
    assert sorted(p.name for p in out.parent.iterdir()) == ["export"]
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "model.safetensors",
        "preprocessor_config.json",
    ]
    with pytest.raises(ValueError, match="export: directory must not exist"):
        export(model.hf, out, source)


def test_only_the_main_rank_writes(build: Build, tmp_path: Path) -> None:
    export(build().hf, tmp_path / "export", tmp_path / "tiny-False", is_main=False)
    assert not (tmp_path / "export").exists()


def test_processor_of_the_shipped_tiny_model_loads_from_an_export(
    build: Build, tmp_path: Path
) -> None:
    model = build(path=SHIPPED, init="random")
    export(model.hf, tmp_path / "export", SHIPPED)
    processor = AutoProcessor.from_pretrained(tmp_path / "export")
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]}],
        add_generation_prompt=True,
    )
    assert processor.image_token in text
