"""The stages of a day, the most valuable first, as data: what each runs, for how long, and what it needs.

Commands are words with placeholders: `{package}` is this package, `{folder}` the stage's own folder, `{work}` the
folder of all stages, `{tables}` that of measured tables, `{seconds}` how long the command may hand out work.
"""

from __future__ import annotations

from dataclasses import dataclass

PARTS = (1, 2)
#: Seconds of each part where no other time is given.
PART_S = {1: 270.0, 2: 400.0}


@dataclass(frozen=True)
class DayStage:
    """A stage of the day.

    Attributes:
        name: of the stage and its folder.
        part: 1 or 2.
        asks: the question that it answers, for people.
        command: words after the interpreter.
        limit_s: it is killed after so long.
        least_s: it is not begun with less time than this left.
        closing_s: time that the command takes after `{seconds}`, until the last child answered and all is written.
        needs: stages that must not have hung, crashed or failed before it.
        program: command that the interpreter runs under; the stage is unavailable where it is not installed.
        suite: whether it needs the benchmark suite, which a checkout has and an installed package has not.
        resumed: command when an earlier attempt left a run in `{folder}/run`; empty where there is none.
    """

    name: str
    part: int
    asks: str
    command: tuple[str, ...]
    limit_s: float
    least_s: float = 15.0
    closing_s: float = 20.0
    needs: tuple[str, ...] = ()
    program: tuple[str, ...] = ()
    suite: bool = False
    resumed: tuple[str, ...] = ()


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


def _suite(name: str, options: str, limit_s: float, least_s: float, *, asks: str, needs: tuple[str, ...]) -> DayStage:
    """A run of the benchmark suite, in part 2, that a second attempt continues."""
    return DayStage(
        name, 2, asks, _words(f"-m bench run {options} --out {{folder}}/run --time-limit {{seconds}} --quiet"), limit_s,
        least_s, closing_s=30.0, needs=needs, suite=True,
        resumed=_words("-m bench run --resume {folder}/run --time-limit {seconds} --quiet"),
    )  # fmt: skip


def _against(name: str, run: str, variant: str, needs: tuple[str, ...]) -> DayStage:
    """The speedups of a run over one variant, with intervals."""
    return DayStage(
        name, 2, f"how much faster than {variant}?",
        _words(f"-m bench show {{work}}/{run}/run --against {variant}"), 20.0, 5.0, needs=needs, suite=True,
    )  # fmt: skip


_MACHINE, _MACHINE_2 = ("machine",), ("machine-2",)
_FACTS = _words("-m {package}.tools.gpu_day.facts machine --folder {folder}")
_CHECK = "-m {package} check --time-limit {seconds} --jobs 8 --timeout 25 --runs 60 --most 3 --out {folder}"
_TUNE = "-m {package} tune --most 4 --timeout 20 --time-limit {seconds}"

