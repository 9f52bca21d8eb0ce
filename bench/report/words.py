"""The answer of a run in sentences: which variant is fastest, by how much, and whether that is sure.

Names are in backticks, which the page turns into code. A sentence never claims more than the intervals allow: variants
that cannot be told apart share the first place, and doubtful samples are mentioned.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from bench import units
from bench.analysis.racing import MARGIN
from bench.analysis.run_summary import RankedGroup, ReportedRun, decided, doubts, versus_best
from bench.plan.cases import REFERENCE
from bench.recommend.answer import Advice, Recommendation, recommend
from bench.recommend.mix import mixes
from bench.recommend.question import Question
from bench.recommend.words import group_text, mix_text, sure
from bench.records.reader import Beside
from bench.records.schema import Record, Status
from bench.run.second_instrument import Findings

#: Two instruments agree where their medians are no further apart than this factor.
AGREE = 1.10
OVERLAP = "The run does not show which of them is faster."
UNDECIDED = "No clear winner: "


@dataclass(frozen=True)
class Answer:
    """One sentence or a few, and the group or sweep they are about.

    Attributes:
        where: the group or sweep.
        text: which is fastest.
        advice: which to ship.
        verdict: of the advice, as `bench.recommend.answer.Verdict`; empty without one.
    """

    where: str
    text: str
    advice: str = ""
    verdict: str = ""


def lead(run: ReportedRun) -> str:
    """Describe how many cases the answers rest on."""
    total = len(run.records)
    refused = Counter(record.status.value for record in run.records if record.status is not Status.OK)
    if not refused:
        return f"{'The one case' if total == 1 else f'All {total} cases'} ran and passed the parity gate."
    listed = ", ".join(f"{number} {status}" for status, number in refused.most_common())
    return f"Of {total} cases, {total - refused.total()} ran and passed the parity gate ({listed})."


def answers(groups: Iterable[RankedGroup]) -> tuple[Answer, ...]:
    """One answer per group; the groups of a sweep share one."""
    found: list[Answer] = []
    sweeps: dict[object, list[RankedGroup]] = {}
    for group in groups:
        if group.sweep_axis:
            sweeps.setdefault(group.sweep_key, []).append(group)
        else:
            found.append(Answer(group.title, group_answer(group)))
    return (*found, *(sweep_answer(members) for members in sweeps.values()))


def advised(run: ReportedRun) -> tuple[Answer, ...]:
    """The answers of a run, each group's with what is recommended for it, and one per mix of input sets."""
    single = {g.key: g.title for g in run.groups if not g.sweep_axis and g.records}
    advice = {single[a.key]: a for a in recommend(run, Question()) if a.key in single}
    found = [
        with_advice(answer, advice[answer.where], run) if answer.where in advice else answer
        for answer in answers(run.groups)
    ]
    mixed = mixes(run, Question())
    return (*found, *(Answer(m.title, mix_text(m), verdict="unclear" if m.unclear else "recommended") for m in mixed))


def with_advice(answer: Answer, advice: Advice, run: ReportedRun) -> Answer:
    """An answer with what is recommended; where speedups leave open which is first, ratios inside rounds may decide.

    A leader with a doubtful figure that is recommended all the same is then not called undecided.
    """
    text = answer.text
    if advice.verdict is Recommendation.RECOMMENDED and advice.probability is not None:
        decided = f"Round by round, `{advice.variant}` is {sure(advice.probability)} to be first."
        if OVERLAP in text:
            text = text.replace(OVERLAP, decided)
        elif text.startswith(f"{UNDECIDED}`{advice.variant}` leads"):
            text = f"{text.removeprefix(UNDECIDED)} {decided}"
    return replace(answer, text=text, advice=group_text(advice, run), verdict=advice.verdict.value)


