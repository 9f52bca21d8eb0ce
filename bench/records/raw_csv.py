"""Raw values of a run as CSV that grows: every append is one more gzip member, and all readers see one file.

A process that is killed while it appends leaves a torn last member. `RawFile.mend` takes that off again, and with it
every row that belongs to no record.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import UsageError
from bench.records import durable
from bench.records.schema import ENERGY_COLUMNS, ROUND_COLUMNS, SAMPLE_COLUMNS
from bench.units import counted
from kernels.host.output import utf8

#: Cells of a row, or of a record, by which they belong together.
RowKey = tuple[str, ...]


@dataclass(frozen=True)
class RawFile:
    """One kind of raw values.

    Attributes:
        name: of the file in a run folder.
        columns: its header.
        key: columns that say which record a row belongs to; a record has columns of the same names.
    """

    name: str
    columns: tuple[str, ...]
    key: tuple[str, ...]

    def key_of(self, values: Mapping[str, Any]) -> RowKey:
        """Key that a record and its rows share."""
        return tuple(str(values[name]) for name in self.key)

    def append(self, folder: Path, rows: Iterable[Sequence[Any]]) -> None:
        """Append rows as one member, on the disk when this returns.

        Raises:
            OSError: when they cannot be written; the file is unchanged.
        """
        path = folder / self.name
        head = [] if path.exists() and path.stat().st_size else [self.columns]
        durable.append(path, _member([*head, *rows]))

    def rows(self, folder: Path) -> Iterator[list[str]]:
        """The rows without the header; none without the file.

        What a killed run left torn at the end belongs to no record and is left out, as `--resume` takes it out.

        Raises:
            UsageError: for other columns than ours, or damage that no torn append explains.
        """
        path = folder / self.name
        whole_bytes = 0
        try:
            for rows, size in self._members(path):
                whole_bytes += size
                yield from rows
            left = path.read_bytes()[whole_bytes:] if path.exists() else b""
        except OSError as error:
            msg = f"{path} cannot be read ({error}); put back the file that the run wrote"
            raise UsageError(msg) from error
        if not _torn(left):
            msg = f"{path} is damaged from byte {whole_bytes} on; put back the file that the run wrote"
            raise UsageError(msg)

    def lacks(self, folder: Path, wanted: Iterable[RowKey]) -> set[RowKey]:
        """Return the wanted keys that have no complete row.

        Raises:
            UsageError: when the file has other columns than ours.
        """
        left = set(wanted)
        for rows, _ in self._members(folder / self.name):
            left -= {self._key_of_row(row) for row in rows}
        return left

    def mend(self, folder: Path, belongs: Callable[[RowKey], bool]) -> int:
        """Keep whole rows that belong to a record, in one step; a file that is sound is not touched.

        Returns:
            Rows that were taken out; those of a torn member cannot be counted and are not.

        Raises:
            UsageError: when the file has other columns than ours.
            OSError: when it cannot be written; it is unchanged.
        """
        path = folder / self.name
        if not path.exists():
            return 0
        kept, dropped, whole_bytes = [_member([self.columns])], 0, 0
        for rows, size in self._members(path):
            whole_bytes += size
            mine = [row for row in rows if belongs(self._key_of_row(row))]
            dropped += len(rows) - len(mine)
            if mine:
                kept.append(_member(mine))
        if dropped or not whole_bytes or whole_bytes != path.stat().st_size:
            durable.replace(path, b"".join(kept))
        return dropped

    def _key_of_row(self, row: list[str]) -> RowKey:
        return self.key_of(dict(zip(self.columns, row, strict=True)))

    def _members(self, path: Path) -> Iterator[tuple[list[list[str]], int]]:
        """The rows of each whole member, without the header, and its compressed size."""
        if not path.exists():
            return
        last = 1
        for number, (content, size) in enumerate(_pieces(path.read_bytes())):
            try:
                rows = list(csv.reader(io.StringIO(content.decode())))
            except (UnicodeDecodeError, csv.Error) as error:
                msg = f"{path} cannot be read ({error}); put back the file that the run wrote"
                raise UsageError(msg) from error
            if number == 0 and (not rows or tuple(rows.pop(0)) != self.columns):
                msg = f"{path} has other columns than this release writes; use the release that began the run"
                raise UsageError(msg)
            for line, row in enumerate(rows, start=last + 1):
                if len(row) != len(self.columns):
                    wrong = f"line {line} has {counted(len(row), 'cell')}, expected {len(self.columns)}"
                    msg = f"{path}, {wrong}; put back the file that the run wrote"
                    raise UsageError(msg)
            last += len(rows)
            yield rows, size


SAMPLES = RawFile("samples.csv.gz", tuple(SAMPLE_COLUMNS), ("workload", "variant", "mode", "device", "threads"))
ROUNDS = RawFile("rounds.csv.gz", tuple(ROUND_COLUMNS), ("group",))
#: The raw files that every run folder has.
RAW_FILES = (SAMPLES, ROUNDS)
#: The raw file of runs whose machine has a counter of energy.
ENERGY = RawFile("energy.csv.gz", tuple(ENERGY_COLUMNS), SAMPLES.key)


def _member(rows: Iterable[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return gzip.compress(utf8(text.getvalue()), compresslevel=6)


def _torn(data: bytes) -> bool:
    """Return whether data is the beginning of a gzip member that was not written to its end, or nothing."""
    decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        decoder.decompress(data)
    except zlib.error:
        # Some systems lengthen a file before they fill it.
        return not data.strip(b"\0")
    return not decoder.eof


def _pieces(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Content and compressed size of each whole gzip member; ends before the first that is torn."""
    place = 0
    while place < len(data):
        decoder = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            content = decoder.decompress(data[place:])
        except zlib.error:
            return
        if not decoder.eof:
            return
        size = len(data) - place - len(decoder.unused_data)
        yield content, size
        place += size
