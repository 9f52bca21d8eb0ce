"""Recommendations in words, for the terminal and for the page: one fact per line, names between backticks."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence

from bench import units
from bench.analysis.intervals import Interval
from bench.plan import own_model
from bench.recommend.answer import Advice, Recommendation, Rival, recommend
from bench.recommend.mix import MixAnswer, mixes
from bench.recommend.question import BEST, EQUIVALENT, WORSE, Objective, Question
from bench.records.reader import RecordedRun

#: A probability is shown as at most this: 1000 resamples cannot show more.
MOST_SURE = 0.999
#: Memory differences below this are not worth a word, bytes.
LITTLE_MEMORY = 1e6
#: Variants that have all the same reason are named one by one up to this number.
MANY = 6
#: From so many calls on, a number of them is shown with two digits.
FEW_CALLS = 100


def sentences(
    run: RecordedRun, question: Question | None = None, needs: Mapping[str, Sequence[str]] | None = None
) -> tuple[tuple[str, str], ...]:
    """The recommendations of a run: of each group, and of each mix of input sets, its title and its sentences.

    Raises:
        UsageError: see `recommend`.
    """
    asked = question or Question()
    return (
        *((found.title, group_text(found, run)) for found in recommend(run, asked, needs)),
        *((found.title, mix_text(found)) for found in mixes(run, asked)),
    )


def group_text(answer: Advice, run: RecordedRun) -> str:
    """The recommendation for a group, one fact per line."""
    if answer.verdict is Recommendation.UNCLEAR:
        return unclear_text(answer, run)
    if answer.verdict is Recommendation.NONE:
        bounds = " and ".join(answer.question.bounds)
        nearest = f"`{answer.variant}`: {'; '.join(answer.misses)}"
        return f"No variant is within the bounds ({bounds}). The nearest is {nearest}."
    parts = [_opening(answer), _next(answer), _alike(answer), _cost(answer), _left_out(answer)]
    parts += [_sentence(note) for note in answer.notes]
    parts += [_share(answer, run)]
    return "\n".join(filter(None, parts))


def unclear_text(answer: Advice, run: RecordedRun) -> str:
    """Lines that say what is undecided, between which variants, why, and what would decide it."""
    names = [answer.variant] if answer.variant else []
    # In the order of their costs, as the rivals are.
    names += [rival.variant for rival in answer.rivals if rival.variant in answer.alike]
    best = BEST[answer.question.objective]
    chances = {rival.variant: rival.probability for rival in answer.rivals}
    possible = [name for name in names if not _hardly(chances.get(name))]
    if not names:
        lines = [f"Unclear: {'; '.join(answer.notes) or 'nothing can be rated'}."]
    elif len(possible) == 1:
        lines = [f"Unclear: `{possible[0]}` seems {best}, but a doubt remains."]
    else:
        lines = [f"Unclear: {', '.join(f'`{name}`' for name in possible[:-1])} or `{possible[-1]}` seems {best}."]
    lines += [f"- {_contender(answer, name)}" for name in names]
    if answer.variant and answer.notes:
        # Some name the variant that they are about, the others are about the first.
        own = f"Doubt about `{answer.variant}`"
        lines += [f"- {'Doubt' if note.startswith('`') else own}: {note}." for note in answer.notes]
    if answer.left_out and (answer.question.bounds or not names):
        lines += [f"- Left out: {each}." for each in _together(answer.left_out)]
    if len(names) > 1 and answer.cheapest is not None:
        why = _why_cheap(answer, ": ")
        lines.append(f"- In the meantime: `{answer.cheapest}` is the cheapest of them to own{why}.")
    lines += [f"- {share}" for share in [_share(answer, run)] if share]
    return "\n".join([*lines, *_to_decide(answer, run)])


def _contender(answer: Advice, name: str) -> str:
    """Return "`name`: 51 % sure, 1.51 ms."; for one that is not first, its distance from the first."""
    rival = next((found for found in answer.rivals if found.variant == name), None)
    calls = answer.question.calls
    if rival is None:
        over = "" if calls is None else f", with the start spread over {calls:g} calls"
        parts = [sure(answer.probability), f"{answer.value}{over}"]
    else:
        apart = margin(rival.excess, answer.question.objective).removeprefix("is ")
        best = BEST[answer.question.objective].removeprefix("to be ")
        near = f"hardly {best}, but perhaps within {units.share(EQUIVALENT)} of it"
        parts = [near if _hardly(rival.probability) else sure(rival.probability), apart, _memory(rival)]
    return f"`{name}`: {', '.join(filter(None, parts))}."


def _hardly(probability: float | None) -> bool:
    """Return True for a probability that is shown as 0 %: its variant may be as good as the best, but is not it."""
    return probability is not None and round(100 * probability) == 0


def _to_decide(answer: Advice, run: RecordedRun) -> list[str]:
    """Lines on what would make an unclear answer clear, and its command on a line of its own."""
    if answer.clearer is not None:
        what, command = answer.clearer.text, answer.clearer.command(run.path)
        purpose = answer.clearer.purpose
    elif answer.variant is not None and answer.question.objective is not Objective.LOAD:
        workload, mode, *_ = answer.key
        what, purpose = "measure it again, with the command that this prints last", "decide"
        case = f"{workload}/{mode}/{answer.variant}"
        command = f"python -m bench show {shlex.quote(str(run.path))} {shlex.quote(case)}"
    else:
        return []
    return [f"- To {purpose}, {what}{':' if command else '.'}", *([f"  {command}"] if command else [])]


def _share(answer: Advice, run: RecordedRun) -> str:
    """The share of a call that the LSTMs of the user's own model take; empty for other models."""
    share = own_model.share_of(run.environment, *answer.key[:2])
    return "" if share is None else f"Y{own_model.share_text(share)[1:]}."


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def mix_text(answer: MixAnswer) -> str:
    """The recommendation for a mix, one fact per line."""
    sets = ", ".join(f"{name} {units.share(weight)}" for name, weight in answer.sets.items())
    if answer.variant is None or answer.regrets is None:
        return f"Unclear: {'; '.join(answer.notes)} ({sets})."
    regret = answer.regrets[answer.variant]
    what = "time" if answer.percentile == "p50" else answer.percentile
    lost = f"at worst it is {_percent(regret.share)} slower than `{regret.best}`, in {regret.input_set}"
    expected = f"{units.seconds(answer.expected_s)} a call, {sure(answer.probability)}"
    lost = lost if regret.share > 0 else "it is the fastest in every set"
    lines = [f"Ship `{answer.variant}`: shortest expected {what} over the mix ({expected}); {lost}. Mix: {sets}."]
    if answer.unclear:
        lines = [
            f"Unclear: `{answer.variant}` seems to have the shortest expected {what} over the mix ({sets}).",
            f"- `{answer.variant}`: {expected}; {lost}.",
            *(f"- Doubt: {note}." for note in answer.notes),
        ]
    steady = min(answer.regrets, key=lambda name: answer.regrets[name].share if answer.regrets else 0.0)
    if steady != answer.variant:
        worst = _percent(answer.regrets[steady].share)
        regretted = f"`{steady}` loses least in its worst set: {worst} to the fastest there."
        lines.append(f"- {regretted}" if answer.unclear else regretted)
    if answer.unclear:
        lines.append("- To decide, measure the sets longer, as the answers for each of them say.")
    return "\n".join(lines)