def machine(run: ReportedRun) -> str:
    """Describe machine and software of the run in one line; empty if the run does not say."""
    facts, software, git = (run.environment.get(name) or {} for name in ("machine", "software", "git"))
    threads = sorted({record.threads for record in run.records})
    cores = facts.get("cores_logical")
    devices = {record.device for record in run.records}
    named = [
        facts.get("processor") and f"{facts['processor']}{f', {cores} cores' if cores else ''}",
        software.get("gpu") if "cuda" in devices else None,
        f"{listed([str(count) for count in threads])} thread{'s' if threads != [1] else ''}",
        f"torch {software['torch']}" if software.get("torch") else None,
        software.get("cpu_capability"),
        f"commit {str(git['commit'])[:10]}" if git.get("commit") else None,
    ]
    return ", ".join(str(part) for part in named if part)


def second_opinion(run: ReportedRun, found: Findings) -> str:
    """Say how far the second instrument agrees; empty if it measured nothing."""
    pairs = list(second_ratios(run.groups, found))
    if not pairs:
        return ""
    near = sum(1 / AGREE <= ratio <= AGREE for ratio in pairs)
    if near == len(pairs):
        return f"A second instrument agrees within {units.share(AGREE - 1)} on all {near} cases that it timed."
    off = len(pairs) - near
    return (
        f"A second instrument differs by more than {units.share(AGREE - 1)} on {off} of the {len(pairs)} cases that it "
        "timed; it times one variant after the other, so a machine that drifts shows up in it."
    )


def second_ratios(groups: Iterable[RankedGroup], found: Findings) -> Iterable[float]:
    """Median of the second instrument over ours, of every case that both have."""
    for record in (record for group in groups for record in group.ok):
        figure = found.figures.get(record.key)
        if figure is not None and record.latency_p50_s:
            yield figure.median_s / record.latency_p50_s


def group_answer(group: RankedGroup) -> str:
    """The fastest variant of one group, or those that cannot be told apart."""
    leaders = group.leaders
    if not leaders:
        return "No variant ran and passed the gate, so there is nothing to compare."
    reference = next((record for record in group.ok if record.variant == REFERENCE), None)
    marked = len(leaders) == 1 and group.winner is None
    sentences = [marked_leader(group) if marked else opening(group) if len(leaders) == 1 else no_winner(leaders)]
    others = [record for record in group.ok if record not in leaders and record.speedup is not None]
    if others and leaders[0].speedup is not None:
        sentences.append(the_next(leaders, others[0]))
    if reference and leaders[0].precision != reference.precision:
        sentences.append(same_precision(group, reference))
    doubtful = [record for record in leaders if doubts(record)]
    if len(leaders) > 1 and doubtful:
        sentences.append(f"Doubtful: {listed([f'`{record.variant}`' for record in doubtful])}.")
    return " ".join(filter(None, sentences))


def marked_leader(group: RankedGroup) -> str:
    """The only variant in the first place, where its figure is doubtful: no winner, then."""
    best = group.leaders[0]
    why = ", and ".join(doubts(best))
    if best.variant == REFERENCE and len(group.ok) == 1:
        return f"Only the `reference` ran. Its figure is doubtful: {why}."
    but = why if best.reason else f"this figure is doubtful: {why}"
    return f"{UNDECIDED}`{best.variant}` leads{_with_figure(best)}, but {but}."


def opening(group: RankedGroup) -> str:
    """Name the fastest variant, which is certain."""
    best = group.leaders[0]
    if best.variant == REFERENCE:
        alone = len(group.ok) == 1
        return "Only the `reference` ran." if alone else "Nothing is faster than the `reference`."
    if best.speedup is None:
        return f"`{best.variant}` is fastest by median time; there is no reference to compare with."
    if not _estimated(best):
        return f"`{best.variant}` is fastest; there is no estimate of its speedup.{by_how_much([best])}"
    if best.speedup <= 1:
        return f"`{best.variant}` is the best that ran, at {figure(best)} the speed of the reference."
    return f"`{best.variant}` is fastest, {figure(best)} as fast as the reference.{by_how_much([best])}"


