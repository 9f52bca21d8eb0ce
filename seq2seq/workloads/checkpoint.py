"""A checkpoint as a workload: its own sizes and weights, synthetic data that it can read, nothing dropped.

`checkpoint:PATH` names a run or a model's folder of this project, a folder that transformers' `save_pretrained` wrote,
or a model on the Hugging Face hub. Nothing is read but the sizes until the weights are asked for.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from seq2seq.data.lengths import LIBRISPEECH_CHARACTERS, LIBRISPEECH_FRAMES, WMT_ENGLISH, WMT_GERMAN
from seq2seq.models import checkpoint
from seq2seq.models.base import Config
from seq2seq.models.huggingface_files import load_config, load_weights
from seq2seq.models.layer_groups import PretrainedError
from seq2seq.models.weights import Weights, initial_weights
from seq2seq.workloads.workload import UnknownWorkloadError, Workload

#: How names of such workloads begin.
PREFIX = "checkpoint:"
BATCH = 16
#: Longest sequence, where the checkpoint does not say what its task reads: that of the WMT lengths.
STEPS = 50
#: Steps of the source for a label of a model by CTC: about those of the workload speech-ctc, 800 to 150.
STEPS_A_LABEL = 5


def checkpoint_workload(path: str) -> Workload:
    """The workload of a checkpoint.

    Args:
        path: a folder, or a name on the hub.

    Raises:
        UnknownWorkloadError: for what is not a checkpoint, or a damaged one, in one line.
    """
    try:
        return _workload(path)
    except (checkpoint.CheckpointError, PretrainedError) as error:
        raise UnknownWorkloadError(str(error)) from error


@functools.singledispatch
def starting_weights(workload: Any, seed: int) -> Weights:
    """The fp32 weights that a workload is measured on: the checkpoint's, or drawn from a seed.

    Raises:
        CheckpointError, PretrainedError: where a checkpoint's cannot be read.
    """
    if not workload.checkpoint:
        return initial_weights(workload.config, seed)
    place = _place(workload.checkpoint)
    if isinstance(place, str) or not checkpoint.is_checkpoint(place):
        return load_weights(place)
    state: dict[str, Tensor] = checkpoint.from_pretrained(place).model.state_dict()
    return {name: value.float() for name, value in state.items()}


# A run asks for each of its cases; what is on the disk, or on the hub, is read once.
@functools.lru_cache(maxsize=8)
def _workload(path: str) -> Workload:
    place = _place(path)
    task: dict[str, Any] = {}
    if isinstance(place, str) or not checkpoint.is_checkpoint(place):
        config: Config = load_config(place)
    else:
        config, kept = checkpoint.read_sizes(place)
        task = (kept or {}).get("state") or {}
    if config.uncounted:
        msg = f"{path}: {config.uncounted}"
        raise PretrainedError(msg)
    # What it drops has no weights, so those of the checkpoint fit.
    config = config.as_measured()
    longest = config.positions or STEPS
    source, target = task.get("history", min(STEPS, longest)), task.get("horizon", min(STEPS, longest))
    tokens = bool(config.source_vocabulary), bool(config.target_vocabulary)
    labels = config.unaligned
    read = WMT_ENGLISH if tokens[0] else LIBRISPEECH_FRAMES if labels else None
    return Workload(
        name=f"{PREFIX}{path}",
        summary=f"a checkpoint of the family {config.family}",
        source=f"the checkpoint {path}: its sizes and weights, without dropout; batch {BATCH} is ours, and steps are "
        f"{'those of its task' if 'history' in task else 'up to ' + str(source)}",
        data=_data(*tokens, labels=labels),
        config=config,
        batch=BATCH,
        source_steps=source,
        target_steps=target if config.decodes else None,
        source_lengths=read,
        target_lengths=WMT_GERMAN if tokens[1] else None,
        label_steps=max(1, source // STEPS_A_LABEL) if labels else None,
        label_lengths=LIBRISPEECH_CHARACTERS if labels else None,
        checkpoint=path,
    )


def _data(source: bool, target: bool, *, labels: bool) -> str:
    """Describe the data of its batches."""
    if labels:
        return "synthetic: random values and labels, lengths of LibriSpeech dev-clean scaled to the longest"
    if source and target:
        return "synthetic: random tokens of the model's vocabulary, lengths of WMT English and German words"
    if source or target:
        side = "source" if source else "target"
        return f"synthetic: random values, and as the {side} random tokens with lengths of WMT words"
    return "synthetic: random values, as many features as the model reads"


def _place(path: str) -> Path | str:
    """The folder of a checkpoint, or its name on the hub.

    Raises:
        CheckpointError: for neither.
    """
    folder = Path(path)
    # A training run's best weights.
    if (folder / "run.json").is_file():
        folder /= "model"
        if not folder.is_dir():
            msg = f"{path} is a training run that has saved no model yet; continue it with --resume"
            raise checkpoint.CheckpointError(msg)
    if not folder.exists() and checkpoint.HUB_NAME.fullmatch(path) and not Path(path.partition("/")[0]).is_dir():
        return path
    if checkpoint.is_checkpoint(folder) or _is_transformers(folder):
        return folder
    what = "is not a folder" if not folder.is_dir() else f"has no {checkpoint.CONFIG} of a checkpoint"
    msg = f"{folder} {what}; expected a training run, a folder that save_pretrained wrote (ours or that of "
    raise checkpoint.CheckpointError(msg + "transformers), or a hub name user/model")


def _is_transformers(folder: Path) -> bool:
    """Return whether a folder's configuration says which of the library's models it is of."""
    path = folder / checkpoint.CONFIG
    if not path.is_file():
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        msg = f"{path} is not JSON ({error})"
        raise checkpoint.CheckpointError(msg) from error
    return isinstance(content, dict) and "model_type" in content
