"""kernels.LSTM under torch.compile and torch.export: one graph, dynamic batch and steps, the results of eager code."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch._inductor.config
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_sequence

from kernels import LSTM
from kernels.layers import matmul_precision


class Model(nn.Module):
    """Two layers in both directions between two linear maps, as a user would build it."""

    def __init__(self, implementation: str = "loop", dropout: float = 0.0) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.lstm = LSTM(4, 5, 2, batch_first=True, bidirectional=True, dropout=dropout, implementation=implementation)
        self.last = nn.Linear(10, 2)

    def forward(self, x: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Output of the last map; the final state has a part in it."""
        output, (hidden, cell) = self.lstm(self.first(x), None, lengths)
        return self.last(output) + hidden.sum() + cell.mean()


@pytest.fixture(autouse=True)
def _fresh_compiler():
    """Keep one test's compiled code from another."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(function: Any, model: nn.Module, *args: Any) -> list[Tensor]:
    """Result and gradients."""
    result = function(*args)
    return [result, *torch.autograd.grad(result.square().sum(), list(model.parameters()))]


#: Roundings of float32 that may add up in these sums; eager code errs by 2.
ROUNDING = 8 * torch.finfo(torch.float32).eps

INPUTS = [((2, 5, 3), None), ((3, 4, 3), (4, 1, 3)), ((4, 7, 3), (7, 1, 3, 2))]


@pytest.mark.parametrize(
    ("backend", "dynamic", "implementation"),
    [
        ("aot_eager", None, "loop"),
        ("aot_eager", True, "auto"),
        pytest.param("inductor", True, "loop", marks=pytest.mark.slow),
    ],
)
@torch._inductor.config.patch({"cpp.simdlen": 1})  # loops without vectors compile in half the time
def test_one_graph_for_all_sizes(backend, dynamic, implementation):
    """Traced whole, forward and in training, any batch, steps and lengths give what float64 gives in eager code."""
    torch.manual_seed(0)
    model = Model(implementation)
    eager = copy.deepcopy(model).double()
    eager.lstm.implementation = "loop"
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=dynamic)
    # Each kind of call is two graphs that Inductor compiles for seconds; without lengths and in inference there is
    # nothing in them that there is not with lengths and gradients.
    for shape, ends in INPUTS[1:] if backend == "inductor" else INPUTS:
        x, lengths = torch.randn(shape), None if ends is None else torch.tensor(ends)
        expected = step(eager, eager, x.double(), lengths)
        for found, truth in zip(step(compiled, model, x, lengths), expected, strict=True):
            # The gradients are sums whose parts cancel, so the measure is the largest of each.
            torch.testing.assert_close(found.double(), truth, rtol=0, atol=ROUNDING * truth.abs().max().item())
    if backend != "inductor":
        with torch.no_grad():
            torch.testing.assert_close(compiled(x, lengths), eager(x.double(), lengths).float())


def test_sizes_are_symbols():
    """After two sizes the graph serves all: batch and steps are not compiled into it."""
    model = Model()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True, dynamic=True)
    for shape in ((2, 5, 3), (3, 4, 3), (7, 9, 3), (5, 2, 3)):
        compiled(torch.randn(shape))
    assert counter.frame_count == 1


def test_padding_never_counts():
    """Values in the padding stay out of results and gradients in compiled code as well."""
    model = LSTM(4, 5, bidirectional=True, batch_first=True, dtype=torch.float64, implementation="loop")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x, lengths = torch.randn(2, 5, 4, dtype=torch.float64), torch.tensor([2, 5])
    found = []
    for filler in (0.0, torch.nan):
        x[0, 2:] = filler
        output, _ = compiled(x, None, lengths)
        found.append([output, *torch.autograd.grad(output.sum(), list(model.parameters()))])
    torch.testing.assert_close(found[1], found[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_traced(dtype):
    """Autocast's rule holds in compiled code: the same types and values as in eager code, gradients in float32."""
    model = Model()
    compiled = torch.compile(model.lstm, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 4)
    found = []
    for function in (compiled, model.lstm):
        with torch.autocast("cpu", dtype):
            output, (hidden, cell) = function(x)
        assert {output.dtype, hidden.dtype, cell.dtype} == {dtype}
        gradients = torch.autograd.grad(output.float().sum(), list(model.lstm.parameters()))
        assert {gradient.dtype for gradient in gradients} == {torch.float32}
        found.append([output, hidden, cell, *gradients])
    torch.testing.assert_close(*found)


