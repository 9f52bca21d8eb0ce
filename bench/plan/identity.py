"""Identity of cases and groups within a run: the one key by which plan, records, samples and reports are joined.

Both keys are tuples, so they sort, hash and unpack as such.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

#: In a key by which cases are joined whatever their threads.
ANY_THREADS = 0


class GroupKey(NamedTuple):
    """Workload, mode, device and threads: what the cases of a group share."""

    workload: str
    mode: str
    device: str
    threads: int

    def __str__(self) -> str:
        """Name of the group, as in records and on the terminal."""
        return f"{self.workload}/{self.mode}/{self.device}/{self.threads}t"

    def of(self, variant: str) -> CaseKey:
        """Return the key of one of the group's cases."""
        return CaseKey(*self, variant)


class CaseKey(NamedTuple):
    """A group's key and a variant, with its label if it has one."""

    workload: str
    mode: str
    device: str
    threads: int
    variant: str

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> CaseKey:
        """Key of the case that a row of a file is about.

        Args:
            values: columns by name; others than those of the key do not count.

        Raises:
            KeyError, TypeError, ValueError: a column of the key is missing, or the threads are not a number.
        """
        names = ("workload", "mode", "device", "variant")
        workload, mode, device, variant = (str(values[name]) for name in names)
        return cls(workload, mode, device, int(values["threads"]), variant)

    def __str__(self) -> str:
        """Group and variant, for messages."""
        return f"{self.group} {self.variant}"

    @property
    def group(self) -> GroupKey:
        """Key of the group that the case belongs to."""
        return GroupKey(*self[:-1])

    @property
    def at_any_threads(self) -> CaseKey:
        """The key with `ANY_THREADS`, by which runs with other numbers of threads are joined."""
        return self._replace(threads=ANY_THREADS)
