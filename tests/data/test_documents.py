"""Documents: plain text, every token of which is learnt, as samples beside chats."""

import shutil

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from transformers import AutoTokenizer

from tests.data.chats import chat, encoded_image, write_jsonl
from tests.data.packs import MODEL, tiny_processor
from triptych_data.batch import collate
from triptych_data.cli.main import main
from triptych_data.config import DataConfig
from triptych_data.heldout import Heldout
from triptych_data.loader import PackLoader
from triptych_data.plan.lengths import Lengths, sample_lengths
from triptych_data.plan.pieces import cut_documents, is_document
from triptych_data.processor import Processor
from triptych_data.sample import RawSample, check_sample, parse_record
from triptych_data.shards.index import MediaColumns
from triptych_data.shards.mapping import Mapping
from triptych_data.shards.reader import Shards
from triptych_data.shards.write import write_shards

TEXT = "A small boat at sea.\n\nIt saw <|im_start|> and <|image_pad|>: é 漢字 👍"


def document(text=TEXT):
    return RawSample("7", "a.tar: sample 7", {"text": text}, [])


@pytest.fixture
def text_model(tmp_path):
    """A folder of text alone: the tokenizer, without template and preprocessor files."""
    folder = tmp_path / "text-model"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder / name)
    return folder


def test_every_token_but_the_first_is_a_target_and_the_last_is_eos():
    processor = tiny_processor()
    encoded = processor.encode(document())
    ids = encoded.input_ids
    stock = AutoTokenizer.from_pretrained(MODEL)
    assert ids[-1] == stock.eos_token_id
    assert not processor.control_ids & set(ids[:-1].tolist())  # quoted ones are ordinary text
    assert processor.decode(ids[:-1], skip_special_tokens=False) == TEXT
    assert torch.equal(encoded.shift_labels, torch.cat([ids[1:], torch.tensor([-100])]))
    assert encoded.num_targets == len(ids) - 1
    assert torch.equal(encoded.position_ids, torch.arange(len(ids)).expand(3, -1))
    plain = TEXT.replace("<|", "<").replace("|>", ">")
    assert processor.encode(document(plain)).input_ids[:-1].tolist() == (
        stock.encode(plain, add_special_tokens=False)
    )
    measured = processor.measure({"text": TEXT}, MediaColumns.of([]))
    assert measured[:2] == (len(ids), len(ids) - 1)


def test_a_folder_with_only_a_tokenizer_takes_documents_and_no_more(text_model):
    processor = Processor.from_directory(text_model)
    encoded = processor.encode(document())
    whole = tiny_processor().encode(document())
    assert torch.equal(encoded.input_ids, whole.input_ids)
    assert torch.equal(encoded.position_ids, whole.position_ids[:1])
    batch = collate([encoded], 64, pad_token_id=0, position_axes=processor.position_axes)
    assert batch["position_ids"].shape == (1, 64)
    assert processor.eos_token_id == AutoTokenizer.from_pretrained(text_model).eos_token_id
    with pytest.raises(ValueError, match="must hold a chat template"):
        processor.encode(RawSample("1", "x", chat(), []))
    shutil.copy(MODEL / "chat_template.jinja", text_model)
    with_chats = Processor.from_directory(text_model)
    assert with_chats.fingerprint != processor.fingerprint
    ids = with_chats.encode(RawSample("1", "x", chat(), [])).input_ids
    assert torch.equal(ids, tiny_processor().encode(RawSample("1", "x", chat(), [])).input_ids)
    image = parse_record(chat(image="a.jpg"), "x").json
    with pytest.raises(ValueError, match="must take what its samples hold, got image"):
        with_chats.encode(RawSample("1", "x", image, [b""]))


@pytest.mark.parametrize(
    ("record", "num_media", "message"),
    [
        ({"text": " \n"}, 0, "text must be a document's text, got"),
        ({"text": ["a"]}, 0, r"text\[0\].type must be text, image"),
        ({"text": [{"type": "image", "index": 0}]}, 1, "text must be a document's text, got"),
        ({"text": "a"}, 1, "every medium must be used in the text, got no part for number 0"),
    ],
)
def test_what_is_no_document_is_refused(record, num_media, message):
    with pytest.raises(ValueError, match=message):
        check_sample(record, num_media, "x")


def test_text_that_stands_for_control_tokens_is_refused():
    with pytest.raises(ValueError, match=r"a\.tar: sample 7: text must not contain"):
        tiny_processor().encode(document("a\U0010f002b"))


