import numpy as np
import pytest
import torch
from scipy.signal import resample_poly
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from tests.data.chats import encoded_image
from tests.data.media import clip, sound
from triptych_data.media import clips
from triptych_data.media.audio import (
    WHISPER,
    AudioRules,
    audio_tokens,
    hear,
    heard_frames,
    load_wave,
    log_mel,
    mel_filters,
    resample,
)
from triptych_data.media.probe import probe_media

FILES = {
    "wav": {},
    "wav24": {"codec": "pcm_s24le", "rate": 48_000, "channels": 2},
    "wav float": {"codec": "pcm_f32le", "rate": 22_050},
    "wav 8 bit": {"codec": "pcm_u8", "rate": 8_000},
    "flac": {"kind": "flac", "codec": "flac", "rate": 44_100, "channels": 2},
    "mp3": {"kind": "mp3", "codec": "libmp3lame", "rate": 44_100, "channels": 2},
    "ogg": {"kind": "ogg", "codec": "vorbis", "rate": 48_000, "channels": 2},
    "opus": {"kind": "ogg", "codec": "libopus", "rate": 48_000},
    "m4a": {"kind": "ipod", "codec": "aac", "rate": 44_100},
}
CHUNKS = AudioRules(chunk=100)
LOSSY = ("mp3", "ogg", "opus", "m4a", "wav 8 bit")


