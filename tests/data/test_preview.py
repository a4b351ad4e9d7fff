import re
from pathlib import Path

import pytest

from tests.data.chats import chat, encoded_image, make_shards, write_jsonl
from triptych_data.look.preview import build_page
from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards

MODEL = Path(__file__).parents[2] / "stages" / "configs" / "qwen3_vl_tiny"


def articles(page: str) -> list[str]:
    return re.findall(r"<article>.*?</article>", page, re.DOTALL)


def test_samples_are_spread_over_the_shards_or_named(tmp_path):
    make_shards(tmp_path, count=12)
    shards = Shards.open([tmp_path / "shards"])
    shown = articles(build_page(shards, MODEL, 4))
    assert [re.search(r"<b>(\d+)</b>", a)[1] for a in shown] == [f"{i:09d}" for i in (0, 3, 6, 9)]
    keys = ["000000007", "000000002"]
    shown = articles(build_page(shards, MODEL, 4, keys=keys))
    assert [re.search(r"<b>(\d+)</b>", a)[1] for a in shown] == keys
    with pytest.raises(ValueError, match="a key must be one of the shards', got 'nine'"):
        build_page(shards, MODEL, 4, keys=["nine"])


def test_each_token_is_shown_once_and_coloured_as_the_loss_takes_it(tmp_path):
    turns = [
        ("system", "Be brief."),
        ("user", "ünïcode 👍🏽 漢字\nand <|im_end|>?"),
        ("assistant", "First 👍🏽."),
        ("user", "Again?"),
        ("assistant", "Second."),
    ]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    write_shards(write_jsonl(tmp_path / "x.jsonl", [record]), tmp_path / "shards")
    [article] = articles(build_page(Shards.open([tmp_path / "shards"]), MODEL, 1))
    spans = re.findall(r'<span class="([^"]+)" title="([^"]+)">(.*?)</span>', article, re.DOTALL)
    text = "".join(re.sub("<i>↵</i>", "", text) for _, _, text in spans)
    expected = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)
    assert text == expected.replace("<", "&lt;").replace(">", "&gt;")
    trained = "".join(text for kinds, _, text in spans if "trained" in kinds)
    assert trained == "First 👍🏽.&lt;|im_end|&gt;Second.&lt;|im_end|&gt;"
    special = [text for kinds, _, text in spans if "special" in kinds]
    assert len(special) == 2 * len(turns), "what a user wrote is no special token"
    ids = sum(len(re.search(r"id ([^a-z]+),", title)[1].split(",")) for _, title, _ in spans)
    assert f"<span>{ids:,} tokens</span>" in article


def test_images_lie_in_the_page_in_the_order_of_the_text(tmp_path):
    for name, width in (("a.jpg", 90), ("b.png", 60)):
        kind = "JPEG" if name == "a.jpg" else "PNG"
        (tmp_path / name).write_bytes(encoded_image(width, 40, kind))
    record = chat(image="b.png")
    record["messages"][0]["content"].append({"type": "image", "image": "a.jpg"})
    write_shards(write_jsonl(tmp_path / "x.jsonl", [record]), tmp_path / "shards")
    page = build_page(Shards.open([tmp_path / "shards"]), MODEL, 1)
    assert re.findall(r"image \d: (\d+) × 40 px", page) == ["60", "90"]
    assert re.findall(r'src="data:image/(\w+);base64,', page) == ["png", "jpeg"]
    assert "<span>2 images</span>" in page
    assert not re.search(r"(src|href)=.?(?!.?data:)[\"']", page), "nothing is loaded from elsewhere"


def test_a_refused_sample_says_why(tmp_path):
    (tmp_path / "slim.jpg").write_bytes(encoded_image(1, 900))
    source = write_jsonl(tmp_path / "x.jsonl", [chat(image="slim.jpg")])
    write_shards(source, tmp_path / "shards")
    page = build_page(Shards.open([tmp_path / "shards"]), MODEL, 1)
    assert re.search(r'class="error">[^<]*at most 200 times the shorter', page)
