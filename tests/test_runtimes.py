"""Other runtimes: right, never with old weights, with torch's number of threads; what ran they tell themselves."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import types
from pathlib import Path

import psutil
import pytest
import torch

from bench.gate.audit import Audit
from bench.gate.parity import Gate, limit_for, relative_error
from bench.worker import evidence
from bench.worker.gating import gated
from kernels.host.output import replacing
from seq2seq.execution.executable import Executable
from seq2seq.execution.variant import Variant
from seq2seq.execution.variants import REFERENCE, VARIANTS
from seq2seq.models.cost import Extent, cost
from seq2seq.models.weights import initial_weights
from seq2seq.runtimes import export, openvino
from seq2seq.runtimes import onnxruntime as ort
from seq2seq.runtimes.int8 import RoundedLSTM, rounded_weights
from seq2seq.runtimes.onnxruntime import OnnxRuntime
from seq2seq.runtimes.runtime import ARGUMENTS, Runtime
from seq2seq.workloads.registry import WORKLOADS, find_workload

CONVERTED = [name for name, variant in VARIANTS.items() if variant.runtime is not None]
EACH = pytest.mark.parametrize("name", CONVERTED)
#: Values, tokens and frames; the last two with sequences of different lengths.
SMALL = (
    "seed@batch=3,length=4",
    "summarize-pg-scaled@batch=2,length=6",
    "translation-small-scaled@batch=3,length=6",
    "speech-las-scaled@batch=2,length=10,hidden=16",
)
TINY = SMALL[0]

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def one_thread():
    """As many threads as a small problem needs, and what there were before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(variant: Variant, workload_name: str = TINY) -> Executable:
    """An executable in inference; the test is skipped where the variant says that it cannot run."""
    workload = find_workload(workload_name)
    if reason := variant.why_not("cpu", "inference", workload):
        pytest.skip(reason)
    return Executable(variant, workload.config, "inference", "cpu", initial_weights(workload.config, 1))


def judged(executable: Executable, workload_name: str) -> str:
    """The reason why gate or audit refuse it, before the rounds or after them; nothing otherwise."""
    workload = find_workload(workload_name)
    weights, batch = initial_weights(workload.config, 1), workload.make_batch(0)
    gate = Gate(workload, "inference", "cpu")
    audit = Audit(gate, weights, batch)
    prepared = executable.prepare(batch)
    before = gated(gate, audit, executable, prepared, 100, warm=False)
    return before["reason"] or gated(gate, audit, executable, prepared, 101, warm=True)["reason"]


def seen(executable: Executable, workload_name: str = TINY) -> tuple[evidence.Observation, str]:
    """Return what is observed of a call, and what is said of it."""
    workload = find_workload(workload_name)
    batch = executable.prepare(workload.make_batch(0))
    with executable.context():
        executable.call(batch)
        found = evidence.observe(lambda: executable.call(batch), "cpu", executable.runtime)
    return found, evidence.explain(executable.variant, workload, "cpu", found, None)


@pytest.mark.parametrize("workload", [SMALL[0], SMALL[3]])
@pytest.mark.parametrize("name", [*CONVERTED, "lstmcell"])
def test_gate_and_audit_let_it_through(name, workload):
    """Twice, on new weights, new inputs and new lengths: what was converted first is not what is run later.

    Values without lengths, frames with them; tokens are in `test_execution_executable.py`, for every runtime.
    """
    assert judged(build(VARIANTS[name], workload), workload) == ""


@EACH
def test_a_runtime_that_keeps_old_weights_is_refused(name, monkeypatch):
    """With `reload` left out the gate's first look passes, its second does not, and the audit says why."""
    executable = build(VARIANTS[name])
    monkeypatch.setattr(Runtime, "reload", lambda _: None)
    gate = Gate(find_workload(TINY), "inference", "cpu")
    assert gate.check(executable, 100).passed
    assert not gate.check(executable, 101).passed
    assert "and the results stayed the same" in judged(build(VARIANTS[name]), TINY)


