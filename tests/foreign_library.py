"""A library for another processor, its functions called from here: a process of QEMU's runs them on memory of this one.

Both processes map one file at one address. Tensors that are made while `SharedMemory` is entered come to lie there, so
the project's own Python code calls such a library as it calls that of this machine, and hands over the same addresses.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import struct
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from kernels.cpu import build, inference

#: Where both processes have the memory: far from what either has by itself.
ADDRESS, SIZE = 1 << 45, 1 << 26
_FIXED_NOREPLACE = 0x100000

#: Calls functions that lines of standard input name, with up to six integers or addresses: `i` returns one, `t` a text.
CALLER = f"""
#include <cstdint>
#include <cstdio>
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
int main(int, char** given) {{
    void* const library = dlopen(given[1], RTLD_NOW);
    if (!library) return std::fprintf(stderr, "%s\\n", dlerror()), 1;
    void* const wanted = reinterpret_cast<void*>({ADDRESS});
    const int file = open(given[2], O_RDWR);
    if (mmap(wanted, {SIZE}, PROT_READ | PROT_WRITE, MAP_SHARED | {_FIXED_NOREPLACE}, file, 0) != wanted)
        return std::fprintf(stderr, "the memory is not to be had\\n"), 1;
    using Function = int64_t (*)(int64_t, int64_t, int64_t, int64_t, int64_t, int64_t);
    char returns, name[64];
    while (std::scanf(" %c %63s", &returns, name) == 2) {{
        long long a[6];
        for (long long& number : a)
            if (std::scanf("%lld", &number) != 1) return 1;
        const auto function = reinterpret_cast<Function>(dlsym(library, name));
        if (!function) return std::fprintf(stderr, "no function %s\\n", name), 1;
        const int64_t found = function(a[0], a[1], a[2], a[3], a[4], a[5]);
        if (returns == 't') std::printf("%s\\n", reinterpret_cast<const char*>(found));
        else std::printf("%lld\\n", static_cast<long long>(found));
        std::fflush(stdout);
    }}
}}
"""


class SharedMemory(TorchDispatchMode):
    """Memory in which all tensors come to lie that are made while this is entered; empty again at each entry."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file, self._used = file, 0
        system = ctypes.CDLL(None, use_errno=True)
        number, pointer = ctypes.c_long, ctypes.c_void_p
        system.mmap.restype, system.mmap.argtypes = pointer, [pointer, *[number] * 5]
        system.munmap.argtypes = [pointer, number]
        self._unmap = functools.partial(system.munmap, ADDRESS, SIZE)
        with file.open("w+b") as opened:
            opened.truncate(SIZE)
            flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _FIXED_NOREPLACE
            assert system.mmap(ADDRESS, SIZE, *flags, opened.fileno(), 0) == ADDRESS

    def close(self) -> None:
        """Give the memory back; tensors in it are gone."""
        self._unmap()

    def __enter__(self) -> Self:
        self._used = 0
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and move what it made."""
        del types
        return tree_map_only(Tensor, self._inside, func(*args, **(kwargs or {})))

    def _inside(self, value: Tensor) -> Tensor:
        size = value.untyped_storage().nbytes()
        if not value.numel() or ADDRESS <= value.data_ptr() < ADDRESS + SIZE:
            return value
        memory = (ctypes.c_char * size).from_address(self._place(size))
        own = torch.frombuffer(memory, dtype=value.dtype)
        return own.as_strided(value.size(), value.stride()).copy_(value)

    def put(self, content: bytes) -> int:
        """Address of a copy of bytes."""
        at = self._place(len(content))
        ctypes.memmove(at, content, len(content))
        return at

    def _place(self, count: int) -> int:
        at = ADDRESS + self._used
        self._used += (count + 127) // 64 * 64
        assert self._used <= SIZE, "the memory is too small for the test"
        return at


class ForeignLibrary:
    """Functions of a library, called as `ctypes` calls those of this machine; a failure of the kernel's is raised.

    Args:
        command: what runs a program for that processor.
        caller: `CALLER`, compiled for it.
        library: the library.
        memory: where the tensors are.
    """

    _TEXTS = ("failure", "instructions", "hindrance")

    def __init__(self, command: Sequence[str], caller: Path, library: Path, memory: SharedMemory) -> None:
        self._memory = memory
        self._process = subprocess.Popen(
            [*command, caller, library, memory.file], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("_"):
            raise AttributeError(name)
        return functools.partial(self._call, name)

    def _call(self, name: str, *arguments: Any) -> Any:
        if name == "lstm_layers":
            arguments = (self._moved(*arguments),)
        text = name.endswith(self._TEXTS)
        numbers = [*(self._number(value) for value in arguments), *[0] * 6][:6]
        to, back = self._process.stdin, self._process.stdout
        assert to is not None
        assert back is not None
        to.write(" ".join(map(str, ["t" if text else "i", name, *numbers])) + "\n")
        to.flush()
        answer = back.readline()
        assert answer, f"{name} ended the process with {self._process.wait()}"
        if text:
            return answer.rstrip("\n").encode()
        return build.checked(self, int(answer)) if name.startswith(("lstm_", "pack_")) else int(answer)  # type: ignore[arg-type]

    def _number(self, value: Any) -> int:
        if isinstance(value, ctypes.Array):
            value = value.raw
        return self._memory.put(value + b"\0") if isinstance(value, bytes) else int(value or 0)

    def _moved(self, call: bytes) -> bytes:
        """`LayersCall` on a copy of what it points to, which is this process's own."""
        layers = inference.Layers.from_buffer_copy(inference.Layers.from_address(struct.unpack_from("@q", call)[0]))
        count = layers.layers * layers.directions
        sources, weights = 2 * count * ctypes.sizeof(inference.Source), count * ctypes.sizeof(inference.Direction)
        layers.sources = self._memory.put(ctypes.string_at(layers.sources, sources))
        layers.weights = self._memory.put(ctypes.string_at(layers.weights, weights))
        return struct.pack("@q", self._memory.put(bytes(layers))) + call[8:]