def test_dropout_is_traced():
    """Dropout in compiled training acts, and not in evaluation."""
    model = Model(dropout=1.0)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(compiled(x), model(x))
    dropped = compiled(x)
    model.eval()
    torch.testing.assert_close(compiled(x), model(x))
    assert not torch.equal(compiled(x), dropped)


def test_tracing_leaves_the_record_alone():
    """`choices` is of the last eager call; compiled code does not touch it."""
    model = Model()
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 5, 3))
    assert model.lstm.choices == ()


UNTRACEABLE = {
    "packed": ({"implementation": "loop"}, "padded input and lengths"),
    "vendor": ({"implementation": "vendor"}, "choose another implementation"),
    "projection": ({"proj_size": 2}, "choose another implementation"),
}


@pytest.mark.parametrize("case", UNTRACEABLE)
def test_what_cannot_be_traced_says_so(case):
    """A packed sequence and torch's own LSTM break the graph, with advice; without fullgraph they run as ever."""
    options, advice = UNTRACEABLE[case]
    lstm = LSTM(3, 4, **options)
    x = pack_sequence([torch.randn(5, 3), torch.randn(2, 3)]) if case == "packed" else torch.randn(5, 2, 3)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=advice):
        torch.compile(lstm, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found, expected = torch.compile(lstm, backend="eager")(x), lstm(x)
    assert torch.equal(found[1][0], expected[1][0])


def test_precision_is_read_when_traced():
    """The setting for float32 products is a constant of the graph, so reading it does not break one."""

    def function(x):
        return x + (2 if matmul_precision() == "tf32" else 1)

    assert torch.compile(function, backend="eager", fullgraph=True)(torch.zeros(1)).item() == 1


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("with_lengths", [False, True])
def test_export_with_dynamic_batch_and_steps(with_lengths, strict):
    """An exported program serves every batch and number of steps, where nn.LSTM's is tied to its steps."""
    model = Model().eval()
    batch, steps = torch.export.Dim("batch"), torch.export.Dim("steps")
    lengths = torch.tensor([2, 5]) if with_lengths else None
    shapes = ({0: batch, 1: steps}, {0: batch} if with_lengths else None)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 5, 3), lengths), dynamic_shapes=shapes, strict=strict)
        for shape in ((2, 5, 3), (3, 8, 3), (7, 2, 3)):
            x, lengths = torch.randn(shape), torch.full((shape[0],), 2) if with_lengths else None
            torch.testing.assert_close(program.module()(x, lengths), model(x, lengths))
    assert any("lstm_forward" in str(node.target) for node in program.graph.nodes)


def test_export_with_fixed_sizes_survives_a_file(tmp_path):
    """A program of fixed sizes gives the same results after it was written and read again."""
    model, x = Model().eval(), torch.randn(2, 5, 3)
    program = torch.export.export(model, (x,))
    torch.export.save(program, tmp_path / "model.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "model.pt2").module()(x), model(x))


@pytest.mark.parametrize("wrap", [lambda module: module, lambda module: nn.Sequential(nn.Linear(3, 3), module)])
def test_torchscript_says_what_to_do(wrap):
    """torch.jit.script refuses the module with the way out instead of a riddle."""
    with pytest.raises(TypeError, match=r"script a torch\.nn\.LSTM with the same state_dict, or use torch\.export"):
        torch.jit.script(wrap(LSTM(3, 4)))