@EACH
def test_a_conversion_that_failed_leaves_no_old_weights_in_use(name, monkeypatch):
    """After an error in `load`, the next call converts again instead of running what was there."""
    executable, workload = build(VARIANTS[name]), find_workload(TINY)
    batch = workload.make_batch(0)
    with executable.context():
        executable.call(batch)

    def fail(*_: object) -> None:
        msg = "no conversion today"
        raise RuntimeError(msg)

    other = initial_weights(workload.config, 2)
    with monkeypatch.context() as patch:
        patch.setattr(type(executable.runtime), "convert", fail)
        with pytest.raises(RuntimeError, match="no conversion today"):
            executable.load(other)
    fresh = Executable(VARIANTS[name], workload.config, "inference", "cpu", other)
    with executable.context():
        assert torch.equal(executable.call(batch).outputs, fresh.call(batch).outputs)


@EACH
def test_weights_that_did_not_change_are_not_converted_again(name, monkeypatch):
    """Loading what is loaded already costs no conversion; loading anything else costs one."""
    executable, workload = build(VARIANTS[name]), find_workload(TINY)
    conversions = []
    convert = type(executable.runtime).convert
    counted = lambda self, digest: (conversions.append(digest), convert(self, digest))  # noqa: E731
    monkeypatch.setattr(type(executable.runtime), "convert", counted)
    executable.load(initial_weights(workload.config, 1))
    assert not conversions
    with executable.context():
        executable.call(workload.make_batch(0))
    executable.load(initial_weights(workload.config, 1))
    assert len(conversions) == 1
    executable.load(initial_weights(workload.config, 2))
    assert len(set(conversions)) == 2


def test_runtimes_share_an_export_of_equal_weights(monkeypatch):
    """Of two runtimes with the same weights and shapes one exports; others, or other weights, export anew."""
    build(VARIANTS["openvino"])
    build(VARIANTS["onnxruntime"])
    exports = []
    real = export._export
    monkeypatch.setattr(export, "EXPORTS", export.Exports())
    monkeypatch.setattr(export, "_export", lambda runtime: exports.append(runtime) or real(runtime))
    workload = find_workload(TINY)
    for name, weights in (("onnxruntime", 1), ("openvino", 1), ("onnxruntime", 2)):
        executable = build(VARIANTS[name])
        executable.load(initial_weights(workload.config, weights))
        with executable.context():
            executable.call(workload.make_batch(0))
    assert len(exports) == 2
    for weights in range(3, 9):
        executable.load(initial_weights(workload.config, weights))
    assert len(export.EXPORTS._newest) == export.KEPT


@pytest.fixture
def processes(tmp_path, monkeypatch):
    """Begins another process that keeps its exports in the same folder; returns what was exported in all of them."""
    made = []
    real = {(export, "_export"): export._export, (ort, "_quantised"): ort._quantised}
    for (module, name), function in real.items():
        kept = lambda *given, function=function, **named: made.append(given) or function(*given, **named)  # noqa: E731
        monkeypatch.setattr(module, name, kept)

    def begin() -> list[object]:
        found = export.Exports(tmp_path / "exports")
        for module in (export, ort):
            monkeypatch.setattr(module, "EXPORTS", found)
        return made

    return begin


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8"])
def test_what_a_process_exported_is_read_by_the_next(name, processes, tmp_path):
    """Gate and audit pass in both, and the next one exports nothing; other weights are exported anew."""
    made = processes()
    assert judged(build(VARIANTS[name]), TINY) == ""
    count = len(made)
    assert count == len(list((tmp_path / "exports").iterdir()))
    made = processes()
    assert judged(build(VARIANTS[name]), TINY) == ""
    assert len(made) == count
    gate = Gate(find_workload(TINY), "inference", "cpu")
    assert gate.check(build(VARIANTS[name]), 555).passed
    assert len(made) > count


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_a_wrong_file_is_refused_by_the_gate(name, processes, tmp_path):
    """An export that another process kept is judged in each process that runs it."""
    processes()
    gate = Gate(find_workload(TINY), "inference", "cpu")
    assert gate.check(build(VARIANTS[name]), 100).passed
    before = set((tmp_path / "exports").iterdir())
    assert gate.check(build(VARIANTS[name]), 101).passed
    (other,) = set((tmp_path / "exports").iterdir()) - before
    other.write_bytes(before.pop().read_bytes())
    processes()
    assert gate.check(build(VARIANTS[name]), 100).passed
    assert not gate.check(build(VARIANTS[name]), 101).passed


