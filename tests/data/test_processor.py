import json
import pickle
import shutil

import numpy as np
import pytest
import torch

from tests.data.chats import encoded_image
from tests.data.packs import MODEL, tiny_processor, write_mixture
from triptych_data.processor import Processor
from triptych_data.sample import RawSample
from triptych_data.shards.reader import Shards


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return Shards.open(write_mixture(tmp_path_factory.mktemp("mixture")))


@pytest.fixture
def model(tmp_path):
    return shutil.copytree(MODEL, tmp_path / "model")


def image_sample(*messages, media=None):
    record = {"messages": [{"role": role, "content": content} for role, content in messages]}
    return RawSample("7", "a.tar: sample 7", record, media or [])


LOOK = [{"type": "image", "index": 0}, {"type": "text", "text": "What?"}]


def test_measure_agrees_with_encode(shards):
    processor = tiny_processor()
    for i in range(shards.num_samples):
        encoded = processor.encode(shards.read(i))
        measured = processor.measure(shards.read_json(i), shards.media_of(i))
        patches = 0 if encoded.pixel_values is None else len(encoded.pixel_values)
        images = encoded.image_grid_thw.prod(dim=1)
        assert measured == (
            len(encoded.input_ids),
            encoded.num_targets,
            patches,
            len(images),
            int((images**2).sum()),
            0,
        )


def test_encoded_parts_fit_each_other(shards):
    processor = tiny_processor()
    for i in range(20):
        encoded = processor.encode(shards.read(i))
        length = len(encoded.input_ids)
        assert encoded.shift_labels.shape == (length,)
        assert encoded.position_ids.shape == (3, length)
        assert int((encoded.shift_labels != -100).sum()) == encoded.num_targets > 0
        is_image = encoded.input_ids == processor.image_token_id
        assert is_image.sum() * 4 == encoded.image_grid_thw.prod(dim=1).sum()
        if encoded.pixel_values is not None:
            assert encoded.pixel_values.dtype == torch.uint8
            assert encoded.pixel_values.shape[1] == processor.patch_dim == 384
        tensors = encoded.input_ids, encoded.shift_labels, encoded.position_ids
        assert {t.dtype for t in (*tensors, encoded.image_grid_thw)} == {torch.int64}


def test_media_are_taken_by_index_as_the_text_meets_them():
    media = [encoded_image(64, 32, shade=10), encoded_image(32, 64, shade=200)]
    content = [{"type": "image", "index": i} for i in (1, 0, 1)]
    raw = image_sample(("user", content), ("assistant", "Two."), media=media)
    encoded = tiny_processor().encode(raw)
    assert encoded.image_grid_thw.tolist() == [[1, 8, 4], [1, 4, 8], [1, 8, 4]]
    assert torch.equal(encoded.pixel_values[:32], encoded.pixel_values[64:])


def test_pixel_bounds_replace_the_folders():
    few = Processor.from_directory(MODEL, max_pixels=2048)
    many = Processor.from_directory(MODEL, min_pixels=8192)
    raw = image_sample(("user", LOOK), ("assistant", "A."), media=[encoded_image(64, 64)])
    assert len(few.encode(raw).pixel_values) * 64 <= 2048
    assert len(many.encode(raw).pixel_values) * 64 >= 8192
    assert len({few.fingerprint, many.fingerprint, tiny_processor().fingerprint}) == 3


def test_prompt_ends_before_the_last_answer():
    processor = tiny_processor()
    turns = ("user", LOOK), ("assistant", "A cat."), ("user", "Sure?"), ("assistant", " Yes 猫 ")
    raw = image_sample(*turns, media=[encoded_image(64, 64)])
    prompt, answer = processor.encode_prompt(raw)
    whole = processor.encode(raw)
    length = len(prompt.input_ids)
    assert answer == " Yes 猫 "
    assert torch.equal(prompt.input_ids, whole.input_ids[:length])
    assert torch.equal(prompt.position_ids, whole.position_ids[:, :length])
    assert torch.equal(prompt.pixel_values, whole.pixel_values)
    assert prompt.num_targets == 0 and (prompt.shift_labels == -100).all()
    assert processor.decode(whole.input_ids[length:]) == " Yes 猫 \n"
    assert whole.input_ids[-2] == processor.eos_token_id


