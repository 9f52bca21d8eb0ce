"""An LSTM exported as C: right without Python, no allocation after its creation, clear about what it refuses."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("hypothesis")

import torch
from cpu_builds import BYTE_INPUTS
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kernels.cpu.serve import export
from kernels.cpu.serve.export import ServeExportError, export_c
from kernels.tools.export_c import main

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(not (shutil.which("make") and shutil.which("g++")), reason="needs make and g++")

ALLOWED = {"fp32": 2e-6, "bf16": 1e-2, "int8": 3e-2}
if BYTE_INPUTS:
    ALLOWED["w8a8"] = 4e-2


class Handle:
    """The C interface by ctypes."""

    def __init__(self, library: Any, weights: Path, batch: int) -> None:
        self.library, self.batch = library, batch
        message = ctypes.create_string_buffer(256)
        self.at = library.seq2seq_lstm_create(str(weights).encode(), batch, message, len(message))
        self.message = message.value.decode()
        if self.at:
            self.output = library.seq2seq_lstm_output_size(self.at)

    def step(self, x: Tensor) -> Tensor:
        """(batch, features) to (batch, outputs), into memory of NaN."""
        x, y = x.contiguous(), torch.full((self.batch, self.output), torch.nan)
        self.library.seq2seq_lstm_step(self.at, x.data_ptr(), y.data_ptr())
        return y

    def run(self, x: Tensor) -> Tensor:
        """(batch, steps, features) to (batch, steps, outputs); as `step`."""
        x, y = x.contiguous(), torch.full((self.batch, x.size(1), self.output), torch.nan)
        self.library.seq2seq_lstm_run(self.at, x.size(1), x.data_ptr(), y.data_ptr())
        return y

    def reset(self) -> None:
        """Zero the state."""
        self.library.seq2seq_lstm_reset(self.at)

    def close(self) -> None:
        """Free it."""
        self.library.seq2seq_lstm_destroy(self.at)


def _make(folder: Path, *more: str) -> None:
    subprocess.run(["make", "-s", "-C", folder, *more], check=True, capture_output=True)  # noqa: S607 - the user's


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the library and the example, built once: the weights are in a file of their own."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("c") / "out"
    export_c(nn.LSTM(3, 20, 2).state_dict(), folder)
    # Parts so short that a run has several, whatever the sizes.
    source = folder / "seq2seq_lstm.cpp"
    text = source.read_text(encoding="utf-8")
    assert "PROJECTED_AT_ONCE = 1 << 16" in text
    source.write_text(text.replace("PROJECTED_AT_ONCE = 1 << 16", "PROJECTED_AT_ONCE = 1 << 10"), encoding="utf-8")
    _make(folder, "MORE=-O1")
    return folder


@pytest.fixture(scope="module")
def library(built: Path) -> ctypes.CDLL:
    """The library, its functions declared."""
    found = ctypes.CDLL(str(built / "libseq2seq_lstm.so"))
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    for name, returns, takes in (
        ("create", pointer, [ctypes.c_char_p, number, ctypes.c_char_p, ctypes.c_size_t]),
        ("input_size", number, [pointer]),
        ("output_size", number, [pointer]),
        ("instructions", ctypes.c_char_p, [pointer]),
        ("reset", None, [pointer]),
        ("step", None, [pointer] * 3),
        ("run", None, [pointer, number, pointer, pointer]),
        ("destroy", None, [pointer]),
    ):
        function = getattr(found, f"seq2seq_lstm_{name}")
        function.restype, function.argtypes = returns, takes
    return found


class _Model(nn.Module):
    """An LSTM with or without a head."""

    def __init__(self, features: int, hidden: int, layers: int, outputs: int, *, bias: bool) -> None:
        super().__init__()
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, bias=bias)
        self.head = nn.Linear(hidden, outputs, bias=bias) if outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(self.lstm(x)[0])
        return found


STREAMS = {
    "features": st.integers(1, 40), "hidden": st.sampled_from([1, 5, 16, 17, 33, 70]), "layers": st.integers(1, 3),
    "outputs": st.sampled_from([0, 1, 16, 67]), "batch": st.integers(1, 8), "steps": st.integers(1, 30),
    "bias": st.booleans(),
}  # fmt: skip


def check_streams(library: Any, folder: Path, precision: str, sizes: dict[str, int]) -> None:
    """A stream step by step, a run of all steps, and a run that goes on after steps give what torch gives.

    Args:
        library: its functions.
        folder: one that does not exist yet.
        precision: key of `ALLOWED`.
        sizes: drawn from `STREAMS`.
    """
    features, hidden, outputs, batch, steps = (sizes[n] for n in ("features", "hidden", "outputs", "batch", "steps"))
    torch.manual_seed(features * hidden)
    model = _Model(features, hidden, sizes["layers"], outputs, bias=bool(sizes["bias"])).eval()
    export_c(model.state_dict(), folder, prefix="lstm.", head="head" if outputs else None, precision=precision)
    x = torch.randn(batch, steps, features)
    with torch.no_grad():
        for name, weight in model.lstm.named_parameters():
            if precision == "bf16" and name.startswith("weight"):
                weight.copy_(weight.bfloat16())  # so that what is allowed is the kernel's alone
        expected = model.double()(x.double())
    handle = Handle(library, folder / "weights.bin", batch)
    assert handle.at, handle.message
    cut = steps // 2
    found = [torch.stack([handle.step(x[:, t]) for t in range(steps)], 1)]
    handle.reset()
    found.append(handle.run(x))
    handle.reset()
    found.append(torch.cat([*(handle.step(x[:, t])[:, None] for t in range(cut)), handle.run(x[:, cut:])], 1))
    handle.close()
    for value in found:
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=ALLOWED[precision] * (1 + bool(outputs)))


@pytest.mark.parametrize("precision", ALLOWED)
@given(sizes=st.fixed_dictionaries(STREAMS))
def test_steps_and_runs_are_torch_s(
    library: ctypes.CDLL, tmp_path_factory: pytest.TempPathFactory, precision: str, sizes: dict[str, int]
) -> None:
    """In every precision, with and without a head, over odd sizes and several streams."""
    check_streams(library, tmp_path_factory.mktemp("weights") / "out", precision, sizes)


#: Counts calls of malloc and its kin by any library of the process, and ends with 1 if steps or runs made one.
_COUNTING = """
#include "seq2seq_lstm.h"
#include <errno.h>
#include <stdio.h>
#include <stddef.h>
extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);
extern void* __libc_memalign(size_t, size_t);
static long calls;
void* malloc(size_t n) { ++calls; return __libc_malloc(n); }
void* calloc(size_t n, size_t m) { ++calls; return __libc_calloc(n, m); }
void* realloc(void* p, size_t n) { ++calls; return __libc_realloc(p, n); }
void* aligned_alloc(size_t a, size_t n) { ++calls; return __libc_memalign(a, n); }
void* memalign(size_t a, size_t n) { ++calls; return __libc_memalign(a, n); }
int posix_memalign(void** p, size_t a, size_t n) { ++calls; *p = __libc_memalign(a, n); return *p ? 0 : ENOMEM; }
static float x[60 * 3], y[60 * 20];
int main(int count, char** arguments) {
    char message[256];
    const long before = calls;
    seq2seq_lstm* lstm = seq2seq_lstm_create(arguments[1], 1, message, sizeof message);
    if (!lstm || calls == before) return 2;
    const long created = calls;
    for (int i = 0; i < 100; ++i) seq2seq_lstm_step(lstm, x, y);
    seq2seq_lstm_run(lstm, 60, x, y);
    seq2seq_lstm_reset(lstm);
    if (calls != created) return 1;
    seq2seq_lstm_destroy(lstm);
    return count == 2 ? 0 : 3;
}
"""


@pytest.mark.parametrize("precision", ALLOWED)
def test_nothing_is_allocated_after_creation(built: Path, tmp_path: Path, precision: str) -> None:
    """100 steps, a run in parts and a reset call no allocator, whichever library of the process would."""
    export_c(nn.LSTM(3, 20, 2).state_dict(), tmp_path / "out", precision=precision)
    source, program = tmp_path / "counting.c", tmp_path / "counting"
    source.write_text(_COUNTING, encoding="utf-8")
    link = [f"-I{built}", f"-L{built}", "-lseq2seq_lstm", f"-Wl,-rpath,{built}"]
    subprocess.run(["gcc", "-fno-builtin", source, "-o", program, *link], check=True)  # noqa: S607 - the user's
    assert subprocess.run([program, tmp_path / "out" / "weights.bin"], check=False).returncode == 0


@pytest.mark.parametrize("compiler", [["gcc", "-std=c99"], ["g++", "-std=c++17"]], ids=["C", "C++"])
def test_the_example_program_streams(built: Path, tmp_path: Path, compiler: list[str]) -> None:
    """As C and as C++ the example prints what torch gives for the numbers that it reads, and says what ran."""
    strict = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    link = [f"-L{built}", "-lseq2seq_lstm", f"-Wl,-rpath,{built}"]
    program = tmp_path / "example"
    subprocess.run([*compiler, *strict, built / "example.c", "-o", program, *link], check=True)
    torch.manual_seed(0)
    truth, x = nn.LSTM(3, 20, 2), torch.randn(7, 3)
    text = " ".join(f"{value:.9g}" for value in x.flatten().tolist())
    done = subprocess.run([program, built / "weights.bin"], input=text, capture_output=True, text=True, check=True)
    found = torch.tensor([[float(word) for word in line.split()] for line in done.stdout.splitlines()])
    with torch.no_grad():
        torch.testing.assert_close(found, truth(x)[0], rtol=1e-5, atol=1e-6)
    assert done.stderr.startswith("7 steps by ")
    missing = subprocess.run([program, "nowhere"], capture_output=True, text=True, check=False)
    assert (missing.returncode, missing.stderr) == (2, "error: nowhere: it cannot be opened\n")


def test_the_python_example_needs_no_torch(built: Path) -> None:
    """By ctypes in a Python that cannot import torch, a step of zeros gives as many numbers as hidden units."""
    done = subprocess.run([sys.executable, "-S", built / "example.py"], capture_output=True, text=True, check=True)
    assert len(done.stdout.split()) == 20


@pytest.mark.slow
def test_the_sanitizer_finds_nothing(built: Path, tmp_path: Path) -> None:
    """Steps of odd sizes stay inside their memory in every precision."""
    program = tmp_path / "example"
    flags = ["-Og", "-g1", "-march=native", "-ffp-contract=fast", "-DPLAIN_THREADS", "-pthread"]
    sanitized = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    subprocess.run(["gcc", "-c", *sanitized, built / "example.c", "-o", tmp_path / "example.o"], check=True)  # noqa: S607
    subprocess.run(
        ["g++", "-std=c++17", *flags, *sanitized, built / "seq2seq_lstm.cpp", tmp_path / "example.o", "-o", program],  # noqa: S607
        check=True,
    )
    # Few units and, in fp32, enough for sums.
    for precision, hidden in itertools.product(ALLOWED, (21, 70)):
        model = _Model(7, hidden, 2, 5, bias=True)
        folder = tmp_path / f"{precision}-{hidden}"
        export_c(model.state_dict(), folder, prefix="lstm.", head="head", precision=precision)
        done = subprocess.run(
            [program, folder / "weights.bin"], input="0.5 " * 70, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr[-800:]
        assert len(done.stdout.splitlines()) == 10


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda content: content[:-1], "it ends before its last weight: export it again"),
        (lambda content: content + b"\0", "it goes on after its last weight: export it again"),
        (lambda content: b"S" + content, "it is no weights.bin of an exported LSTM"),
        (lambda content: content[:8] + b"\xff" * 8 + content[16:], "its sizes are damaged: export it again"),
        (lambda content: content[:20], "it is no weights.bin of an exported LSTM"),
    ],
    ids=["cut", "longer", "other", "sizes", "header"],
)
def test_a_damaged_file_is_refused(
    library: ctypes.CDLL, built: Path, tmp_path: Path, damage: object, said: str
) -> None:
    """No handle comes of it, and the message says why."""
    path = tmp_path / "weights.bin"
    path.write_bytes(damage((built / "weights.bin").read_bytes()))  # type: ignore[operator]
    handle = Handle(library, path, 1)
    assert (handle.at, handle.message) == (None, f"{path}: {said}")
    assert Handle(library, built / "weights.bin", 0).message.endswith("batch is 0, expected at least 1")


@pytest.mark.parametrize(
    ("module", "options", "said"),
    [
        (nn.LSTM(3, 4), {"precision": "split"}, "precision is 'split', expected one of fp32, bf16, int8, w8a8"),
        (nn.LSTM(3, 4, bidirectional=True), {}, "a bidirectional LSTM needs the later steps"),
        (nn.LSTM(3, 4, proj_size=2), {}, r"projections \(proj_size\) cannot be exported"),
        (nn.LSTM(3, 4), {"prefix": "lstm."}, "no LSTM with the prefix 'lstm.'; LSTMs there have the prefixes ''"),
        (nn.Linear(3, 4), {}, "no LSTM with the prefix ''"),
        (nn.LSTM(3, 4), {"head": "head"}, r"head.weight is not there, .* \(outputs, 4\) .*; no layer has such"),
        (_Model(3, 4, 1, 2, bias=True), {"prefix": "lstm.", "head": "had"}, "had.weight is .* such weights: head"),
    ],
    ids=["precision", "bidirectional", "projections", "prefix", "none", "head", "no head"],
)
def test_what_cannot_be_exported_is_refused(
    module: nn.Module, options: dict[str, str], said: str, tmp_path: Path
) -> None:
    """It says what was wrong, and leaves nothing behind."""
    with pytest.raises(ServeExportError, match=said):
        export_c(module.state_dict(), tmp_path / "out", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_the_command_exports_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file of torch.save becomes a folder; a second time, or of something else, it is one line and 2."""
    path, out = tmp_path / "weights.pt", tmp_path / "my lstm"
    torch.save(_Model(3, 4, 1, 2, bias=True).state_dict(), path)
    options = [str(path), "--out", str(out), "--prefix", "lstm.", "--head", "head", "--precision", "int8"]
    assert main(options) == 0
    assert capsys.readouterr().out == f"wrote {out}; build it where it will run: make -C '{out}'\n"
    before = sorted(out.iterdir())
    assert main(options) == 2
    assert capsys.readouterr().err == f"error: {out} exists and is not an empty folder; name another\n"
    assert sorted(out.iterdir()) == before
    path.write_text("no tensors", encoding="utf-8")
    assert main([str(path), "--out", str(tmp_path / "other")]) == 2
    said = "cannot be read as a file of torch.save; give a state_dict that torch.save or safetensors wrote"
    assert capsys.readouterr().err == f"error: {path} {said}\n"
    torch.save(nn.LSTM(3, 4), path)
    assert main([str(path), "--out", str(tmp_path / "other")]) == 2
    said = f"error: {path} holds more than tensors, and that may run code when it is loaded; save model.state_dict()\n"
    assert capsys.readouterr().err == said
    torch.save(nn.LSTM(3, 4).state_dict(), path)
    (tmp_path / "file").touch()
    assert main([str(path), "--out", str(tmp_path / "file" / "out")]) == 2
    said = f"error: {tmp_path / 'file' / 'out'} cannot be written: Not a directory; name another folder with --out\n"
    assert capsys.readouterr().err == said
    assert main([str(tmp_path / "none.pt"), "--out", str(tmp_path / "other")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.pt'} is not a file; give the weights")


def test_every_header_is_exported() -> None:
    """What the library includes is what a folder gets: nothing of the checkout is needed."""
    folder = export.HERE.parent
    wanted, seen = ["walk", "weights"], set()
    while wanted:
        name = wanted.pop()
        if name not in seen:
            seen.add(name)
            lines = (folder / f"{name}.h").read_text(encoding="utf-8").splitlines()
            wanted += [line.split('"')[1].removesuffix(".h") for line in lines if line.startswith('#include "')]
    assert seen == set(export.HEADERS)


def test_weights_without_values_are_refused(tmp_path: Path) -> None:
    """And nothing is written, so that the next try finds no half of a folder."""
    with pytest.raises(ServeExportError, match="no values"):
        export_c(nn.LSTM(3, 4, device="meta").state_dict(), tmp_path / "out")
    assert not (tmp_path / "out").exists()