def test_an_export_of_another_model_with_equal_weights_is_another(processes):
    """Classes of modules count: a variant that computes otherwise with the same weights exports for itself."""
    processes()
    executable = build(VARIANTS["onnxruntime"])
    with executable.context():
        executable.call(find_workload(TINY).make_batch(0))
    made = processes()
    before = len(made)

    class Other(type(executable.model)):
        """The same under another name."""

    executable = build(VARIANTS["onnxruntime"])
    executable.model.__class__ = Other
    with executable.context():
        executable.call(find_workload(TINY).make_batch(0))
    assert len(made) == before + 1


def _no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_process_that_dies_while_it_keeps_an_export_leaves_nothing_to_read(tmp_path, monkeypatch):
    """The next one exports for itself; what is too large, or finds a full disk, is in no file."""

    @contextlib.contextmanager
    def dies(path, **options):
        with replacing(path, **options) as file:
            file.write(b"ri")
            raise KeyboardInterrupt
        yield file

    with monkeypatch.context() as patched:
        patched.setattr(export, "replacing", dies)
        with pytest.raises(KeyboardInterrupt):
            export.Exports(tmp_path).get("a", lambda: b"right")
    assert export.Exports(tmp_path).get("a", lambda: b"right") == b"right"
    assert export.Exports(tmp_path).get("a", lambda: b"not asked") == b"right"
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", _no_space)
        assert export.Exports(tmp_path).get("c", lambda: b"kept nowhere") == b"kept nowhere"
    assert not [path for path in tmp_path.iterdir() if path.stem == "c"]
    monkeypatch.setattr(export, "MOST_BYTES", 4)
    assert export.Exports(tmp_path).get("b", lambda: b"large") == b"large"
    assert not (tmp_path / "b.onnx").exists()


@EACH
@pytest.mark.parametrize("threads", [1, 2])
def test_threads_are_those_of_torch(name, threads):
    """The runtime's own account has as many threads as torch was given, whatever the machine has."""
    if threads > len(os.sched_getaffinity(0)):
        pytest.skip("needs two cores")
    torch.set_num_threads(threads)
    found, words = seen(
        build(VARIANTS[name], "scaling@batch=8,hidden=64,length=3"), "scaling@batch=8,hidden=64,length=3"
    )
    assert found.threads == threads
    assert words.endswith(f"{threads} thread" + "s" * (threads > 1))


def test_onnx_runtime_computes_with_the_threads_it_was_given():
    """A session adds as many threads to the process as it was given beyond the caller's own."""
    executable = build(VARIANTS["onnxruntime"])
    counts = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        before = psutil.Process().num_threads()
        session = ort._session(export.exported(converted(executable), executable.runtime.digest))
        counts.append(psutil.Process().num_threads() - before)
        assert session.get_session_options().inter_op_num_threads == 1
    assert counts == [0, 2]


def converted(executable: Executable) -> Runtime:
    """Its runtime, after a first call."""
    with executable.context():
        executable.call(find_workload(TINY).make_batch(0))
    assert executable.runtime is not None
    return executable.runtime


def test_onnx_runtime_tells_its_lstm_nodes():
    """Encoder and decoder are a node each, by the profile, not unrolled."""
    found, words = seen(build(VARIANTS["onnxruntime"]))
    assert found.operators["LSTM"] == 2
    assert found.precisions == ("fp32",)
    assert words.startswith("ONNX Runtime ")
    assert "ran 2 LSTM nodes by CPUExecutionProvider, 1 thread" in words


