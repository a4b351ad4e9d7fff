import json
import shutil
import types
from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from tests.data.chats import encoded_image
from tests.data.media import clip, decoded, picture, sound
from tests.data.packs import MODEL, tiny_processor
from triptych_data.media import clips
from triptych_data.media.config import VideoConfig
from triptych_data.media.probe import probe_media
from triptych_data.media.rules import read_video_rules
from triptych_data.media.video import VideoRules, encode_video, frame_rate, video_layout
from triptych_data.processor import Processor
from triptych_data.sample import RawSample, media_parts
from triptych_data.shards.index import MediaColumns

RULES = VideoRules(8, 2, 2, 4096, 524288, 2, 4, 768)
FILES = {
    "mp4": {},
    "webm": {"kind": "webm", "codec": "libvpx-vp9"},
    "mkv": {"kind": "matroska"},
    "avi": {"kind": "avi", "codec": "mpeg4"},
    "ntsc": {"rate": Fraction(30000, 1001), "count": 67},
    "slow": {"rate": 1, "count": 9},
    "short": {"count": 5},
}


@pytest.fixture(scope="module")
def stock():
    return AutoProcessor.from_pretrained(MODEL)


def stock_inputs(stock, messages, videos, images=None):
    """What stock makes of a chat whose videos are given as bytes."""
    frames = [decoded(data) for data in videos]
    metadata = []
    for data, pictures in zip(videos, frames, strict=True):
        info = probe_media(data, "video", "x")
        rate = frame_rate(info.frames, info.seconds)
        height, width = pictures.shape[1:3]
        metadata.append(
            {"total_num_frames": len(pictures), "fps": rate, "width": width, "height": height}
        )
    return stock(
        text=[stock.apply_chat_template(messages)],
        images=images,
        videos=frames,
        video_metadata=metadata,
        videos_kwargs={"cap_pixels_per_frame": False},
        return_tensors="pt",
    )


def sample(content, media):
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": "A boat."},
    ]
    return RawSample("7", "a.tar: sample 7", {"messages": messages}, media)


def measured(processor, raw):
    """What the columns of an index alone say of a sample."""
    infos = [probe_media(raw.media[index], kind, "x") for kind, index in media_parts(raw.json)]
    return processor.measure(raw.json, MediaColumns.of(infos))


@pytest.mark.parametrize("name", FILES)
def test_ids_grids_and_pixels_are_stock_qwen3_vls(stock, name):
    data = clip(**FILES[name])
    content = [
        {"type": "text", "text": "Look: "},
        {"type": "video", "index": 0},
        {"type": "text", "text": "What?"},
    ]
    raw = sample(content, [data])
    encoded = tiny_processor().encode(raw)
    expected = stock_inputs(stock, raw.json["messages"], [data])
    assert encoded.input_ids.tolist() == expected["input_ids"][0].tolist()
    frames, height, width = expected["video_grid_thw"][0].tolist()
    assert encoded.image_grid_thw.tolist() == [[1, height, width]] * frames
    normal = encoded.pixel_values.float() / 127.5 - 1
    torch.testing.assert_close(normal, expected["pixel_values_videos"], rtol=1e-5, atol=1e-5)
    positions = torch.nonzero(expected["mm_token_type_ids"][0] == 2).squeeze(1)
    assert encoded.image_positions.tolist() == positions.tolist()
    assert measured(tiny_processor(), raw) == (
        len(encoded.input_ids),
        encoded.num_targets,
        len(encoded.pixel_values),
        frames,
        frames * (height * width) ** 2,
        0,
    )


def test_images_and_videos_keep_the_order_of_the_text(stock):
    media = [clip(30), encoded_image(64, 32), clip(20, size=(96, 64))]
    kinds = ["video", "image", "video"]
    raw = sample([{"type": k, "index": i} for i, k in enumerate(kinds)], media)
    encoded = tiny_processor().encode(raw)
    videos = [encode_video(media[i], RULES) for i in (0, 2)]
    assert len(encoded.image_grid_thw) == sum(layout.grid[0] for _, layout in videos) + 1
    image = tiny_processor().encode(sample([{"type": "image", "index": 0}], media[1:2]))
    expected = torch.cat([videos[0][0], image.pixel_values, videos[1][0]])
    assert torch.equal(encoded.pixel_values, expected)
    assert measured(tiny_processor(), raw).num_patches == len(expected)