#: The day on a GPU. Part 1 fits 270 s, part 2 400 s; what stands last in part 2 is begun only when hours are given.
DAY = (
    DayStage("machine", 1, "what GPU, driver, clocks and versions; does what the kernels rely on work?", _FACTS, 40.0),
    DayStage("exchange", 1, "is the exchange between programs right at H 768 and 1024, and how fast?",
          _words("-m {package}.tools.gpu_day.exchange --folder {folder} --timeout 25 --time-limit {seconds}"), 85.0,
          closing_s=25.0, needs=_MACHINE),
    DayStage("cudnn-names", 1, "which kernels does cuDNN run at which shape?",
          _words("-m {package}.tools.gpu_day.facts names --folder {folder}"), 25.0, needs=_MACHINE),
    DayStage("check-persistent", 1, "is the persistent kernel right: random shapes, races, streams, threads, graphs?",
          _words(f"{_CHECK} --kernel persistent"), 60.0, 45.0, closing_s=25.0, needs=_MACHINE),
    DayStage("tune-short", 1, "which kernel is fastest in float16?",
          _words(f"{_TUNE} --type float16"), 90.0, 50.0, closing_s=35.0, needs=_MACHINE),
    DayStage("machine-2", 2, "the machine of the second part", _FACTS, 35.0),
    _suite("suite", "--suite short-gpu", 290.0, 90.0,
           asks="are our kernels faster than cuDNN at its fairest, in inference and training?", needs=_MACHINE_2),
    _against("ratios", "suite", "cudnn-fair", ("suite",)),
    DayStage("check-others", 2, "are the other kernels right?",
          _words(f"{_CHECK} --kernel cell --kernel sequence"), 60.0, 45.0, closing_s=25.0, needs=_MACHINE_2),
    DayStage("own-kernels", 2, "what do our calls run besides the recurrence, and is cuDNN as precise as ATen?",
          _words("-m {package}.tools.gpu_day.facts own --folder {folder}"), 60.0, needs=_MACHINE_2),
    DayStage("tune-types", 2, "which kernel is fastest in the other types?",
          # Float16 has been begun; where cuDNN is slowest is bfloat16.
          _words(f"{_TUNE} --type bfloat16 --type float16 --type tf32 --type float32"), 90.0, 50.0, closing_s=35.0,
          needs=_MACHINE_2),
    DayStage("sanitize", 2, "does a kernel touch memory that is not its own?",
          _words("-m {package} check --sanitize"), 60.0, 30.0, needs=_MACHINE_2,
          program=("compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "1")),
    DayStage("tune-all", 2, "which kernel is fastest at every shape?",
          _words("-m {package} tune --shapes all --time-limit {seconds}"), 1800.0, 300.0, closing_s=120.0,
          needs=_MACHINE_2),
    _suite("deepbench", "--suite deepbench", 1200.0, 600.0, asks="DeepBench's sizes", needs=_MACHINE_2),
    _against("deepbench-ratios", "deepbench", "cudnn-fair", ("deepbench",)),
    _suite("seq2seq", "--suite gpu", 7200.0, 900.0,
           asks="whole Seq2Seq models in inference and training, every variant", needs=_MACHINE_2),
    _against("seq2seq-ratios", "seq2seq", "cudnn-fair", ("seq2seq",)),
)  # fmt: skip

#: The same without a GPU: tiny sizes in Triton's interpreter, and defects that the day has to survive.
REHEARSAL = (
    DayStage("machine", 1, "what machine, and which versions?", _FACTS, 60.0),
    DayStage("planted-hang", 1, "planted: a stage that hangs and does not listen to SIGTERM",
          _words("-m {package}.tools.gpu_day.planted hang --folder {folder}"), 10.0, 5.0, needs=_MACHINE),
    DayStage("planted-crash", 1, "planted: a stage that dies by a signal",
          _words("-m {package}.tools.gpu_day.planted crash --folder {folder}"), 30.0, 5.0, needs=_MACHINE),
    DayStage("planted-wrong", 1, "planted: configurations that are wrong, hang and crash",
          _words("-m {package}.tools.gpu_day.planted wrong --folder {folder}"), 60.0, needs=_MACHINE),
    DayStage("after-a-crash", 1, "planted: a stage whose need is not met",
          _words("-m {package}.tools.gpu_day.facts machine --folder {folder}"), 30.0, needs=("planted-crash",)),
    DayStage("exchange", 1, "is the exchange between programs right, and how fast?",
          _words("-m {package}.tools.gpu_day.exchange --folder {folder} --timeout 60 --time-limit {seconds}"), 150.0,
          needs=_MACHINE),
    DayStage("cudnn-names", 1, "what does torch's own LSTM run?",
          _words("-m {package}.tools.gpu_day.facts names --folder {folder}"), 40.0, needs=_MACHINE),
    DayStage("check-persistent", 1, "is the persistent kernel right?",
          _words("-m {package} check --device cpu --time-limit 10 --runs 3 --most 2 --kernel persistent "
                 "--out {folder}"),
          75.0, needs=_MACHINE),
    DayStage("tune-short", 1, "which kernel is fastest in float32?",
          _words("-m {package} tune --device cpu --out {tables}/interpreter.json --rounds 4 --most 3 --jobs 1 "
                 "--type float32 --time-limit 5"), 90.0, needs=_MACHINE),
    DayStage("machine-2", 2, "the machine of the second part", _FACTS, 60.0),
    _suite("suite", "--suite smoke --variant onednn --budget 3", 180.0, 40.0,
           asks="is oneDNN faster than the reference?", needs=_MACHINE_2),
    _against("ratios", "suite", "onednn", ("suite",)),
    DayStage("check-others", 2, "are the other kernels right?",
          _words("-m {package} check --device cpu --time-limit 8 --runs 3 --most 1 --kernel cell --kernel sequence "
                 "--out {folder}"), 60.0, needs=_MACHINE_2),
    DayStage("own-kernels", 2, "what do our calls run besides the recurrence, and is the library as precise as ATen?",
          _words("-m {package}.tools.gpu_day.facts own --folder {folder}"), 90.0, needs=_MACHINE_2),
    DayStage("sanitize", 2, "the smallest recurrences in one process",
          _words("-m {package} check --device cpu --sanitize"), 60.0, needs=_MACHINE_2),
)  # fmt: skip