@pytest.mark.parametrize(("workload", "wanted"), [(TINY, "ran 2 LSTM layers"), (SMALL[2], "loops over single steps")])
def test_openvino_tells_its_layers(workload, wanted):
    """Two layers of fixed lengths; sequences of different lengths become loops, and that is said."""
    found, words = seen(build(VARIANTS["openvino"], workload), workload)
    assert wanted in words
    assert found.precisions == ("fp32",)
    assert "own choice" not in words


def test_openvino_s_own_precision_is_judged_as_such():
    """The precision it chooses here is its variant's, that of its layers, and that in its words."""
    executable = build(VARIANTS["openvino-default"])
    found, words = seen(executable)
    assert executable.variant.precision == openvino.default_precision()
    assert found.precisions[0] == executable.variant.precision
    assert f"{executable.variant.precision} by its own choice" in words
    assert "asked for" not in words


def test_another_choice_than_the_one_it_is_judged_by_is_an_error(monkeypatch):
    """It never runs in a precision that the gate was not told of."""
    executable = build(VARIANTS["openvino-default"])
    monkeypatch.setattr(openvino, "default_precision", lambda: "fp64")
    with executable.context(), pytest.raises(RuntimeError, match="its default here is said to be fp64"):
        executable.call(find_workload(TINY).make_batch(0))


def test_int8_is_told_with_its_precision():
    """Both LSTMs were quantised, and the operator that ran them is torch's."""
    found, words = seen(build(VARIANTS["int8-dynamic"]))
    assert found.precisions == ("int8",)
    assert found.operators["aten::quantized_lstm"] == 2
    assert words.startswith("torch quantised 2 LSTMs, engine ")


def test_what_int8_left_alone_is_told(monkeypatch):
    """A copy in which nothing was quantised is found out by the types of its layers."""
    monkeypatch.setattr(torch.ao.quantization, "quantize_dynamic", lambda model: model)
    _, words = seen(build(VARIANTS["int8-dynamic"]))
    assert "asked for int8, but products ran in fp32" in words


@pytest.mark.parametrize(("workload", "lstms"), [(TINY, 2), (SMALL[1], 3)])
def test_onnx_runtime_in_int8_tells_its_lstms(workload, lstms):
    """All are quantised, in the second workload two that share their weights, which its tool would break."""
    found, words = seen(build(VARIANTS["onnxruntime-int8"], workload), workload)
    assert found.precisions[0] == "int8"
    assert found.operators["DynamicQuantizeLSTM"] == lstms
    assert "LSTM" not in found.operators
    assert f"ran {lstms} LSTM nodes" in words


@pytest.mark.parametrize(("flags", "bits"), [("avx2 fma", 7), ("avx2 avx512_vnni", 8), ("avx2 avx_vnni", 8)])
def test_weights_have_7_bits_where_sums_of_two_products_would_saturate(flags, bits, monkeypatch):
    """Processors without VNNI add two products of bytes in 16 bits."""
    monkeypatch.setattr(ort, "cpu_flags", lambda: flags)
    executable = build(VARIANTS["onnxruntime-int8"])
    with executable.context():
        executable.call(find_workload(TINY).make_batch(0))
    onnx = pytest.importorskip("onnx")
    kept = onnx.load_from_string(executable.runtime._model).graph.initializer
    weights = [onnx.numpy_helper.to_array(value) for value in kept if value.data_type == onnx.TensorProto.INT8]
    largest = max(int(abs(value.astype(int)).max()) for value in weights if value.size > 1)
    assert largest in {7: (63, 64), 8: (127, 128)}[bits]


def test_an_lstm_that_was_unrolled_is_told():
    """A profile without LSTM nodes says so, with the provider and the types that ran."""
    node = {"cat": "Node", "dur": 5, "args": {"op_name": "MatMul", "provider": "SomeProvider"}}
    node["args"]["input_type_shape"] = [{"float16": [2, 3]}, {"float16": [3, 4]}]
    ran = ort.digest_profile([node, node | {"cat": "Session"}], "1.0")
    assert ran.words == "ONNX Runtime 1.0 ran 0 LSTM nodes by SomeProvider, 1 thread"
    assert ran.precisions == ("fp16",)
    assert ran.operators == {"MatMul": 1}