def no_winner(leaders: Sequence[Record]) -> str:
    """The variants that share the first place: equal, or not told apart by the run."""
    named = [f"`{record.variant}`{_in_brackets(record)}" for record in leaders]
    if all(record.standing in {"best", "equal"} for record in leaders):
        first = "lead" if any(map(doubts, leaders)) else "are the fastest"
        return f"{listed(named)} {first}, and equal within {100 * MARGIN:.0f} %."
    return f"{UNDECIDED}{listed(named, 'or')}. {OVERLAP}"


def _estimated(record: Record) -> bool:
    return record.speedup is not None and units.estimated(record.speedup_lo, record.speedup_hi)


def _with_figure(record: Record) -> str:
    """Return ` with 2.00x [1.94, 2.06]`; empty for the reference and where the speedup has no estimate."""
    return f" with {figure(record)}" if record.variant != REFERENCE and _estimated(record) else ""


def _in_brackets(record: Record) -> str:
    return "" if record.variant == REFERENCE or record.speedup is None else f" ({figure(record)})"


def the_next(leaders: Sequence[Record], runner_up: Record) -> str:
    """The first variant that is certainly slower than the best, as far as the best one's own rounds are certain."""
    if runner_up.standing == "slower":
        known = runner_up.vs_best is not None and units.estimated(runner_up.vs_best_lo, runner_up.vs_best_hi)
        by = f": round by round {versus_best(runner_up)} as fast as `{leaders[0].variant}`" if known else ""
        slower = "certainly slower" if all(map(decided, leaders)) else "slower in these rounds"
        return f"The next is `{runner_up.variant}`{_with_figure(runner_up)}, {slower}{by}."
    if runner_up.variant == REFERENCE:
        # The reference is the measure of all speedups and has no interval of its own.
        whose = "its interval does" if len(leaders) == 1 else "the interval of the first does"
        return f"The next is the `reference`: {whose} not reach 1."
    whom = "the intervals" if len(leaders) == 1 else "its interval and that of the first"
    return f"The next is `{runner_up.variant}`{_with_figure(runner_up)}: {whom} do not overlap."


def same_precision(group: RankedGroup, reference: Record) -> str:
    """The fastest that computes in the reference's precision, since a narrower type is not the same work."""
    alike = [record for record in group.ok if record.precision == reference.precision and record.speedup is not None]
    if not alike or alike[0].variant == REFERENCE:
        return f"In {reference.precision}, {_against_reference(alike, reference)}."
    best = alike[0]
    rivals = [record for record in alike[1:] if not _slower(record, best)]
    if not rivals and decided(best):
        return f"In {reference.precision}, `{best.variant}` is fastest{_with_figure(best)}.{by_how_much([best])}"
    if doubts(best):
        return f"In {reference.precision}, `{best.variant}` leads{_with_figure(best)}, but this is doubtful."
    named = [f"`{record.variant}`{_in_brackets(record)}" for record in (best, *rivals)]
    return f"In {reference.precision}, the fastest is {listed(named, 'or')}: the run does not show which."


def _against_reference(alike: Sequence[Record], reference: Record) -> str:
    """Compare the reference with variants of its precision, none of which has a larger speedup with an estimate."""
    others = [record for record in alike if record.variant != REFERENCE]
    faster = [f"`{record.variant}`" for record in others if _slower(reference, record)]
    if faster:
        are = "is" if len(faster) == 1 else "are"
        return f"{listed(faster)} {are} faster than the `reference`, with no estimate of how much"
    known = all(_slower(record, reference) for record in others)
    return f"nothing {'is' if known else 'was shown to be'} faster than the `reference`"


def _slower(record: Record, best: Record) -> bool:
    """Return whether a record is certainly slower than another: by the ratios of both to the fastest, inside rounds.

    Runs of earlier releases have no such ratios: there the intervals of the speedups decide, unless one is too wide.
    """
    if best.vs_best_lo is not None and record.vs_best_hi is not None:
        return record.vs_best_hi < best.vs_best_lo
    if best.vs_best_lo is not None or best.interval_wide or best.speedup_lo is None:
        return False
    highest = 1.0 if record.variant == REFERENCE else record.speedup_hi
    return highest is not None and highest < best.speedup_lo


