"""Tell whether torch's own LSTM ran cuDNN's persistent kernels, as far as the kernels of a profile show.

The names are cuDNN's own affair, so launches are counted too: a kernel for all steps is launched once a call, the
others once a step or more often.
"""

from __future__ import annotations

from collections.abc import Mapping

#: Beginnings of the names of copies and fills of memory, and what the names of torch's own kernels contain. They run
#: around the LSTM, as often as the model around it wants.
_MEMORY, _TORCHS_OWN = ("Memcpy", "Memset"), "at::native"


def named_persistent(launches: Mapping[str, int]) -> bool:
    """Return whether the name of a kernel says that it is persistent."""
    return any("persist" in name.lower() for name in launches)


def without_torchs_own(launches: Mapping[str, int]) -> dict[str, int]:
    """Return the kernels that can be the LSTM's, in their order, with their launches."""
    return {name: count for name, count in launches.items() if not name.startswith(_MEMORY) and _TORCHS_OWN not in name}


def once_a_step(launches: Mapping[str, int], steps: int) -> bool:
    """Return whether a kernel that can be the LSTM's ran once a step; also where there is none, which shows nothing.

    Args:
        launches: of each kernel, by name.
        steps: of all calls together.
    """
    return max(without_torchs_own(launches).values(), default=steps) >= steps
