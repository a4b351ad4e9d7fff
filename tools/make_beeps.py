"""Write chats about recordings of beeps, for tiny models that hear.

    python tools/make_beeps.py OUT_DIR [--train 512] [--heldout 64] [--seed 0]

OUT_DIR gets `train.jsonl`, `heldout.jsonl` and the WAV files they name. A recording has one to four
beeps of one pitch in noise, low or high; the chat asks how many, or which pitch. The same arguments
give the same bytes.
"""

import json
import wave
from pathlib import Path

import click
import numpy as np

RATE = 16_000  # Hz
BEEP, GAP = 0.08, 0.06  # seconds
PITCHES = {"low": 300.0, "high": 2400.0}  # Hz


@click.command()
@click.argument("out_dir", type=click.Path(file_okay=False, path_type=Path))
@click.option("--train", default=512, show_default=True, help="Chats to learn from.")
@click.option("--heldout", default=64, show_default=True, help="Chats to be asked about.")
@click.option("--seed", default=0, show_default=True)
def main(out_dir: Path, train: int, heldout: int, seed: int) -> None:
    """Write both splits."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("heldout", heldout)):
        (out_dir / split).mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(chat(out_dir, f"{split}/{i}.wav", rng)) for i in range(count)]
        (out_dir / f"{split}.jsonl").write_text("\n".join(lines) + "\n")


def chat(out_dir: Path, name: str, rng: np.random.Generator) -> dict[str, object]:
    """A record about a new recording, which is written."""
    pitch, count = str(rng.choice([*PITCHES])), int(rng.integers(1, 5))
    write_wave(out_dir / name, beeps(PITCHES[pitch], count, rng))
    asks_count = bool(rng.integers(2))
    question = "How many?" if asks_count else "Which?"
    answer = str(count) if asks_count else pitch
    messages = [
        {"role": "user", "content": f"<audio>{question}"},
        {"role": "assistant", "content": answer},
    ]
    return {"messages": messages, "audios": [name]}


def beeps(hertz: float, count: int, rng: np.random.Generator) -> np.ndarray:
    """A wave (n,) of count beeps, silence around each, and a little noise."""
    time = np.arange(round(BEEP * RATE)) / RATE
    beep = 0.5 * np.sin(2 * np.pi * hertz * rng.uniform(0.95, 1.05) * time)
    gap = np.zeros(round(GAP * RATE))
    sound = np.concatenate([gap, *([beep, gap] * count)])
    noise: np.ndarray = 0.005 * rng.standard_normal(len(sound))
    return sound + noise


def write_wave(path: Path, sound: np.ndarray) -> None:
    """16-bit mono."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((sound * 32767).astype("<i2").tobytes())


if __name__ == "__main__":
    main()
