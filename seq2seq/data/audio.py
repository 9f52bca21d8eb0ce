"""Sound to features: WAV files to samples, samples to log-mel frames, frames stacked to steps of a model."""

from __future__ import annotations

import functools
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import signal
from scipy.io import wavfile
from torch import Tensor

from seq2seq.data.text_file import bad_file

#: Samples a second that features are made of; other rates are resampled to it.
RATE = 16_000
#: Seconds of a window and between windows, and bands: usual in speech recognition (Chan et al. 2016 have 40 bands).
WINDOW_S, HOP_S, BANDS = 0.025, 0.010, 80
WINDOW, HOP = round(WINDOW_S * RATE), round(HOP_S * RATE)
#: Points of the Fourier transform: the power of two that holds a window.
POINTS = 512
#: Least energy of a band, so that silence has a logarithm: about that of 16-bit rounding.
FLOOR = 1e-6


def read_wav(path: Path) -> tuple[int, NDArray[np.float32]]:
    """Rate and samples of a WAV file, PCM of 8 to 32 bits or floats; channels are averaged.

    Returns:
        Samples a second, and (samples,) float32 from -1 to 1.

    Raises:
        DataError: for what is not a WAV, is cut short, holds no samples, or none that are finite.
    """
    try:
        with warnings.catch_warnings():
            # A file cut short is only warned of; chunks of other programs beside the sound do no harm.
            warnings.simplefilter("error", wavfile.WavFileWarning)
            warnings.filterwarnings("ignore", message="Chunk .non-data. not understood")
            rate, samples = wavfile.read(path)
    except OSError as error:
        raise bad_file(path, f"cannot be read: {error.strerror or error}; expected a WAV file") from error
    except (ValueError, EOFError, wavfile.WavFileWarning, ArithmeticError) as error:
        raise bad_file(path, f"is not a whole WAV file ({error or 'it ends early'}), expected PCM or floats") from error
    except Exception as error:
        # What scipy makes of a header that ends early differs from release to release.
        raise bad_file(path, f"is not a whole WAV file ({type(error).__name__}), expected PCM or floats") from error
    if not samples.size:
        raise bad_file(path, "holds no samples, expected at least one window of 25 ms")
    if samples.dtype == np.uint8:
        scaled = (samples.astype(np.float32) - 128) / 128
    elif np.issubdtype(samples.dtype, np.integer):
        # scipy gives 24 bits as the upper part of 32.
        scaled = samples.astype(np.float32) / -float(np.iinfo(samples.dtype).min)
    else:
        scaled = samples.astype(np.float32)
    if not np.isfinite(scaled).all():
        raise bad_file(path, "holds samples that are not finite, expected floats from -1 to 1")
    return int(rate), scaled if scaled.ndim == 1 else scaled.mean(1)


def resample(samples: NDArray[Any], rate: int) -> NDArray[np.float32]:
    """The sound at `RATE`, by scipy's polyphase filter.

    Args:
        samples: (samples,).
        rate: samples per second that they have.
    """
    if rate == RATE:
        return np.asarray(samples, dtype=np.float32)
    common = math.gcd(rate, RATE)
    return np.asarray(signal.resample_poly(samples, RATE // common, rate // common), dtype=np.float32)


def log_mel(samples: NDArray[Any]) -> Tensor:
    """Logarithm of the energy in mel bands, frame by frame.

    Args:
        samples: (samples,) at `RATE`.

    Returns:
        (frames, `BANDS`) float32, natural logarithm of energy: ten times the amplitude, 20 dB, adds ln 100. There are
        as many frames as whole windows fit, none for less than one.
    """
    if len(samples) < WINDOW:
        return torch.zeros(0, BANDS)
    frames = np.lib.stride_tricks.sliding_window_view(np.asarray(samples, dtype=np.float64), WINDOW)[::HOP]
    spectrum = np.fft.rfft(frames * signal.get_window("hann", WINDOW), POINTS)
    energy = (spectrum.real**2 + spectrum.imag**2) @ mel_filters().T
    return torch.from_numpy(np.log(np.maximum(energy, FLOOR)).astype(np.float32))


@functools.cache
def mel_filters() -> NDArray[np.float64]:
    """Triangles with equally spaced centres on the mel scale from 0 to half the rate, (`BANDS`, `POINTS` / 2 + 1).

    Each has an area of 2 (Slaney, "Auditory Toolbox", 1998), so that white noise has the same energy in every band.
    """
    edges = hertz(np.linspace(0.0, mel(np.array(RATE / 2)), BANDS + 2))
    bins = np.fft.rfftfreq(POINTS, 1 / RATE)
    rising = (bins - edges[:-2, None]) / np.diff(edges)[:-1, None]
    falling = (edges[2:, None] - bins) / np.diff(edges)[1:, None]
    triangles = np.maximum(0, np.minimum(rising, falling))
    return np.asarray(triangles * (2 / (edges[2:] - edges[:-2]))[:, None])


def mel(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mels of a frequency in hertz (Slaney 1998): linear up to 1000 Hz = 15 mels, then 27 mels for each factor 6.4."""
    frequency = np.asarray(frequency, dtype=np.float64)
    above = 15 + 27 * np.log(np.maximum(frequency, 1000) / 1000) / math.log(6.4)
    return np.where(frequency < 1000, frequency * 3 / 200, above)  # noqa: PLR2004 - hertz


def hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    """The frequency of mels, the way back from `mel`."""
    mels = np.asarray(mels, dtype=np.float64)
    return np.where(mels < 15, mels * 200 / 3, 1000 * 6.4 ** ((mels - 15) / 27))  # noqa: PLR2004 - mels


def stack(frames: Tensor, count: int) -> Tensor:
    """Every `count` frames as one step, the last filled up by its own last frame.

    Args:
        frames: (frames, features), at least one.
        count: frames in a step.

    Returns:
        (ceil(frames / count), count * features).
    """
    missing = -len(frames) % count
    return torch.cat([frames, frames[-1:].expand(missing, -1)]).reshape(-1, count * frames.size(1))
