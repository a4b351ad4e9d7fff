"""Videos and audios from JSONL to shards, index, reader, survey and preview."""

import base64
import json
import re
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from tests.data.chats import encoded_image, write_jsonl
from tests.data.media import clip, sound
from tests.data.packs import MODEL, tiny_processor
from triptych_data.cli.main import main
from triptych_data.look.preview import build_page
from triptych_data.look.survey import as_text, survey
from triptych_data.shards.index import index_paths, write_index
from triptych_data.shards.reader import Shards
from triptych_data.shards.scan import build_index
from triptych_data.shards.write import write_shards

ANSWER = {"role": "assistant", "content": "A boat."}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.mp4").write_bytes(clip(30))
    (folder / "b.webm").write_bytes(clip(36, kind="webm", codec="libvpx-vp9", rotation=0))
    (folder / "c.flac").write_bytes(sound(1.5, kind="flac", codec="flac"))
    (folder / "d.jpg").write_bytes(encoded_image(64, 32))
    wav = base64.b64encode(sound(0.5)).decode()
    question = "<video> or <video>, and <image>?"
    records = [
        {
            "messages": [{"role": "user", "content": question}, ANSWER],
            "videos": ["a.mp4", "b.webm"],
            "images": ["d.jpg"],
        },
        {
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "audio", "audio": "c.flac"},
                        {"type": "input_audio", "input_audio": {"data": wav, "format": "wav"}},
                    ],
                },
                ANSWER,
            ]
        },
    ]
    source = write_jsonl(folder / "chats.jsonl", records)
    report = write_shards(source, folder / "shards")
    assert (report.num_images, report.num_videos, report.num_audios) == (1, 2, 2)
    return Shards.open([folder / "shards"])


def test_columns_measure_each_medium_in_the_order_of_the_text(shards):
    assert shards.media.kind.tolist() == [1, 1, 0, 2, 2]
    assert shards.media.size.tolist() == [[64, 48], [64, 48], [64, 32], [0, 0], [0, 0]]
    assert shards.media.frames.tolist() == [30, 36, 0, 0, 0]
    np.testing.assert_allclose(shards.media.seconds, [1.25, 1.5, 0, 1.5, 0.5])
    assert shards.media_start.tolist() == [0, 3, 5]
    assert shards.media_of(1).seconds.tolist() == [1.5, 0.5]


def test_members_are_named_by_their_content(shards):
    index = shards.indexes[0]
    rows = index.member_suffix[: index.member_start[-1]].tolist()
    names = [index.suffixes[row].split(".")[-1] for row in rows]
    assert names == ["json", "mp4", "webm", "jpg", "json", "flac", "wav"]


def test_writer_and_scan_agree_to_the_byte(shards):
    written = [path.read_bytes() for path in index_paths(shards.paths[0])]
    write_index(shards.paths[0], build_index(shards.paths[0]))
    assert [path.read_bytes() for path in index_paths(shards.paths[0])] == written


def test_measuring_from_the_index_is_encoding(shards):
    encoded = tiny_processor().encode(shards.read(0))
    measured = tiny_processor().measure(shards.read_json(0), shards.media_of(0))
    assert measured[:3] == (
        len(encoded.input_ids),
        encoded.num_targets,
        len(encoded.pixel_values),
    )
    assert measured.num_images == len(encoded.image_grid_thw)


def test_survey_counts_videos_and_audios(shards):
    report = survey(shards)
    assert (report["num_images"], report["num_videos"], report["num_audios"]) == (1, 2, 2)
    assert report["images_per_sample"] == {"0": 1, "1": 1}
    assert report["video_seconds"]["total"] == pytest.approx(2.8)
    assert report["audio_seconds"]["max"] == 1.5
    assert "1 images, 2 videos, 2 audios" in as_text(report)
    json.dumps(report)


def test_preview_shows_frames_and_plays_sounds(shards):
    html = build_page(shards, MODEL, 2)
    frames = sum(len(tiny_processor().frame_times(info)) for info in _videos(shards))
    assert html.count('class="frame"') == frames > 4
    assert html.count("<audio controls") == 2
    assert re.search(r"video 0: 64 × 48 px, 1.2 s, 30 frames, \d+ tokens", html)
    assert re.search(r"audio 1: 0.5 s</figcaption>", html)
    assert "got audio, for which the folder has no preprocessor file" in html
    assert re.search(r"&lt;\|video_pad\|&gt; × \d+", html)


def _videos(shards):
    from triptych_data.media.probe import probe_media

    return [probe_media(data, "video", "x") for data in shards.read(0).media[:2]]


def test_without_pyav_the_command_to_install_it_is_told(tmp_path, monkeypatch):
    """Not a bad line, which --skip-bad would leave out, nor a bad sample, which is a hole."""
    (tmp_path / "a.mp4").write_bytes(clip(4))
    question = {"role": "user", "content": "<video>"}
    record = {"messages": [question, ANSWER], "videos": ["a.mp4"]}
    source = write_jsonl(tmp_path / "chats.jsonl", [record])
    monkeypatch.setitem(sys.modules, "av", None)
    arguments = ["shard", str(source), str(tmp_path / "out"), "--skip-bad", "--workers=1"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "run: pip install 'triptych-data[video,audio]'" in result.output
    assert "Traceback" not in result.output