@pytest.mark.parametrize("capped", [False, True])
def test_layout_is_stocks_for_any_video(stock, capped):
    rng = np.random.default_rng(0)
    processor = stock.video_processor
    rules = RULES._replace(max_frame_tokens=7 if capped else None)
    for _ in range(300):
        count, width, height = (int(x) for x in rng.integers((2, 20, 20), (3000, 400, 400)))
        rate = float(rng.choice([1, 12.5, 24, 25, 30, 30000 / 1001, 60]))
        metadata = types.SimpleNamespace(total_num_frames=count, fps=rate)
        frames = processor.sample_frames(metadata)
        if len(frames) < 2:
            continue
        layout = video_layout(width, height, count, count / rate, rules)
        assert layout.frames[: len(frames)].tolist() == frames.tolist()
        processor.max_video_tokens = 7
        patches = processor.get_num_of_video_patches(
            len(frames), height, width, {"cap_pixels_per_frame": capped}
        )
        assert np.prod(layout.grid) == patches
        times = stock._calculate_timestamps(frames, rate)
        assert [f"{t:.1f}" for t in layout.seconds] == [f"{t:.1f}" for t in times]


def test_rates_survive_the_index():
    for rate in (Fraction(30000, 1001), Fraction(24000, 1001), 24, 25, 30, 12.5, 60, 15):
        for count in range(1, 400, 7):
            assert frame_rate(count, count / float(rate)) == float(rate)


@pytest.mark.parametrize("name", FILES)
def test_any_frames_are_those_of_decoding_in_order(name):
    data = clip(**FILES[name])
    frames = decoded(data)
    rng = np.random.default_rng(1)
    with clips.open_video(data) as video:
        info = clips.describe_video(video)
        assert info.frames == len(frames)
        for _ in range(5):
            numbers = np.sort(rng.integers(0, len(frames), 4))
            times = numbers / frame_rate(info.frames, info.seconds)
            got = np.stack(list(clips.frames_at(video, times)))
            assert np.array_equal(got, frames[numbers])


def test_few_frames_of_a_long_clip_are_decoded_from_their_key_frames():
    data = clip(240, gop=10)
    with clips.open_video(data) as video:
        assert len(video.key_times) >= 20
        decoded_frames = 0
        context = video.container

        class Counting:
            def seek(self, *args, **options):
                context.seek(*args, **options)

            def decode(self, stream):
                nonlocal decoded_frames
                for frame in context.decode(stream):
                    decoded_frames += 1
                    yield frame

        list(clips.frames_at(video._replace(container=Counting()), np.array([0.0, 5.0, 9.0])))
    assert decoded_frames < 40


