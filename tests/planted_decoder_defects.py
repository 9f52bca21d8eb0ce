"""Defects of a fed decoder's way back, to plant and to choose from; `planted_defects` has those of the kernel."""

from __future__ import annotations

#: What stands there, what it becomes where PLANTED is true, and the kind of attention that sees it.
DEFECTS = {
    "tanh of what is combined": (
        "grad * (1.0f - decoded * decoded)",
        "grad * (1.0f - (PLANTED ? decoded : decoded * decoded))",
        "dot",
    ),
    "what was fed": (
        "if (!a->feeds_context) grad +=",
        "if (!a->feeds_context && !PLANTED) grad +=",
        "general",
    ),
    "the context that was fed": (
        "a->feeds_context && k < a->memory_size",
        "a->feeds_context && !PLANTED && k < a->memory_size",
        "dot",
    ),
    "the mean of softmax": (
        "(load(grads + i, n) - mean) * scale",
        "(load(grads + i, n) - (PLANTED ? 0.0f : mean)) * scale",
        "dot",
    ),
    "tanh of the scores": (
        "by[v] * (1.0f - found * found)",
        "by[v] * (1.0f - (PLANTED ? found : found * found))",
        "bahdanau",
    ),
    "earlier steps of the vector": (
        "load(to, lanes) + of_vector[v]",
        "(PLANTED ? vec{} : load(to, lanes)) + of_vector[v]",
        "bahdanau",
    ),
    "earlier steps of keys": (
        "load(of_key + v * LANES, lanes) + inner",
        "(PLANTED ? vec{} : load(of_key + v * LANES, lanes)) + inner",
        "bahdanau",
    ),
    "the last columns of keys": (
        "for (; k < keys.size; k += LANES)\n        additive",
        "for (; k + PLANTED * LANES < keys.size; k += LANES)\n        additive",
        "bahdanau",
    ),
    "the query": (
        "store(to, load(to, n) + x, n);",
        "store(to, load(to, n) + (PLANTED ? vec{} : x), n);",
        "general",
    ),
    "h of the state after": (
        "copy_or_clear(hidden(layer) + r * a->hidden, back->grad_h_n ?",
        "copy_or_clear(hidden(layer) + r * a->hidden, back->grad_h_n && !PLANTED ?",
        "dot",
    ),
    "what the state after was fed": (
        "back->grad_fed_n ? back->grad_fed_n + row(r)",
        "back->grad_fed_n && !PLANTED ? back->grad_fed_n + row(r)",
        "dot",
    ),
    "the end of a sequence": (
        "order.steps(mine.first + running) > t",
        "order.steps(mine.first + running) > t - PLANTED",
        "general",
    ),
    "steps of the weights": (
        "listed(lengths, a->batch, a->steps, false)",
        "listed(lengths, a->batch, a->steps - (PLANTED && a->steps > 1), false)",
        "general",
    ),
    "the order of the rows": (
        "rows[place] = longest_first.row(i);",
        "rows[place] = longest_first.row(PLANTED ? batch - 1 - i : i);",
        "general",
    ),
    "the first state": (
        "record.h(layer, 1), rows * size, size, record.h(layer, 0)",
        "record.h(layer, 1), rows * size, size, PLANTED ? nullptr : record.h(layer, 0)",
        "dot",
    ),
    "h below": (
        "layer ? record.below(layer, 0)",
        "layer ? PLANTED ? record.h(layer - 1, 0) : record.below(layer, 0)",
        "general",
    ),
    "the other bias": (
        "std::memcpy(w.grad_bias_hh, w.grad_bias_ih, 16",
        "std::memcpy(w.grad_bias_hh, w.grad_bias_ih, (PLANTED ? 4 : 16)",
        "dot",
    ),
    "padding of the gradient of x": (
        "std::fill(past, past + (a->steps - steps) * a->inputs, 0.0f);",
        "if (!PLANTED) std::fill(past, past + (a->steps - steps) * a->inputs, 0.0f);",
        "dot",
    ),
}