def sure(probability: float | None) -> str:
    """`94 % sure`; at the ends only what the resamples can show."""
    if probability is None:
        return ""
    if probability >= MOST_SURE:
        return "more than 99.9 % sure"
    digits = 1 if probability > 0.99 else 0  # noqa: PLR2004
    return f"{100 * probability:.{digits}f} % sure"


def _opening(answer: Advice) -> str:
    best = BEST[answer.question.objective]
    ship = f"Ship `{answer.variant}`"
    calls = answer.question.calls
    over = "" if calls is None else f", with the start spread over {calls:g} calls"
    if not answer.rivals:
        only = "the only one within the bounds" if answer.left_out else "the only one that ran"
        if answer.question.objective is Objective.LOAD and answer.left_out:
            only = "the only one that has a known load and is within the bounds"
        return f"{ship} ({answer.value}{over}): {only}."
    if answer.probability is None:
        return f"{ship}: measured {best}, {answer.value}."
    near = ""
    if answer.near_best is not None and round(answer.near_best, 2) > round(answer.probability, 2):
        near = f", {sure(answer.near_best)} to be within {units.share(EQUIVALENT)} of the best"
    return f"{ship}: {sure(answer.probability)} {best} ({answer.value}{over}){near}."


def _next(answer: Advice) -> str:
    """The runner-up, and how it differs from the first."""
    if not answer.rivals:
        return ""
    rival = answer.rivals[0]
    how = " and ".join(filter(None, (margin(rival.excess, answer.question.objective), _memory(rival))))
    return f"Next: `{rival.variant}`, which {how}."


