"""A user's speech: a folder of WAV files and their transcripts, each of which must have the other."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from seq2seq.data.audio import WINDOW_S, log_mel, read_wav, resample
from seq2seq.data.text_file import ENCODING, bad_file, composed, read_text

#: Files with one line per recording, file<TAB>text, by which a folder is looked through.
TRANSCRIPTS = ("transcripts.txt", "transcripts.tsv")


@dataclass(frozen=True)
class Recording:
    """A sound file and what is said in it, on one line and in lower case."""

    path: Path
    text: str


def read_corpus(folder: Path, encoding: str = ENCODING) -> list[Recording]:
    """The recordings of a folder, in the order of their names.

    Transcripts are in `transcripts.txt` or `transcripts.tsv`, a line file<TAB>text each, or beside each WAV in a text
    file of the same name.

    Args:
        folder: with WAV files, also in folders within.
        encoding: of the transcripts.

    Raises:
        DataError: for a folder without WAV files, a transcript without a WAV, a WAV without a transcript, or a line
            that is not a file and text.
    """
    if not folder.is_dir():
        raise bad_file(folder, "not a folder, expected one with WAV files and transcripts")
    sounds = sorted(path for path in folder.rglob("*") if path.suffix.lower() == ".wav" and path.is_file())
    if not sounds:
        raise bad_file(folder, "holds no WAV files, expected WAV files and transcripts")
    for name in TRANSCRIPTS:
        if (folder / name).exists():
            return _from_table(folder / name, sounds, encoding)
    texts = {_same(path.with_suffix("")): path for path in sorted(folder.rglob("*.txt"))}
    stems = [_same(sound.with_suffix("")) for sound in sounds]
    for stem, path in texts.items():
        if stem not in stems:
            raise bad_file(path, f"has no WAV file, expected {path.stem}.wav beside it")
    return [_beside(sound, texts.get(stem), encoding) for sound, stem in zip(sounds, stems, strict=True)]


def read_frames(path: Path) -> Tensor:
    """Log-mel frames of a WAV file, (frames, bands); other rates are resampled.

    Raises:
        DataError: for a file that is not a whole WAV, or shorter than one window.
    """
    rate, samples = read_wav(path)
    frames = log_mel(resample(samples, rate))
    if not len(frames):
        raise bad_file(path, f"lasts {len(samples) / rate:.3f} s, expected at least one window of {WINDOW_S} s")
    return frames


def tidy(text: str) -> str:
    """A transcript on one line, in lower case, with single spaces; composed (NFC)."""
    return " ".join(composed(text.lower()).split())


def _from_table(table: Path, sounds: list[Path], encoding: str) -> list[Recording]:
    # People leave the ending out.
    known = {_same(path.with_suffix("")): path for path in sounds} | {_same(path): path for path in sounds}
    texts: dict[Path, str] = {}
    for row, line in enumerate(read_text(table, encoding).split("\n"), 1):
        if not line.strip():
            continue
        columns = line.split("\t")
        if len(columns) != 2:  # noqa: PLR2004 - file and text
            counted = f"has {len(columns)} column{'s' * (len(columns) != 1)}"
            raise bad_file(table, f"{counted}, expected file<TAB>text", row)
        name, text = columns[0].strip(), tidy(columns[1])
        found = known.get(_same(table.parent / name.replace("\\", "/")))
        if found is None:
            raise bad_file(table, f"there is no WAV file {name!r} in {table.parent}, expected one for each row", row)
        if found in texts:
            raise bad_file(table, f"{name!r} has a transcript already, expected one for each WAV file", row)
        if not text:
            raise bad_file(table, f"the transcript of {name!r} is empty, expected what is said in it", row)
        texts[found] = text
    for sound in sounds:
        if sound not in texts:
            raise bad_file(sound, f"has no transcript, expected a row in {table.name}")
    return [Recording(sound, texts[sound]) for sound in sounds]


def _beside(sound: Path, path: Path | None, encoding: str) -> Recording:
    if path is None:
        expected = f"expected {sound.stem}.txt beside it, or a row in {' or '.join(TRANSCRIPTS)}"
        raise bad_file(sound, f"has no transcript, {expected}")
    return Recording(sound, tidy(read_text(path, encoding)))


def _same(path: Path) -> str:
    """A path as it is compared: some systems take the letters of a name apart, so that accents follow them."""
    return composed(str(path))