def voice(seconds, rate=16_000, seed=0):
    """Noise in bands that come and go, about as uneven as speech."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    wave = 0.01 * rng.standard_normal(len(time))
    for hertz in (120, 480, 1_300, 2_900, 5_100):
        wave += 0.2 * np.sin(2 * np.pi * hertz * time) * (np.sin(time * hertz / 70) > 0)
    return torch.from_numpy(wave.astype(np.float32))


@pytest.mark.parametrize("num_mels", [80, 128])
@pytest.mark.parametrize("seconds", [0.5, 7.3, 30.0])
@pytest.mark.parametrize("padding", ["max_length", False])
def test_features_are_whispers(num_mels, seconds, padding):
    stock = WhisperFeatureExtractor(feature_size=num_mels)
    wave = voice(seconds)
    options = {"sampling_rate": 16_000, "return_tensors": "pt", "padding": padding}
    expected = stock(wave.numpy(), **options)["input_features"][0]
    if padding:
        wave = torch.nn.functional.pad(wave, (0, 480_000 - len(wave)))
    features = log_mel(wave, AudioRules(num_mels=num_mels))
    torch.testing.assert_close(features, expected, rtol=0, atol=2e-5)
    assert expected.std() > 0.1


def test_filters_are_transformers():
    for num_mels in (80, 128):
        theirs = WhisperFeatureExtractor(feature_size=num_mels).mel_filters
        np.testing.assert_allclose(mel_filters(16_000, 400, num_mels), theirs, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", FILES)
def test_files_are_decoded_to_what_was_encoded(name):
    data = sound(2.0, hertz=440, **FILES[name])
    wave = load_wave(data, 16_000)
    time = np.arange(len(wave)) / 16_000
    middle = slice(3_000, 28_000)
    basis = np.stack([np.sin(2 * np.pi * 440 * time), np.cos(2 * np.pi * 440 * time)], axis=1)
    fit, *_ = np.linalg.lstsq(basis[middle], wave.numpy()[middle], rcond=None)
    assert np.hypot(*fit) == pytest.approx(0.5, abs=0.03)  # LAME turns it down
    rest = wave.numpy()[middle] - basis[middle] @ fit
    assert np.sqrt(np.mean(rest**2)) < (0.02 if name in LOSSY else 1e-4)
    assert abs(len(wave) - 32_000) <= (2_500 if name in LOSSY else 0)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("seconds", [0.05, 1.0, 3.337])
def test_frames_are_known_from_the_index(name, seconds):
    data = sound(seconds, **FILES[name])
    info = probe_media(data, "audio", "x")
    for rules in (WHISPER, CHUNKS, AudioRules(max_seconds=1.5)):
        if info.seconds > 2 > rules.max_seconds:
            with pytest.raises(ValueError, match=r"at most 1\.5 s long"):
                hear(data, rules)
            with pytest.raises(ValueError, match=r"at most 1\.5 s long"):
                heard_frames(info.seconds, rules)
            continue
        features = hear(data, rules)
        assert features.shape == (heard_frames(info.seconds, rules), 80)
        assert features.isfinite().all()


def test_lengths_after_resampling_are_known_from_seconds():
    """For any number of samples at any common rate, whatever rounding did to the seconds."""
    rng = np.random.default_rng(0)
    for rate in (8_000, 11_025, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000, 96_000, 22_051):
        for count in rng.integers(rate // 10, 30 * rate, 300).tolist():
            samples = -(-count * 16_000 // rate)
            assert heard_frames(count / rate, WHISPER) == -(-samples // 160)
            assert heard_frames(count / rate, CHUNKS) == samples // 160
    for factor in (1, 2, 3, 6):  # where rounding could make up for a sample, or add one
        for frames in range(3, 3000):
            count, rate = 160 * frames * factor, 16_000 * factor
            assert heard_frames(count / rate, WHISPER) == frames
            assert heard_frames((count + 1) / rate, WHISPER) == min(frames + 1, 3000)
            assert heard_frames((count - factor) / rate, CHUNKS) == frames - 1


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 24_000, 44_100, 48_000, 96_000, 22_051])
def test_tones_survive_resampling(rate):
    """To 80 % of the lower Nyquist frequency within 0.02 %, at every sample but the ends; an odd
    rate, whose ratio is rounded, drifts by less than half a microsecond in a second."""
    for share in (0.05, 0.4, 0.8):
        hertz = share * min(rate, 16_000) / 2
        wave = torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(rate) / rate)).float()
        got = resample(wave, rate, 16_000)
        expected = np.sin(2 * np.pi * hertz * np.arange(16_000) / 16_000)
        assert got.shape == (16_000,)
        assert np.abs(got.numpy() - expected)[300:-300].max() < (2e-2 if rate == 22_051 else 2e-4)


@pytest.mark.parametrize("rate", [22_050, 44_100, 48_000])
def test_what_16_khz_cannot_hold_is_gone(rate):
    for hertz in (8_100, 9_000, rate / 2 - 100):
        wave = torch.from_numpy(np.sin(2 * np.pi * hertz * np.arange(rate) / rate)).float()
        alias = resample(wave, rate, 16_000).numpy()[300:-300]
        assert 20 * np.log10(np.abs(alias).max()) < -80


def test_resampling_is_a_polyphase_filter_like_scipys():
    wave = voice(1.0, rate=48_000)
    ours = resample(wave, 48_000, 16_000).numpy()
    theirs = resample_poly(wave.numpy(), 1, 3, window=("kaiser", 10.0))
    smooth = np.abs(np.fft.rfft(ours - theirs))[
        :6_000
    ]  # scipy's filter is shorter: it differs above
    assert smooth.max() < 2e-3 * np.abs(np.fft.rfft(ours)).max()


def test_resampling_a_longer_wave_in_phases_is_resampling_its_start():
    wave = voice(1.0, rate=44_100)
    whole, start = resample(wave, 44_100, 16_000), resample(wave[:20_000], 44_100, 16_000)
    torch.testing.assert_close(whole[:7_000], start[:7_000], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["wav24", "flac", "mp3"])
def test_a_long_recording_is_refused_and_not_read_to_its_end(name):
    """But for what a codec may have padded, which is cut off."""
    data, rules = sound(4.0, **FILES[name]), AudioRules(max_seconds=1.0)
    with pytest.raises(ValueError, match="audio must be at most 1 s long"):
        hear(data, rules)
    padded = sound(1.03, **FILES[name])
    cut = load_wave(padded, 16_000)[:16_000]
    torch.testing.assert_close(hear(padded, rules), log_mel(cut, rules).T)
    rate, channels = clips.read_audio(data, 1.1)
    assert 1.1 * rate <= channels.shape[1] < 1.3 * rate


def test_stereo_is_the_mean_of_its_channels():
    data = sound(0.5, channels=2)
    rate, channels = clips.read_audio(data)
    assert rate == 16_000 and channels.shape == (2, 8_000)
    torch.testing.assert_close(load_wave(data, rate), torch.from_numpy(channels).mean(0))


def test_tokens_are_qwen2_audios():
    lengths = Qwen2AudioEncoder._get_feat_extract_output_lengths
    frames = torch.arange(2, 3001)
    _, expected = lengths(None, frames)
    assert [audio_tokens(int(n)) for n in frames] == expected.tolist()
    assert audio_tokens(3000) == 750


def test_damaged_and_foreign_files_are_refused():
    data = sound(1.0, kind="flac", codec="flac")
    bad = [b"", b"no sound", data[:20], encoded_image(), clip(3), b"#EXTM3U\nfile:///etc/passwd\n"]
    for broken in bad:
        with pytest.raises(ValueError, match=r"^x: audio must be a whole file of wav, flac, mp3"):
            probe_media(broken, "audio", "x")


def test_no_damage_ends_in_another_error_than_ours():
    rng = np.random.default_rng(0)
    for name in ("wav", "flac", "mp3", "ogg", "opus", "m4a"):
        data = sound(0.3, **FILES[name])
        for _ in range(40):
            broken = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                broken[at] = rng.integers(256)
            try:
                hear(bytes(broken), WHISPER)
            except ValueError:
                continue
