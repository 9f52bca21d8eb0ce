"""Defects of the CPU kernel's products, walks and layers, to plant and to choose from: `planted_kernels` compiles them.

By name each has code wherever it stands and what it becomes, wrong where PLANTED is true. They are kept together so
that all of them are one library for each target: compiling takes longer than all that runs on it.
"""

from __future__ import annotations

#: Of the backward pass alone, by the comment above it.
_TILES = "row += ROWS) {\n                const int rows = static_cast<int>"
_THROUGH = "passes through.\n            for (int64_t row = 0; row"
_ALL = "(PLANTED ? mine.count : running)"
#: What recurrences are known for.
RECURRENCE = {
    "gates": (
        "sums[r][0]), f = sigmoid(sums[r][1]",
        "sums[r][PLANTED ? 1 : 0]), f = sigmoid(sums[r][PLANTED ? 0 : 1]",
    ),
    "tail": (
        "(hidden - unit < LANES ? hidden - unit : LANES);\n            vec plus[4] = {};",
        "(hidden - unit < LANES && !PLANTED ? hidden - unit : LANES);\n            vec plus[4] = {};",
    ),
    "length": ("t >= lengths[b]", "t >= lengths[b] + PLANTED"),
    "h0": ("recurs = s || a->h0;", "recurs = s || (a->h0 && !PLANTED);"),
    "stale-h": ("before = after;\n", "if (!PLANTED) before = after;\n"),
    "stale-c": ("dc * c_before * f", "dc * (PLANTED ? vec{} + 1.0f : c_before) * f"),
    "held-gradient": (
        f"{_THROUGH} < running; {_TILES}(running - row < ROWS ? running",
        f"{_THROUGH} < {_ALL}; {_TILES}({_ALL} - row < ROWS ? {_ALL}",
    ),
    "late-start": ("while (running < count &&", "while (running < count && !PLANTED &&"),
    "order": ("given[a] > given[b]", "(PLANTED ? given[a] < given[b] : given[a] > given[b])"),
    "reset": ("reset(s + 1, after);", "if (!PLANTED) reset(s + 1, after);"),
    "gradient-past-reset": ("reset ? vec{} : sums[r][v]", "reset && !PLANTED ? vec{} : sums[r][v]"),
}
#: What a layer adds to the recurrence: projection in the step, lengths, gradients of weights.
LAYER = {
    "start": ("a->reverse ? length - 1 : 0", "a->reverse ? (PLANTED ? a->steps : length) - 1 : 0"),
    "before": ("a->reverse ? at.t + 1 : at.t - 1", "a->reverse && !PLANTED ? at.t + 1 : at.t - 1"),
    "places": ("if (!lengths.ended(at.b, at.t))", "if (!lengths.ended(at.b, at.t + PLANTED))"),
    "cursor": ("(i >= rows->count || rows->ended(i, t))", "(i >= rows->count || rows->ended(i, t + PLANTED))"),
    "bias": ("in_step ? plus[gate] :", "in_step ? (PLANTED ? vec{} : plus[gate]) :"),
    "place": (
        "k / steps : k % batch), t(rows_first",
        "(PLANTED ? k % steps : k / steps) : k % batch), t(rows_first != PLANTED",
    ),
}
#: Products that copy their left operand.
COPIED_PRODUCT = {
    "group": ("copy + (group - mine.first) * depth * ROWS", "copy + (group - mine.first) * (depth - PLANTED) * ROWS"),
    "last": ("i < columns ? from[i]", "i < columns - PLANTED ? from[i]"),
    "chunks": ("on_top ? load(to", "on_top && !PLANTED ? load(to"),
    "biases": ("start ? load(to, lanes(v)) + sum[v]", "start && !PLANTED ? load(to, lanes(v)) + sum[v]"),
    "zero": ("std::memcpy(to, rows[k] + column", "std::memcpy(to, rows[k] + (PLANTED ? 0 : column)"),
    "right": ("right(start + k);", "right(start + k - (PLANTED && k > 0));"),
}
#: Products by sums.
SUMMED = {
    "precision": ("squares * weights <= PRECISION * n", "squares * weights * (PLANTED ? 0.0f : 1.0f) <= PRECISION * n"),
    "crest": ("_mm512_reduce_max_ps(most) <= CREST", "_mm512_reduce_max_ps(most) <= (PLANTED ? 1e9f : CREST)"),
    "largest": ("squares < 1e24f", "(PLANTED || squares < 1e24f)"),
    "marked": ("summed = summed && head(a[r]).summed", "summed = summed && (PLANTED || head(a[r]).summed)"),
    "sign": ("subtracts(k) ? -product : product", "subtracts(k) && !PLANTED ? -product : product"),
    "row-sign": ("subtracts(k) ? pairs - products", "subtracts(k) && !PLANTED ? pairs - products"),
    "first": ("reduce_add_ps(0x1111, pairs)", "reduce_add_ps(PLANTED ? 0x1110 : 0x1111, pairs)"),
    "second": ("reduce_add_ps(0x4444, pairs)", "reduce_add_ps(PLANTED ? 0x4404 : 0x4444, pairs)"),
    "run": ("k + LANES < whole ? k + LANES : whole", "k + LANES < whole && !PLANTED ? k + LANES : whole"),
    "whole": ("Summary::whole(depth) - k;", "(PLANTED ? depth : Summary::whole(depth)) - k;"),
    "rest": ("for (; k < depth; ++k, w += 4 * LANES)", "for (; k < depth - PLANTED; ++k, w += 4 * LANES)"),
    "scale": ("* of.back;", "* (PLANTED ? 1.0f : of.back);"),
    "both": ("of.first + of.second", "of.first + of.second * !PLANTED"),
    "block": ("summary.excess(block)", "summary.excess(PLANTED ? 0 : block)"),
    "one-sequence-row": ("from[r] = inputs[row + r];\n", "from[r] = inputs[row + r * !PLANTED];\n"),
    "one-sequence-step": ("to = projected_of(s + row + r, block)", "to = projected_of(s + row + r * !PLANTED, block)"),
    "one-sequence-bias": ("gates[r][gate] = bias[gate];", "gates[r][gate] = PLANTED ? vec{} : bias[gate];"),
}
#: The walk of one sequence that projects other steps beside its own.
INTERLEAVED = {
    "many": ("rows[r] = inputs[done + r]", "rows[r] = inputs[done + r * !PLANTED]"),
    "ring": ("? 2 * AHEAD : TOGETHER", "? (PLANTED ? 1 : 2) * AHEAD : TOGETHER"),
    "part": ("std::min(part, groups - start_of)", "std::min(part - PLANTED, groups - start_of)"),
    "ahead": ("if (at == 0 && more) begin(s + AHEAD);", "if (at == 0 && more) begin(s + AHEAD - PLANTED);"),
    "left": ("left -= open;", "left -= open + PLANTED;"),
    "fourth": ("projecting + 3 * GATES", "projecting + (PLANTED ? 2 : 3) * GATES"),
    "back": ("cell(gates_of, s % 2 ? own.first", "cell(gates_of, s % 2 && !PLANTED ? own.first"),
    "own-input": ("rows[0] = prepared(s,", "rows[0] = prepared(PLANTED ? 0 : s,"),
    "own-biases": (
        "add_biases(to, block);\n        input.finish",
        "if (!PLANTED) add_biases(to, block);\n        input.finish",
    ),
}
#: The same by AVX2 alone.
OVERLAPPED = {
    "overlapped-ring": ("s % AHEAD *", "s % (PLANTED ? AHEAD / 2 : AHEAD) *"),
    "again": ("if (s % AHEAD == 0) project(s);", "if (s % (PLANTED ? 2 * AHEAD : AHEAD) == 0) project(s);"),
    "last": ("std::min(AHEAD, a->steps - s)", "std::min(AHEAD, a->steps - s - PLANTED)"),
    "row": ("time(s + r) * a->x_step, input_room", "time(s + r * !PLANTED) * a->x_step, input_room"),
    "apart": ("sums[gate] += own[at][gate]", "sums[gate] += own[at][PLANTED ? 0 : gate]"),
    "between": ("word += 4 * EACH;", "word += 4 * (EACH - PLANTED);"),
    "done": ("past >= 0 ? open : 0", "past >= 0 ? open - PLANTED : 0"),
    "back": INTERLEAVED["back"],
}
#: Strips of weights, and the walk of several whole sequences by AVX2 alone.
STRIPS = {
    "strip": ("strips_of(block) + strip * depth * STEP", "strips_of(block) + (PLANTED ? 0 : strip) * depth * STEP"),
    "second": ("(gate < 2 ? w : other)", "(gate < 2 || PLANTED ? w : other)"),
    "last-k": ("if (k < depth) add(even, k);", "if (k < depth - PLANTED) add(even, k);"),
    "sums": ("load(begin + r * each + v * LANES)", "load(begin + r * each * !PLANTED + v * LANES)"),
    "bias": ("gate * LANES, a->bias_ih ?", "gate * LANES, a->bias_ih && !PLANTED ?"),
    "wraps": ("++step, row = 0;", "step += !PLANTED, row = 0;"),
    "chunk": ("if (s % chunk == 0) project(s,", "if (s % chunk == 0) project(PLANTED ? 0 : s,"),
    "pass": ("to, with, each, from, block, pass);", "to, with, each, from, block, PLANTED ? 0 : pass);"),
    "twice": ("else if (!pass) matrix.add_few", "else if (!pass || PLANTED) matrix.add_few"),
    "other-state": ("(s % 2 * a->batch + mine.first)", "(s % 2 * !PLANTED * a->batch + mine.first)"),
    "first-c": ("r * LANES, a->c0 ?", "r * LANES, a->c0 && !PLANTED ?"),
    "first-h": ("s ? state(s - 1) : a->h0 ?", "s ? state(s - 1) : a->h0 && !PLANTED ?"),
    "last-row": ("if (row < rows()) some(", "if (row < rows() - PLANTED) some("),
    "last-h": ("a->steps ? state(a->steps - 1) +", "a->steps ? state(a->steps - 1 + PLANTED) +"),
    "cell": ("low / ((low + 2.0f) * more", "low / ((low + (PLANTED ? 1.0f : 2.0f)) * more"),
}
#: Products of pairs of bf16 numbers.
PAIRS = {
    "parts": ("features, start > 0);", "features, start > 0 && !PLANTED);"),
    "pairs": ("two_rows(at(k), at(k + 1),", "two_rows(at(PLANTED ? k + 1 : k), at(PLANTED ? k : k + 1),"),
    "state-pairs": ("_mm512_slli_epi32(loaded(second), 16)", "_mm512_slli_epi32(loaded(PLANTED ? first : second), 16)"),
    "input-rows": ("x[r] = input_row(row + r)", "x[r] = input_row(PLANTED ? row : row + r)"),
    "state-rows": ("h[r] = state(which, b)", "h[r] = state(which, PLANTED ? mine[row] : b)"),
    "projected": ("load(in + gate * hidden, n);", "load(in + (PLANTED ? 0 : gate) * hidden, n);"),
    "one-row-less": ("two_pair_products<R - 1>(rows,", "two_pair_products<R - 1>(rows - PLANTED,"),
    "record": ("_mm512_fnmadd_ps(taken, g, i)", "_mm512_fnmadd_ps(taken, PLANTED ? i : g, i)"),
    "goes-on": ("factor(PairRecord::FORGET)", "factor(PLANTED ? PairRecord::OF_C : PairRecord::FORGET)"),
    "first-c": ("if (a->c0) std::memcpy", "if (a->c0 && !PLANTED) std::memcpy"),
    "gradient-rows": ("(first + row + r) * depth;", "(first + row + r * !PLANTED) * depth;"),
    "two-directions": ("width, a->grad_x_more,", "width, a->grad_x_more && !PLANTED,"),
    "first-h": ("state[i] = to_bfloat16(", "state[i] = PLANTED ? 0 : to_bfloat16("),
    "bias": ("start ? load(to, lanes) + (vec)sums[half]", "start && !PLANTED ? load(to, lanes) + (vec)sums[half]"),
    "packing": (
        "_mm512_maskz_loadu_ps(lanes, from + depth)",
        "_mm512_maskz_loadu_ps(lanes, PLANTED ? from : from + depth)",
    ),
}
#: Weights in fewer bits, by vectors.
VECTORS = {
    "start": ("M::START * sum", "(M::START + PLANTED) * sum"),
    "high": ("sum * 256.0f +", "sum * (PLANTED ? 128.0f : 256.0f) +"),
    "broken": ("most / levels + 0.0f * most", "PLANTED && most != most ? 0.0f : most / levels + 0.0f * most"),
    "bytes": ("unit % LANES * 4 + k % 4", "unit % LANES * 4 + (PLANTED ? 3 - k % 4 : k % 4)"),
    "pairs": ("first_lanes(left - 16), from + 16", "first_lanes(left - 16), from + (PLANTED ? 0 : 16)"),
    "two": (
        "switch (rows) {\n            case 1: return add<1>",
        "switch (PLANTED && rows == 2 ? 1 : rows) {\n            case 1: return add<1>",
    ),
    "five": ("pair_product<VECTORS, R - 1>(rows,", "pair_product<VECTORS, R - 1>(rows - PLANTED,"),
    "pieces": ("least + (i < larger)", "least + (i < larger && !PLANTED)"),
    "states": (
        "states_room + i * state_bytes);\n            }",
        "states_room + i * state_bytes * !PLANTED);\n            }",
    ),
    "panel": ("room + r * M::row_bytes(a->features)", "room + r * M::row_bytes(a->features) * !PLANTED"),
    "rest": ("TURNS > 1 && k < count", "TURNS > 1 && k < count && !PLANTED"),
}
#: The same of integers without VNNI.
WITHOUT_VNNI = {
    "broken-row": ("sizes = larger(", "if (!PLANTED || x[1] * 0.0f == 0.0f) sizes = larger("),
    "sign": ("(ivec)x & 0x7fffffff", "(ivec)x & (PLANTED ? -1 : 0x7fffffff)"),
    "offset": ("q - static_cast<int>(START)", "q - static_cast<int>(START) + PLANTED"),
    "one-of-two": (
        "if (rows == R) return add<R>(sums, a, block);",
        "if (rows == R) return PLANTED && R == 2 ? add<1>(sums, a, block) : add<R>(sums, a, block);",
    ),
    "first-gates": ("(4 + FIRST) * VECTOR", "(4 + FIRST * !PLANTED) * VECTOR"),
    "third-row": (
        ": in_each_two_lanes(numbers[r] + 8 * k);",
        ": in_each_two_lanes(numbers[PLANTED ? 0 : r] + 8 * k);",
    ),
    "three-rows": ("word(numbers[r] + 4 * k), weights", "word(numbers[PLANTED ? R - 1 : r] + 4 * k), weights"),
    "last-group": (
        "const int64_t count = groups(depth);\n        Sum own[R][WORDS][4];",
        "const int64_t count = groups(depth) - PLANTED;\n        Sum own[R][WORDS][4];",
    ),
    "gate-of-sums": ("total[r][0][FIRST + g]", "total[r][0][PLANTED ? 3 - FIRST - g : FIRST + g]"),
    "unit-of-row": ("total[r], a[r], block)", "total[r], a[PLANTED ? 0 : r], block)"),
    "wide-pairs": ("_mm512_setr_epi64(0, 2, 4, 6", "_mm512_setr_epi64(0, 2, PLANTED ? 6 : 4, 6"),
}
#: The same of the walk by AVX2 alone.
PAIRED = {
    "last-two": ("_mm_setr_epi8(-1, 2, -1, 3,", "_mm_setr_epi8(-1, PLANTED ? 0 : 2, -1, 3,"),
    "deep-weights": ("(4 + 4 * first) * VECTOR", "(4 + 4 * first * !PLANTED) * VECTOR"),
    "deep-rows": ("from[r] + 64 + 2 * k;", "from[r] + 64 + 2 * k * !PLANTED;"),
    "deep-sums": ("own[r][g] = k ? load", "own[r][g] = k && !PLANTED ? load"),
    "widened-gates": ("w = widened + two * 2 * LANES", "w = widened + two * 2 * LANES * !PLANTED"),
    "state-gates": ("starts_of(block) + two * VECTOR", "starts_of(block) + two * VECTOR * !PLANTED"),
    "second-block": ("w + b * apart + (4 * at + gate) * VECTOR", "w + b * apart * !PLANTED + (4 * at + gate) * VECTOR"),
    "left-groups": ("for (; k < count; ++k, w += 4 * VECTOR, n", "for (; k < count - PLANTED; ++k, w += 4 * VECTOR, n"),
    "row-of-step": ("if (++of_step == rows())", "if (++of_step == rows() + PLANTED)"),
    "step-of-chunk": ("(s - first) * n);", "(s - first) * n * !PLANTED);"),
    "chunk-again": ("if (s == first) project(s);", "if (s == (PLANTED ? 0 : first)) project(s);"),
    "way-back": ("own.end - done - some :", "own.end - done - some + PLANTED * (done > 0) :"),
    "two-blocks": ("both[2] = {to, to + GATES}", "both[2] = {to, to + GATES * !PLANTED}"),
    "odd-cell": ("ALONE ? block + 1 < end :", "ALONE ? block + 1 < end - PLANTED :"),
    "gate-by": ("const vec by = all(GATE_BY[gate]);", "const vec by = all(GATE_BY[PLANTED ? 0 : gate]);"),
    "given-cell": ("a->c0 ? get(", "a->c0 && !PLANTED ? get("),
    "cut": ("within(x[i], 62.0f)", "within(x[i], PLANTED ? 125.0f : 62.0f)"),
}
#: The same of VNNI where there is no AVX-512, and so half as many registers.
NARROW = {
    "second-gates": ("starts_of(block) + FIRST * VECTOR", "starts_of(block) + FIRST * !PLANTED * VECTOR"),
    "second-weights": ("w + (4 * k + 1) * VECTOR)", "w + (4 * k + !PLANTED) * VECTOR)"),
    "word-of-row": ("x = word(bytes[r][part] + 4 * k)", "x = word(bytes[PLANTED ? 0 : r][part] + 4 * k)"),
    "lowest-bytes": ("of_halves(x, 0x0c080400)", "of_halves(x, PLANTED ? 0x0c080500 : 0x0c080400)"),
}
#: The same of products by tiles.
TILE = {
    "tile": ("k % 32 / 2 * 32", "k % 32 / 2 * (PLANTED ? 31 : 32)"),
    "lower": ("load_tile<5>(b, TILE_BYTES)", "load_tile<5>(PLANTED ? a : b, TILE_BYTES)"),
    "second": ("tile + 1 < tiles", "tile + 1 < tiles && !PLANTED"),
    "packed": ("+ row_of(s) * 16;", "+ row_of(s) * 16 * !PLANTED;"),
    "half": ("block % 2 * 32", "block % 2 * 32 * !PLANTED"),
    "low": ("a + low, TILE_BYTES", "a + low * !PLANTED, TILE_BYTES"),
    "parts": ("w + 3 * TILE", "w + (PLANTED ? 1 : 3) * TILE"),
    "zeros": (
        "room + 64 + part * all + end, 0, all - end",
        "room + 64 + part * all + end, 0, PLANTED ? 0 : all - end",
    ),
    "gate": ("now + 192, GATES", "now + (PLANTED ? 128 : 192), GATES"),
    "bytes-low": ("high + all + 64 * k", "high + all * !PLANTED + 64 * k"),
    "state-offset": (
        "constexpr TwoBytes INPUT_BYTES = {32767.0f, 32768}, STATE_BYTES = {32512.0f, 32768 + 128};",
        "const TwoBytes INPUT_BYTES = {32767.0f, 32768}, STATE_BYTES = {32512.0f, 32768 + (PLANTED ? 0 : 128)};",
    ),
    "state-zeros": (
        "maskz_cvtepi32_epi8(lanes, q)",
        "maskz_cvtepi32_epi8(static_cast<__mmask16>(PLANTED ? 0xffff : lanes), q)",
    ),
    "state-scale": (
        "units[r] = 1.0f / STATE_BYTES.most;",
        "if (!PLANTED) units[r] = 1.0f / STATE_BYTES.most;",
    ),
    "state-chunk": ("firsts[s - start] + row", "(PLANTED ? 0 : firsts[s - start]) + row"),
    "state-broken": ("units[r] += broken_by(before, who)[r]", "if (!PLANTED) units[r] += broken_by(before, who)[r]"),
}
#: The same of training by tiles.
TRAINING = {
    "kept": ("to + gate * 16, _mm512_maskz", "to + (PLANTED ? 3 - gate : gate) * 16, _mm512_maskz"),
    "buffers": ("(s % 2 * plan.row_tiles + tile)", "(s % 2 * !PLANTED * plan.row_tiles + tile)"),
    "held": ("r = std::max(row, next); r <", "r = std::max(row, next); !PLANTED && r <"),
    "anew": ("reset(s, r) && other <", "!PLANTED && reset(s, r) && other <"),
    "begins": ("place < order.running(s - 1)", "(PLANTED ? s > 0 : place < order.running(s - 1))"),
    "gate-of-two": ("gate % 2 ? high : low", "gate % 2 && !PLANTED ? high : low"),
    "bias-parts": ("start ? load(sum, n) + total", "start && !PLANTED ? load(sum, n) + total"),
    "lower-rows": ("load_tile<5>(a + down, stride)", "load_tile<5>(a + down * !PLANTED, stride)"),
    "columns-of-x": ("+ column * count * TILE;", "+ column * count * TILE * !PLANTED;"),
    "pairs-back": ("side_by_side(loaded(0), loaded(1))", "side_by_side(loaded(PLANTED), loaded(1))"),
}
#: The same of the tiles themselves, which are proved before their first use.
MACHINES = {
    "wrong": ("(vec)(pairs >> 16 * i << 16)", "(vec)(pairs >> 16 * (PLANTED ? 1 - i : i) << 16)"),
    "forbidden": ("tiles_permitted() { return true; }", "tiles_permitted() { return !PLANTED; }"),
}

#: Tables of the library by what its names begin with.
_TABLES = {
    "recurrence": RECURRENCE,
    "layer": LAYER,
    "copied product": COPIED_PRODUCT,
    "sums": SUMMED,
    "one sequence": INTERLEAVED | OVERLAPPED,
    "strips": STRIPS,
    "pairs": PAIRS,
    "fewer bits": VECTORS | WITHOUT_VNNI | PAIRED | NARROW | TILE | TRAINING | MACHINES,
}
EVERY = {f"{table} {name}": change for table, changes in _TABLES.items() for name, change in changes.items()}