def by_how_much(records: Sequence[Record]) -> str:
    """Say why speedups of variants that are certainly fastest are imprecise, and where in a sweep; empty if none is."""
    doubtful = sorted((record for record in records if doubts(record)), key=lambda record: record.sweep_value or 0)
    if not doubtful:
        return ""
    values = [f"{record.sweep_value}" for record in doubtful if record.sweep_axis]
    why = "; ".join(dict.fromkeys(", and ".join(doubts(record)) for record in doubtful))
    return f" The exact speedup is doubtful{f' at {listed(values)}' if values else ''}: {why}."


def sweep_answer(members: list[RankedGroup]) -> Answer:
    """The fastest variant at each value of a sweep, values with the same one together."""
    where = members[0].sweep_title
    found: dict[tuple[tuple[str, ...], bool], list[Record]] = {}
    for group in sorted(members, key=lambda group: group.records[0].sweep_value or 0):
        if group.leaders:
            variants = tuple(f"`{record.variant}`" for record in group.leaders)
            found.setdefault((variants, group.winner is not None), []).append(group.leaders[0])
    if not found:
        return Answer(where, "No variant ran and passed the gate, so there is nothing to compare.")
    winners: list[str] = []
    unclear: list[str] = []
    marked: list[str] = []
    imprecise: list[Record] = []
    for (variants, clear), records in found.items():
        names, values = listed(list(variants), "or"), listed([f"{record.sweep_value}" for record in records])
        if len(variants) > 1:
            unclear.append(f"{names} at {values}")
        elif not clear:
            why = "; ".join(dict.fromkeys(doubt for record in records for doubt in doubts(record)))
            marked.append(f"{names} leads at {values}, but this is doubtful: {why}.")
        else:
            winners.append(f"{names} at {values}{span(records) if records[0].variant != REFERENCE else ''}")
            imprecise += [record for record in records if record.variant != REFERENCE]
    sentences = [f"Fastest is {'; '.join(winners)}.{by_how_much(imprecise)}"] if winners else []
    sentences += [f"{UNDECIDED}{'; '.join(unclear)}."] if unclear else []
    sentences += marked
    if any(doubts(record) for (variants, _), records in found.items() if len(variants) > 1 for record in records):
        sentences.append("Some of these figures are doubtful.")
    return Answer(where, " ".join(sentences))


def span(records: list[Record]) -> str:
    """Smallest and largest speedup of `records`, of those that have an estimate."""
    speedups = [record.speedup for record in records if record.speedup is not None and _estimated(record)]
    if not speedups:
        return ""
    lo, hi = units.ratio(min(speedups)), units.ratio(max(speedups))
    return f" ({lo})" if lo == hi else f" ({lo} to {hi})"


def figure(record: Record) -> str:
    """Speedup with its interval."""
    return units.ratio_interval(record.speedup, record.speedup_lo, record.speedup_hi)


def listed(words: list[str], last: str = "and") -> str:
    """`1, 2 and 3`."""
    return f" {last} ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def beside(found: Beside, cores: int | None) -> str:
    """Describe in a sentence what else used the machine during the rounds of a run."""
    of = "" if cores is None else f" of {cores}"
    used = (
        f"other programs used {found.others:.2f}{of} cores on average while rounds were timed, at most {found.most:.2f}"
    )
    if found.quiet:
        return f"the machine was quiet: {used}"
    far = f" ({found.far} only because the host moved the cores apart)" if found.far else ""
    return (
        f"{found.disturbed} of {found.rounds} rounds were disturbed{far} and are left out wherever enough others "
        f"remain (rounds.csv.gz has the reason for each); {used}"
    )
