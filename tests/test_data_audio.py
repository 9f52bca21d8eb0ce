"""Sound to features: WAV files of every width, tones in the right band, energy in decibels, frames stacked whole."""

from __future__ import annotations

import math
import wave

import numpy as np
import pytest
import torch
from scipy.io import wavfile

from seq2seq.data import audio
from seq2seq.data.audio import BANDS, HOP, RATE, WINDOW, log_mel, read_wav, resample, stack
from seq2seq.data.errors import DataError

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

#: 20 dB in natural logarithms of energy.
TWENTY_DB = math.log(100)


def tone(frequency, seconds=0.2, loudness=0.5, rate=RATE):
    """A sine, (samples,) float64."""
    return loudness * np.sin(2 * np.pi * frequency * np.arange(round(seconds * rate)) / rate)


def write_pcm(path, samples, width, rate=RATE, channels=1):
    """A PCM file of `width` bytes a sample, by the standard library."""
    whole = np.round(samples * (2 ** (8 * width - 1) - 1)).astype(np.int64)
    whole = whole + 128 if width == 1 else whole
    raw = whole.astype("<i8").reshape(-1, 1).view(np.uint8)[:, :width]
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(raw.tobytes())
    return path


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_width_is_read(tmp_path, width):
    """PCM of 8 to 32 bits comes out as what went in, to the width's precision."""
    sound = tone(440)
    rate, samples = read_wav(write_pcm(tmp_path / "a.wav", sound, width))
    assert rate == RATE
    assert samples.dtype == np.float32
    np.testing.assert_allclose(samples, sound, atol=1.5 / 2 ** (8 * width - 1) + 1e-7)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_floats_are_read(tmp_path, dtype):
    """A WAV of floats is taken as it is."""
    wavfile.write(tmp_path / "a.wav", RATE, tone(440).astype(dtype))
    np.testing.assert_allclose(read_wav(tmp_path / "a.wav")[1], tone(440), atol=1e-6)


def test_channels_are_averaged(tmp_path):
    """Two channels become their mean: a sound in one alone is half as loud."""
    both = np.stack([tone(440), np.zeros(3200)], 1)
    _, samples = read_wav(write_pcm(tmp_path / "a.wav", both.reshape(-1), 2, channels=2))
    np.testing.assert_allclose(samples, tone(440) / 2, atol=1e-4)


def test_other_chunks_do_no_harm(tmp_path):
    """Chunks that other programs put into a WAV beside the sound are passed over."""
    path = write_pcm(tmp_path / "a.wav", tone(440), 2)
    raw = path.read_bytes() + b"XtrA\x04\x00\x00\x00abcd"
    path.write_bytes(raw[:4] + (len(raw) - 8).to_bytes(4, "little") + raw[8:])
    assert len(read_wav(path)[1]) == 3200