def test_a_tokenizer_without_an_end_token_is_refused(text_model):
    path = text_model / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<|im_end|>"', '"eos_token": null'))
    with pytest.raises(ValueError, match="must name an eos_token"):
        Processor.from_directory(text_model)


def test_documents_and_chats_become_shards_by_the_command(tmp_path):
    records = [{"text": "One.", "url": "a"}, chat(), {"text": "Two."}]
    source = write_jsonl(tmp_path / "x.jsonl", records)
    result = CliRunner().invoke(main, ["shard", str(source), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    shards = Shards.open(tmp_path / "out")
    assert [shards.read(i).json for i in range(3)] == records
    assert shards.text_bytes[0] == 4
    named = write_jsonl(tmp_path / "y.jsonl", [{"content": "Three.", "text": 5, "messages": 1}])
    write_shards(named, tmp_path / "named", mapping=Mapping(text="content"))
    assert Shards.open(tmp_path / "named").read(0).json == {"text": "Three."}


def test_a_caption_whose_image_is_missing_is_no_document(tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"image": None, "text": "A cat."}])
    with pytest.raises(ValueError, match="a row must hold a chat or a document"):
        write_shards(source, tmp_path / "out")
    with pytest.raises(ValueError, match=r"--text: must stand alone"):
        Mapping(text="a", response="b")


INTERLEAVED = "A boat: <image> and two more,<image><image>\nat sea."


def test_media_stand_in_documents_as_stock_prints_them(tmp_path):
    from transformers import AutoProcessor

    names = [f"{i}.png" for i in range(3)]
    for i, name in enumerate(names):
        (tmp_path / name).write_bytes(encoded_image(48 + 16 * i, 32, "PNG"))
    parts = [{"type": "image", "image": names[0]}, {"type": "text", "text": " first. "}]
    records = [{"text": INTERLEAVED, "images": names}, {"text": parts, "url": "x"}]
    write_shards(write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "shards")
    shards, processor = Shards.open(tmp_path / "shards"), tiny_processor()
    assert shards.text_bytes.tolist() == [len(INTERLEAVED) - 3 * len("<image>"), 8]
    stock = AutoProcessor.from_pretrained(MODEL)
    shown = "<|vision_start|><|image_pad|><|vision_end|>"
    texts = INTERLEAVED.replace("<image>", shown), f"{shown} first. "
    for raw, text, used in zip(shards, texts, (names, names[:1]), strict=True):
        encoded = processor.encode(raw)
        images = [Image.open(tmp_path / name) for name in used]
        expected = stock(text=[text], images=images, return_tensors="pt")
        ids = encoded.input_ids
        assert ids.tolist() == [*expected["input_ids"][0].tolist(), stock.tokenizer.eos_token_id]
        assert torch.equal(encoded.image_grid_thw, expected["image_grid_thw"])
        measured = processor.measure(raw.json, shards.media_of(int(raw.key)))
        assert measured[:2] == (len(ids), encoded.num_targets)
        special = torch.tensor(sorted(processor.control_ids - {stock.tokenizer.eos_token_id}))
        trained = ids[1:][encoded.shift_labels[:-1] != -100]
        assert trained.tolist() == [i for i in ids[1:].tolist() if i not in special]
    lengths = sample_lengths(shards, processor)
    assert not is_document(lengths).any()  # they are not cut
    with pytest.raises(ValueError, match="one <image> for each of images, got 1 placeh"):
        parse_record({"text": "A <image>.", "images": ["a", "b"]}, "x")


def test_a_placeholder_without_files_is_text(tmp_path):
    record = {"text": "In HTML, <image> is no tag."}
    write_shards(write_jsonl(tmp_path / "x.jsonl", [record]), tmp_path / "shards")
    assert Shards.open(tmp_path / "shards").read(0).json == record


def lengths_of(tokens, targets):
    columns = [np.array(column, dtype=np.int32) for column in (tokens, targets)]
    rest = np.zeros((4, len(tokens)), dtype=np.int64)
    return Lengths(*columns, *rest)


def test_documents_are_cut_without_losing_a_target_and_chats_are_not():
    seq_len = 8
    tokens = [5, 8, 9, 10, 16, 17, 18, 30, 0, 12]
    targets = [4, 7, 8, 9, 15, 16, 17, 29, 0, 3]  # the last two: a refused sample, a chat
    pieces, cut = cut_documents(lengths_of(tokens, targets), seq_len)
    assert np.diff(pieces.starts).tolist() == [1, 1, 1, 2, 2, 2, 3, 4, 1, 1]
    assert cut.num_tokens.tolist() == [5, 8, 8, 8, 2, 8, 8, 8, 8, 8, 8, 2, 8, 8, 8, 6, 0, 12]
    of_samples = np.add.reduceat(cut.num_targets, pieces.starts[:-1])
    assert of_samples.tolist() == targets
    places = [pieces.locate(piece) for piece in range(len(pieces))]
    assert places == [(s, k) for s, n in enumerate(np.diff(pieces.starts)) for k in range(n)]


