"""A tiny model out and into stock transformers and back: every tensor and the loss the same."""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def main() -> int:
    sys.path.insert(0, str(ROOT))
    import torch

    from tests.models.proofs import PROOFS, SEQ_LEN
    from tests.models.test_text import shake
    from triptych_models.config import ModelConfig
    from triptych_models.export import export
    from triptych_models.families import build_model

    family = sys.argv[1] if len(sys.argv) > 1 else "qwen3"
    if family not in PROOFS:
        print(f"family: must be one of {', '.join(PROOFS)}, got {family}")
        return 2
    with tempfile.TemporaryDirectory() as scratch:
        source, out = Path(scratch) / "source", Path(scratch) / "out"
        PROOFS[family].write(source)
        model = build_model(ModelConfig(path=source, init="random"), dtype=torch.float32).eval()
        shake(model)
        export(model.hf, out, source, dtype=torch.float32)
        back = build_model(ModelConfig(path=out), dtype=torch.float32).eval()
        stock, surplus = type(model.hf).from_pretrained(out, output_loading_info=True)
        row = PROOFS[family].pack(PROOFS[family].documents(), SEQ_LEN)
        with torch.no_grad():
            losses = [float(each(**row).loss_sum) for each in (model, back)]
    differ = [
        name
        for name, tensor in back.hf.state_dict().items()
        if not torch.equal(tensor, model.hf.state_dict()[name])
    ]
    lacking = {key: names for key, names in surplus.items() if names}
    print(
        f"{family}: {len(stock.state_dict())} tensors, loss {losses[0]:.4f}, back {losses[1]:.4f}"
    )
    print(f"differ: {differ or 'none'}; stock misses or has no use for: {lacking or 'none'}")
    return int(bool(differ or lacking) or losses[0] != losses[1])


if __name__ == "__main__":
    sys.exit(main())