def bad_wavs():
    """Bytes that are no whole WAV, by what is the matter."""
    return {
        "empty": lambda _: b"",
        "no WAV": lambda _: b"RIFX" * 50,
        "text": lambda _: b"hello there, this is not a sound at all",
        "header cut": lambda whole: whole[:30],
        "sound cut": lambda whole: whole[: len(whole) // 2],
        "last sample cut": lambda whole: whole[:-1],
        "no sound": lambda whole: whole[:44].replace(whole[40:44], bytes(4)),
    }


@pytest.mark.parametrize("case", bad_wavs())
def test_broken_wav_is_refused_in_one_line(tmp_path, case):
    """A file that is none, or cut short anywhere, is refused with its name; half a sound is not taken for a whole."""
    path = write_pcm(tmp_path / "a.wav", tone(440), 2)
    path.write_bytes(bad_wavs()[case](path.read_bytes()))
    with pytest.raises(DataError, match=r"is not a whole WAV file|holds no samples") as caught:
        read_wav(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_missing_wav_is_refused(tmp_path):
    """A file that is not there is refused the same way."""
    with pytest.raises(DataError, match=r"no\.wav: cannot be read: No such file"):
        read_wav(tmp_path / "no.wav")


def test_samples_that_are_not_finite_are_refused(tmp_path):
    """One NaN in a file of floats would go into every normalised frame."""
    wavfile.write(tmp_path / "a.wav", RATE, np.array([0, np.nan] * 500, dtype=np.float32))
    with pytest.raises(DataError, match="not finite"):
        read_wav(tmp_path / "a.wav")


@pytest.mark.parametrize("rate", [8_000, 22_050, 44_100, 48_000])
def test_resampled_tone_is_the_tone(rate):
    """A tone of another rate is, away from the ends, the tone of the rate that features are made of."""
    found = resample(tone(440, 0.5, rate=rate), rate)
    expected = tone(440, 0.5)
    assert abs(len(found) - len(expected)) <= 1
    np.testing.assert_allclose(found[800:-800], expected[800 : len(found) - 800], atol=0.01)


def test_mel_scale_at_known_places():
    """Slaney's scale: 15 mels at 1000 Hz, 42 at 6400 Hz, linear below, and the way back."""
    assert audio.mel(np.array([0.0, 200.0, 1000.0, 6400.0])).tolist() == pytest.approx([0, 3, 15, 42])
    frequencies = np.linspace(0, 8000, 99)
    np.testing.assert_allclose(audio.hertz(audio.mel(frequencies)), frequencies, atol=1e-9)


@given(frequency=st.floats(300, 7000))
def test_pure_tone_lights_its_band(frequency):
    """The loudest band is the one whose centre, equally spaced in mels, is nearest to the tone."""
    centres = np.linspace(0, float(audio.mel(np.array(8000.0))), BANDS + 2)[1:-1]
    found = int(log_mel(tone(frequency)).mean(0).argmax())
    # Below 1 kHz a band is about as wide as two bins of the spectrum, so the neighbour may win.
    assert abs(found - int(np.abs(centres - audio.mel(np.array(frequency))).argmin())) <= 1


@pytest.mark.parametrize("frequency", [500, 2000])
def test_ten_times_the_amplitude_is_twenty_decibels(frequency):
    """Ten times the amplitude adds ln 100 to every band that is not silent."""
    quiet, loud = log_mel(tone(frequency, loudness=0.05)), log_mel(tone(frequency, loudness=0.5))
    heard = quiet > math.log(audio.FLOOR) + 1
    assert int(heard.sum()) > 100
    torch.testing.assert_close((loud - quiet)[heard], torch.full_like(quiet[heard], TWENTY_DB), atol=1e-3, rtol=0)


def test_white_noise_is_as_loud_in_every_band():
    """Filters of equal area give white noise the same energy in high bands, which are wide, as in low ones."""
    noise = np.random.default_rng(0).normal(size=10 * RATE) * 0.1
    bands = log_mel(noise).double().exp().mean(0)
    # A narrow band has few bins, and not always the same share of them; the widest is 8 times as wide.
    assert float(bands[20:].max() / bands[20:].min()) < 1.4


def test_silence_is_the_floor():
    """Digital silence has a finite logarithm."""
    assert torch.equal(log_mel(np.zeros(1000)), torch.full((4, BANDS), math.log(audio.FLOOR)))


@given(samples=st.integers(0, 5 * WINDOW))
def test_frames_are_whole_windows(samples):
    """There are as many frames as whole windows of 25 ms fit every 10 ms."""
    expected = 0 if samples < WINDOW else 1 + (samples - WINDOW) // HOP
    assert log_mel(np.zeros(samples)).shape == (expected, BANDS)


def test_frames_are_at_their_time():
    """A tone that starts at 0.1 s is in the frames whose windows reach past 0.1 s and in no earlier one."""
    loud = log_mel(np.concatenate([np.zeros(1600), tone(1000)])).amax(1) > math.log(audio.FLOOR) + 1
    assert int(loud.nonzero()[0]) == 8  # The window from 0.08 to 0.105 s.


@given(frames=st.integers(1, 20), count=st.integers(1, 5))
def test_stacking_keeps_every_frame(frames, count):
    """Steps hold all frames in order; the last is filled up by its last frame."""
    values = torch.arange(frames * 2.0).view(frames, 2)
    found = stack(values, count)
    assert found.shape == (-(-frames // count), count * 2)
    assert torch.equal(found.view(-1, 2)[:frames], values)
    assert torch.equal(found.view(-1, 2)[frames:], values[-1:].expand(-frames % count, 2))