@pytest.mark.parametrize("rotation", [90, 180, -90])
def test_a_phones_rotation_is_applied(rotation):
    data = clip(4, size=(64, 32), rotation=rotation)
    info = probe_media(data, "video", "x")
    assert (info.width, info.height) == ((64, 32) if rotation == 180 else (32, 64))
    with clips.open_video(data) as video:
        frame = next(clips.frames_at(video, np.zeros(1)))
    assert np.array_equal(frame, np.rot90(decoded(data)[0], rotation // 90))
    raw = sample([{"type": "video", "index": 0}], [data])
    assert measured(tiny_processor(), raw).num_tokens == len(tiny_processor().encode(raw).input_ids)


def test_variable_rate_shows_what_is_seen_at_the_time_told():
    """One second of frames every 40 ms, then a still picture for two seconds, then one more."""
    times = [*range(0, 1000, 40), 1000, 3000]
    data = clip(len(times), kind="matroska", times=times, rate=25)
    info = probe_media(data, "video", "x")
    assert info.frames == 27 and 3.0 <= info.seconds <= 3.2
    frames = decoded(data)
    with clips.open_video(data) as video:
        shown = list(clips.frames_at(video, np.array([0.0, 0.4, 1.5, 2.5, 3.0])))
    for frame, number in zip(shown, [0, 10, 25, 25, 26], strict=True):
        assert np.array_equal(frame, frames[number])
    raw = sample([{"type": "video", "index": 0}], [data])
    assert measured(tiny_processor(), raw).num_tokens == len(tiny_processor().encode(raw).input_ids)


def test_one_frame_fills_a_patch():
    data = clip(1)
    patches, layout = encode_video(data, RULES)
    assert layout.grid[0] == 1 and layout.frames.tolist() == [0, 0]
    halves = patches.reshape(len(patches), 3, 2, -1)
    assert torch.equal(halves[:, :, 0], halves[:, :, 1])


def test_the_picture_is_the_one_that_was_encoded():
    patches, layout = encode_video(clip(50, size=(64, 48)), RULES)
    rows, cols = layout.grid[1:]
    cut = patches.reshape(-1, rows // 2, cols // 2, 2, 2, 3, 2, 8, 8)
    frames = cut.permute(0, 6, 5, 1, 3, 7, 2, 4, 8).reshape(-1, 3, rows * 8, cols * 8)
    assert frames.shape[2:] == (48, 64)
    for frame, number in zip(frames, layout.frames.tolist(), strict=True):
        expected = picture(number).transpose(2, 0, 1).astype(int)
        assert np.abs(frame.numpy().astype(int) - expected).mean() < 12  # chroma is halved


def test_damaged_and_foreign_files_are_refused():
    data = clip(60)
    bad = [b"", b"no video", data[:500], data[: len(data) // 2], encoded_image(), sound()]
    bad += [b"#EXTM3U\n#EXTINF:9\nfile:///etc/passwd\n", clip(3, kind="matroska")[:300]]
    for broken in bad:
        with pytest.raises(ValueError, match=r"^x: video must be a whole file of mp4"):
            probe_media(broken, "video", "x")
        with pytest.raises(ValueError, match=r"sample 7: video 0: video must be a whole file"):
            tiny_processor().encode(sample([{"type": "video", "index": 0}], [broken]))


def test_no_damage_ends_in_another_error_than_ours():
    """Flipped bytes give other pixels, which checksums of shards find, or a ValueError."""
    rng = np.random.default_rng(0)
    for kind, codec in (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("avi", "mpeg4")):
        data = clip(20, kind=kind, codec=codec)
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 10):
                broken[at] = rng.integers(256)
            try:
                encode_video(bytes(broken), RULES)
            except ValueError:
                continue


def test_folder_without_video_settings_takes_no_videos(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    (model / "video_preprocessor_config.json").unlink()
    processor = Processor.from_directory(model)
    raw = sample([{"type": "video", "index": 0}], [clip(4)])
    with pytest.raises(ValueError, match="got video, for which the folder has no preprocessor"):
        processor.encode(raw)
    with pytest.raises(ValueError, match="got video, for which the folder has no preprocessor"):
        measured(processor, raw)


def test_audio_is_refused_by_name():
    raw = sample([{"type": "audio", "index": 0}], [sound()])
    with pytest.raises(ValueError, match=r"sample 7: audio 0: .*got audio"):
        tiny_processor().encode(raw)
    with pytest.raises(ValueError, match="got audio"):
        measured(tiny_processor(), raw)


def test_options_replace_the_folders(tmp_path):
    rules = read_video_rules(MODEL, VideoConfig(fps=4, max_frames=3, max_pixels=9000))
    assert rules == RULES._replace(fps=4, max_frames=3, min_frames=3, max_pixels=9000)
    raw = sample([{"type": "video", "index": 0}], [clip(100)])
    few = Processor.from_directory(MODEL, video=VideoConfig(max_frames=4))
    fast = Processor.from_directory(MODEL, video=VideoConfig(fps=6))
    small = Processor.from_directory(MODEL, video=VideoConfig(max_pixels=8192))
    assert len(few.encode(raw).image_grid_thw) == 2
    assert len(fast.encode(raw).image_grid_thw) == 13
    assert len(small.encode(raw).pixel_values) * 64 * 2 <= 8192
    prints = {p.fingerprint for p in (few, fast, small, tiny_processor())}
    assert len(prints) == 4


def test_unlike_patches_of_images_and_videos_are_refused(tmp_path):
    model = shutil.copytree(MODEL, tmp_path / "model")
    path = model / "video_preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "patch_size": 16}))
    with pytest.raises(ValueError, match=r"got \(8, 2, 2\) and \(16, 2, 2\)"):
        Processor.from_directory(model)