def margin(excess: Interval, objective: Objective) -> str:
    """`is 5 % slower [3.6 %, 6.3 %]`, and from a factor of 2 on `takes 2.59 times [2.47, 2.72] as long`."""
    if objective is Objective.LOAD:
        return _less(excess)
    worse, multiple = WORSE[objective]
    if not units.estimated(excess.low, excess.high):
        return f"is {worse} ({units.NO_ESTIMATE} of how much)"
    alone = excess.low == excess.high
    if excess.value >= 2:  # noqa: PLR2004
        value, low, high = (units.ratio(found).removesuffix("x") for found in (excess.value, excess.low, excess.high))
        return multiple.format(f"{value} times" + ("" if alone else f" [{low}, {high}]"))
    ends = "" if alone else f" [{_percent(excess.low - 1)}, {_percent(excess.high - 1)}]"
    return f"is {_percent(excess.value - 1)} {worse}{ends}"


def _less(excess: Interval) -> str:
    """`sustains 17 % less [5 %, 30 %]`, of a quotient of loads."""
    if not units.estimated(excess.low, excess.high):
        return f"sustains less ({units.NO_ESTIMATE} of how much)"
    value, low, high = (_percent(1 - 1 / end) for end in (excess.value, excess.low, excess.high))
    return f"sustains {value} less" + ("" if excess.low == excess.high else f" [{low}, {high}]")


def _percent(share: float) -> str:
    """`0.034` as `3.4 %`."""
    return f"{100 * share:.2g} %" if abs(share) < 0.995 else f"{100 * share:.0f} %"  # noqa: PLR2004


def _memory(rival: Rival) -> str:
    if rival.memory_bytes is None or abs(rival.memory_bytes) < LITTLE_MEMORY:
        return ""
    return f"takes {units.megabytes(abs(rival.memory_bytes))} {'more' if rival.memory_bytes > 0 else 'less'} memory"


def _alike(answer: Advice) -> str:
    """The variants that are as good as the first, and the cheapest of them to own."""
    others = [name for name in answer.alike if name != answer.variant]
    if not others:
        return ""
    names = ", ".join(f"`{name}`" for name in others)
    text = f"As good within {units.share(EQUIVALENT)}, as far as the rounds show: {names}."
    if answer.cheapest in {None, answer.variant}:
        return f"{text} `{answer.variant}` is the cheapest of them to own."
    return f"{text} Cheapest to own: `{answer.cheapest}`{_why_cheap(answer, '; ')}."


def _why_cheap(answer: Advice, joint: str) -> str:
    """Compare what the cheapest variant costs with the cost of the first; empty if it is the first."""
    own, best = answer.commits[str(answer.cheapest)], answer.commits[str(answer.variant)]
    found = []
    dropped = [need for need in best.needs or () if need not in (own.needs or ())]
    if own.needs is not None and dropped:
        found.append(f"does not need {' or '.join(need.partition(' (')[0] for need in dropped)}")
    if own.memory_bytes is not None and best.memory_bytes is not None:
        saved = best.memory_bytes - own.memory_bytes
        if saved > LITTLE_MEMORY:
            found.append(f"takes {units.megabytes(saved)} less memory")
    if own.start_s is not None and best.start_s is not None and own.start_s < best.start_s / 1.2:
        found.append(f"starts {units.seconds(best.start_s - own.start_s)} sooner")
    listed = " and ".join(filter(None, [", ".join(found[:-1]), *found[-1:]]))
    return f"{joint}compared with `{answer.variant}`, it {listed}" if found else ""


def _cost(answer: Advice) -> str:
    found = answer.facts.cost() if answer.facts else ()
    text = f"Cost: {'; '.join(found)}." if found else ""
    if answer.break_even is not None:
        even = answer.break_even
        calls, later = _calls(even.calls), _calls(even.later_calls or 0.0)
        plan = answer.question.calls
        planned = "" if plan is None else f" ({plan:g} are planned)"
        again = "" if even.later_calls is None else f", and a later one, which finds the kernel compiled, after {later}"
        text += (
            f" Compared with `{even.against}`, its first start pays off after {calls} call{'s' * (calls != '1')}"
            f"{planned}{again}."
        )
    return text


def _calls(count: float) -> str:
    """A number of calls, with as many digits as the times that it comes from have."""
    whole = math.ceil(max(1.0, count))
    return f"{whole}" if whole < FEW_CALLS else f"about {float(f'{whole:.2g}'):,.0f}"


def _left_out(answer: Advice) -> str:
    if not answer.question.bounds or not answer.left_out:
        return ""
    return f"Left out: {'; '.join(_together(answer.left_out))}."


def _together(reasons: Mapping[str, str]) -> list[str]:
    """Names with the same reason in one place."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        names.setdefault(reason, []).append(f"`{name}`")
    if len(names) == 1 and len(reasons) > MANY:
        return [f"all {len(reasons)} variants ({reason})" for reason in names]
    return [f"{', '.join(found)} ({reason})" for reason, found in names.items()]