@pytest.mark.parametrize("name", ["onnxruntime", "onnxruntime-int8", "openvino", "openvino-default"])
def test_without_its_package_a_variant_says_what_to_install(name, monkeypatch):
    """Each package that is missing is named, with the command."""
    package = name.partition("-")[0]
    for missing, there in ((package, "onnx"), ("onnx", package)):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, there, types.ModuleType(there))
            patch.setitem(sys.modules, missing, None)
            reason = VARIANTS[name].why_not("cpu", "inference", WORKLOADS["seed"])
        assert reason.startswith(f"needs {missing}, which ")
        assert reason.endswith(f"pip install onnx {package}")
        assert "is not installed" in reason or "does not load" in reason


def test_without_openvino_the_precision_is_asked_of_nobody(monkeypatch):
    """The list of cases is made on a machine without it too."""
    openvino.default_precision.cache_clear()
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert VARIANTS["openvino-default"].here().precision == "fp32"
    openvino.default_precision.cache_clear()


def test_without_an_engine_int8_says_so(monkeypatch):
    """A torch that cannot quantise is told by what it lacks."""
    why = VARIANTS["int8-dynamic"].why_not
    with monkeypatch.context() as patch:
        patch.delattr(torch.ao.quantization, "quantize_dynamic")
        assert "has no torch.ao.quantization" in why("cpu", "inference", WORKLOADS["seed"])
    assert why("cpu", "inference", WORKLOADS["seed"]) is None


@EACH
def test_training_is_refused(name):
    """A converted model has no gradients, whatever is installed."""
    assert "inference only" in VARIANTS[name].why_not("cpu", "training", WORKLOADS["seed"])


@EACH
def test_results_are_new_memory(name):
    """The next call leaves a result alone, and no result lies in an input."""
    executable, workload = build(VARIANTS[name]), find_workload(TINY)
    batch = workload.make_batch(0)
    with executable.context():
        first = executable.call(batch)
        kept = [value.clone() for value in first]
        executable.call(workload.make_batch(1))
    assert all(torch.equal(value, copy) for value, copy in zip(first, kept, strict=True))
    assert batch.source.untyped_storage().data_ptr() not in {value.untyped_storage().data_ptr() for value in first}


def test_an_export_has_the_inputs_that_are_given():
    """Named as the model's arguments, so that a runtime can be fed by name."""
    executable = build(VARIANTS["onnxruntime"], SMALL[2])
    with executable.context():
        executable.call(executable.prepare(find_workload(SMALL[2]).make_batch(0)))
    assert isinstance(executable.runtime, OnnxRuntime)
    assert [name for name, _ in executable.runtime._names] == list(ARGUMENTS)


def test_a_runtime_counts_its_weights_as_small_as_it_stores_them():
    """Least bytes are a lower bound for a copy in int8 or bf16 too, though the model's own weights are fp32.

    Under autocast our kernels keep such a copy where there are no gradients, and torch's own does not.
    """
    workload = find_workload("seed")
    extent = Extent.of(workload.make_batch(0))
    stored = {
        "int8-dynamic": VARIANTS["int8-dynamic"].stored_bytes("inference"),
        "bf16": dataclasses.replace(VARIANTS["openvino"], precision="bf16").stored_bytes("inference"),
        "onnxruntime": VARIANTS["onnxruntime"].stored_bytes("inference"),
    }
    assert stored == {"int8-dynamic": 1, "bf16": 2, "onnxruntime": 4}
    amp = [
        VARIANTS[name].stored_bytes(mode)
        for name in ("cpu-fused-amp", "amp-bf16")
        for mode in ("inference", "training")
    ]
    assert amp == [2, 4, 4, 4]
    least = [cost(workload.config, extent, "inference", stored_bytes=size).least_bytes for size in stored.values()]
    assert least == sorted(set(least))