def test_prompt_needs_an_answer():
    with pytest.raises(ValueError, match=r"a\.tar: sample 7: the last message must be"):
        tiny_processor().encode_prompt(
            image_sample(("user", "a"), ("assistant", "b"), ("user", "c"))
        )


def test_errors_name_the_sample():
    processor = tiny_processor()
    broken = encoded_image(64, 64)[:200]
    raw = image_sample(("user", LOOK), ("assistant", "A."), media=[broken])
    with pytest.raises(ValueError, match=r"a\.tar: sample 7: image 0: .* whole JPEG"):
        processor.encode(raw)
    with pytest.raises(ValueError, match=r"a\.tar: sample 7: .*must hold a target"):
        processor.encode(image_sample(("user", "a"), ("assistant", "")))


def test_pickled_processor_encodes_the_same(shards):
    copy = pickle.loads(pickle.dumps(tiny_processor()))
    assert copy.fingerprint == tiny_processor().fingerprint
    assert len(pickle.dumps(copy)) < 1000
    assert torch.equal(
        copy.encode(shards.read(0)).input_ids, tiny_processor().encode(shards.read(0)).input_ids
    )


def test_pickled_processor_refuses_a_changed_folder(model):
    data = pickle.dumps(Processor.from_directory(model))
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    with pytest.raises(ValueError, match="must not change during a run"):
        pickle.loads(data)


def test_fingerprint_covers_what_changes_tokens(model):
    before = Processor.from_directory(model).fingerprint
    assert before == tiny_processor().fingerprint  # not the place

    path = model / "preprocessor_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "image_mean": [0.4, 0.4, 0.4]}))
    assert Processor.from_directory(model).fingerprint == before  # applied on the device
    path.write_text(json.dumps({**settings, "size": {**settings["size"], "shortest_edge": 2048}}))
    assert Processor.from_directory(model).fingerprint != before
    path.write_text(json.dumps(settings))

    path = model / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["merges"].pop()
    path.write_text(json.dumps(tokenizer))
    assert Processor.from_directory(model).fingerprint != before


def test_template_in_tokenizer_config_is_found(model):
    path = model / "tokenizer_config.json"
    template = (model / "chat_template.jinja").read_text()
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    (model / "chat_template.jinja").unlink()
    assert Processor.from_directory(model).fingerprint == tiny_processor().fingerprint


@pytest.mark.parametrize("name", ["tokenizer.json", "preprocessor_config.json"])
def test_missing_file_is_named(model, name):
    (model / name).unlink()
    with pytest.raises((ValueError, OSError), match=name):
        Processor.from_directory(model)


def test_missing_template_is_named_when_there_is_a_chat(model):
    (model / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="must hold a chat template"):
        Processor.from_directory(model).encode(image_sample(("user", "A?"), ("assistant", "B.")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"patch_size": None}, "patch_size must be a positive integer"),
        ({"resample": 2}, "resample must be 3"),
        ({"min_pixels": 4096, "max_pixels": 2048}, "min_pixels=4096, max_pixels=2048"),
    ],
)
def test_settings_that_cannot_be_are_refused(model, change, message):
    path = model / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        Processor.from_directory(model)


def test_attributes_of_the_tiny_model():
    processor = tiny_processor()
    assert (processor.patch_size, processor.merge_size, processor.temporal_patch_size) == (8, 2, 2)
    assert (processor.pad_token_id, processor.eos_token_id) == (408, 410)
    assert processor.image_token_id == 413
    np.testing.assert_allclose(processor.image_mean, 0.5)
    np.testing.assert_allclose(processor.image_std, 0.5)