@pytest.fixture
def corpus(tmp_path):
    """Documents of 3 to 150 tokens, and a chat or two between them."""
    words = ("a", "small", "boat", "at", "sea", "saw", "one", "more", "and", "then", "it", "none")
    records = [
        {"text": " ".join(words[(i + k) % len(words)] for k in range(3 + 23 * (i % 7)))}
        for i in range(40)
    ]
    records[5:5] = [chat()]
    records[20:20] = [chat(answer="Two.")]
    write_shards(
        write_jsonl(tmp_path / "x.jsonl", records), tmp_path / "shards", samples_per_shard=9
    )
    return tmp_path / "shards"


def test_an_epoch_holds_each_target_of_each_document_once(corpus):
    config = DataConfig(shards=[str(corpus)], seq_len=64, window=64, num_workers=0)
    processor, shards = tiny_processor(), Shards.open(corpus)
    loader = PackLoader(config, processor, rank=0, world_size=1)
    assert loader.describe()["documents cut"] > 10
    assert loader.describe()["samples"] == 42
    seen = {}
    for batch in loader:
        if batch["place"].epoch:
            break
        bounds = batch["cu_seqlens"].tolist()
        for key, piece, first, last in zip(
            batch["sample_keys"], batch["sample_ids"], bounds, bounds[1:], strict=False
        ):
            assert piece not in seen
            sample, number = loader.plan.pieces.locate(piece)
            seen[piece] = sample, number, batch["input_ids"][0, first:last].tolist()
            labels = batch["shift_labels"][0, first:last]
            assert torch.equal(batch["position_ids"][0, 0, first:last], torch.arange(last - first))
            whole = processor.encode(shards.read(sample))
            assert key == (f"{whole.key}#{number}" if len(whole.input_ids) > 64 else whole.key)
            assert torch.equal(labels, whole.shift_labels[64 * number :][: last - first])
    assert sorted(seen) == list(range(len(loader.plan.pieces)))
    for sample in range(42):
        parts = sorted((number, ids) for s, number, ids in seen.values() if s == sample)
        ids = [token for _, part in parts for token in part]
        whole = processor.encode(shards.read(sample)).input_ids.tolist()
        assert ids == whole or (ids == whole[:-1] and len(ids) % 64 == 0)


def test_inspect_counts_what_is_cut(corpus):
    words = ["inspect", str(corpus), "--model", str(MODEL), "--seq-len", "64"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    loader = PackLoader(
        DataConfig(shards=[str(corpus)], seq_len=64, num_workers=0),
        tiny_processor(),
        rank=0,
        world_size=1,
    )
    count = loader.describe()["documents cut"]
    assert f"{count} documents are longer and cut into pieces" in result.output


def test_position_resumes_among_pieces_and_ranks_share_them(corpus):
    config = DataConfig(shards=[str(corpus)], seq_len=64, window=64, num_workers=0)
    one = PackLoader(config, tiny_processor(), rank=0, world_size=1)
    stream = iter(one)
    ids = [next(stream)["sample_ids"] for _ in range(12)]
    resumed = PackLoader(config, tiny_processor(), rank=0, world_size=1)
    first = iter(one_again := PackLoader(config, tiny_processor(), rank=0, world_size=1))
    for _ in range(4):
        next(first)
    resumed.load_state_dict(one_again.state_dict())
    assert [next(iter(resumed))["sample_ids"] for _ in range(3)] == ids[4:7]
    halves = [iter(PackLoader(config, tiny_processor(), rank=r, world_size=2)) for r in (0, 1)]
    assert [next(halves[i % 2])["sample_ids"] for i in range(12)] == ids


def test_heldout_documents_count_whole_and_ask_nothing(corpus):
    heldout = Heldout([corpus], tiny_processor(), seq_len=64, rank=0, world_size=1, limit=100)
    assert len(heldout.questions) == 2
    shards = Shards.open(corpus)
    expected = sum(tiny_processor().encode(raw).num_targets for raw in shards)
    assert sum(batch["num_targets"] for batch in heldout.batches()) == expected