@pytest.mark.parametrize("workload", SMALL)
def test_int8_s_yardstick_is_what_int8_costs(workload):
    """The loop rounded in fp32 errs as torch's quantised operator does, within a half, in every result."""
    problem = find_workload(workload)
    gate = Gate(problem, "inference", "cpu")
    truth, yardstick = gate.quantities(7, "truth"), gate.quantities(7, "int8")
    found = gate._found(build(VARIANTS["int8-dynamic"], workload), 7)
    for name in ("outputs", "hidden", "cell"):
        ratio = relative_error(found[name], truth[name]) / relative_error(yardstick[name], truth[name])
        assert 0.5 < ratio < 1.5, name


def test_int8_in_disguise_is_refused_in_fp32():
    """Rounded weights pass in their own class alone: nothing gets int8's tolerance by the way."""
    problem = find_workload(TINY)
    gate = Gate(problem, "inference", "cpu")
    rounded = {
        name: relative_error(value, gate.quantities(7, "truth")[name])
        for name, value in gate.quantities(7, "int8").items()
    }
    assert rounded["hidden"] > 100 * limit_for(0.0, "fp32")
    assert rounded["hidden"] <= limit_for(rounded["hidden"], "int8")


def test_weights_are_rounded_to_eight_bits():
    """At most 256 values a matrix, the largest kept within half a step; biases and embeddings as they were."""
    weights = initial_weights(find_workload(SMALL[2]).config, 0)
    for name, value in rounded_weights(weights).items():
        if name.startswith("embed") or value.dim() == 1:
            assert value is weights[name]
        else:
            assert len(value.unique()) <= 256
            assert (value - weights[name]).abs().max() <= weights[name].abs().max() / 255 * 1.01


def test_a_rounded_lstm_of_zeros_is_no_nan():
    """A grid without width leaves zeros as they are."""
    lstm = RoundedLSTM(3, 4)
    output, _ = lstm(torch.zeros(2, 5, 3))
    assert output.isfinite().all()


def test_lstmcell_is_told_and_has_no_lstm():
    """One call of the cell a step, encoder and decoder, and no LSTM operator."""
    found, words = seen(build(VARIANTS["lstmcell"]))
    assert words == "a loop in Python called the LSTM cell 8 times"
    assert "aten::lstm" not in found.operators


def test_lstmcell_calls_what_nn_lstmcell_calls():
    """One step of it is nn.LSTMCell's, bit for bit."""
    from seq2seq.execution.variant import LSTMS

    lstm, cell = LSTMS["cell"](3, 4), torch.nn.LSTMCell(3, 4)
    cell.load_state_dict({name.removesuffix("_l0"): value for name, value in lstm.state_dict().items()})
    x = torch.randn(2, 1, 3)
    _, (hidden, state) = lstm(x)
    wanted = cell(x[:, 0])
    assert torch.equal(hidden[0], wanted[0])
    assert torch.equal(state[0], wanted[1])


def test_the_reference_s_precision_is_its_own():
    """Only a variant whose runtime chooses is another one here."""
    assert REFERENCE.here() is REFERENCE


def test_a_signal_is_survived_after_openvino():
    """The thread's signals keep the stack that they had: OpenVINO's own would not carry them."""
    pytest.importorskip("openvino")
    program = (
        "import signal, torch\n"
        "from seq2seq.execution.executable import Executable\n"
        "from seq2seq.models.weights import initial_weights\n"
        "from seq2seq.runtimes.signal_stack import _Stack\n"
        "from seq2seq.execution.variants import VARIANTS\n"
        "from seq2seq.workloads.registry import find_workload\n"
        "import ctypes\n"
        "workload = find_workload('seed')\n"
        "executable = Executable(\n"
        "    VARIANTS['openvino'], workload.config, 'inference', 'cpu', initial_weights(workload.config, 0)\n"
        ")\n"
        "with executable.context():\n"
        "    executable.call(executable.prepare(workload.make_batch(0)))\n"
        "stack = _Stack()\n"
        "ctypes.CDLL(None).sigaltstack(None, ctypes.byref(stack))\n"
        "print(stack.address)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout.splitlines() == ["None"], done.stderr[-300:]
