"""The proofs of a family: by default of the one that examples/own_project adds."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROOFS_RUN = "loss_and_gradients or a_row_is or learns or frozen or flops"


def main() -> int:
    sys.path[:0] = [str(ROOT), str(ROOT / "examples/own_project")]
    import my_family  # noqa: F401

    from tests.models import tiny
    from tests.models.proofs import PROOFS, Proof, texts

    PROOFS["mistral"] = Proof(write_mistral, texts, tiny.pack_text)
    family = sys.argv[1] if len(sys.argv) > 1 else "mistral"
    if family not in PROOFS:
        print(f"family: must be one of {', '.join(PROOFS)}, got {family}")
        return 2
    file = str(ROOT / "tests/models/test_families.py")
    return int(pytest.main([file, "-q", "-k", f"{family} and ({PROOFS_RUN})"]))


def write_mistral(directory: Path) -> Path:
    """config.json as published folders write it."""
    import json

    from tests.models.tiny import write_text_model_dir

    file = write_text_model_dir(directory) / "config.json"
    config = json.loads(file.read_text()) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "sliding_window": None,
    }
    file.write_text(json.dumps(config))
    return directory


if __name__ == "__main__":
    sys.exit(main())
