"""Checkpoints: a folder with config.json (family, sizes, what the task must keep) and the weights as safetensors.

config.json names the file of the weights and replacing it is what saves, so that a process that is killed at any moment
leaves the old checkpoint or the new one. Other files in the folder are left alone.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.host.output import replacing, sync_folder
from seq2seq.models.base import Config, Model

CONFIG = "config.json"
FORMAT = "seq2seq-bench checkpoint"
VERSION = 1
#: Modules by the family that they define; a family's config is the dataclass there that carries its name.
FAMILIES = {
    "lstm": "seq2seq.models.encoder_decoder",
    "lstm-alone": "seq2seq.models.lstm_layer",
    "lstm-episodes": "seq2seq.models.episodes",
    "attention": "seq2seq.models.attention",
    "ctc": "seq2seq.models.ctc",
    "gnmt": "seq2seq.models.gnmt",
    "rnnt-encoder": "seq2seq.models.rnnt_encoder",
    "transformer": "seq2seq.models.transformer",
    "pretrained": "seq2seq.models.huggingface_config",
}
_WEIGHTS = re.compile(r"model-[0-9a-f]{16}\.safetensors")
#: What a name on the Hugging Face hub looks like.
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class CheckpointError(ValueError):
    """A checkpoint that cannot be read, or a folder that cannot be one; the message is one line."""


@dataclass(frozen=True)
class Checkpoint:
    """Content of a checkpoint.

    Attributes:
        model: on the CPU, in evaluation mode, in the precision that it was saved in.
        task_state: what was given with it; None where nothing was.
    """

    model: Model
    task_state: dict[str, Any] | None

    @property
    def config(self) -> Config:
        """Sizes of the model."""
        config: Config = self.model.config
        return config


def save_pretrained(model: Model, folder: str | Path, task_state: Mapping[str, Any] | None = None) -> None:
    """Save a model; a checkpoint that is already in the folder is replaced, all at once.

    Args:
        model: of a family in `FAMILIES`.
        folder: made where it is missing, with its parents.
        task_state: what is needed to use the model again besides its weights (scaling, tokenizer): plain JSON values.

    Raises:
        CheckpointError: when the folder holds something else, the family is unknown, or the state is not JSON.
        OSError: when it cannot be written; what was there is unchanged.
    """
    folder = Path(folder)
    _config_class(model.config.family)
    if folder.exists() and not _replaceable(folder):
        msg = f"{folder}: exists but is not a checkpoint (no {CONFIG} of one), so it is not overwritten: name another"
        raise CheckpointError(msg)
    save = _safetensors().save
    # Copies: parameters that share memory, as cuDNN's flattened weights do, are refused.
    weights = save({name: value.detach().cpu().contiguous().clone() for name, value in model.state_dict().items()})
    digest = hashlib.sha256(weights).hexdigest()
    content = {
        "format": FORMAT,
        "version": VERSION,
        "family": model.config.family,
        "sizes": dataclasses.asdict(model.config),
        "weights": f"model-{digest[:16]}.safetensors",
        "sha256": digest,
        "task": None if task_state is None else dict(task_state),
    }
    try:
        text = json.dumps(content, indent=2, allow_nan=False)
    except (TypeError, ValueError) as error:
        msg = f"{folder}: sizes and task state must be plain JSON values: {error}"
        raise CheckpointError(msg) from error
    if folder.exists():
        _write(folder, content["weights"], weights, text)
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Made aside and renamed, so that half of a first save does not look like a folder with other contents.
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        aside.chmod(0o777 & ~_umask())
        _write(aside, content["weights"], weights, text)
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    sync_folder(folder.parent)


def from_pretrained(name: str | Path, lstm: Callable[..., nn.RNNBase] = nn.LSTM) -> Checkpoint:
    """Load a checkpoint.

    Args:
        name: a folder, or a name on the Hugging Face hub, `user/model`, which is downloaded.
        lstm: makes the model's LSTMs, with the parameters of `torch.nn.LSTM`.

    Raises:
        CheckpointError: for what is not a checkpoint, or a damaged one: which file, what is wrong, what was expected.
    """
    folder = Path(name)
    if not folder.exists() and HUB_NAME.fullmatch(str(name)):
        folder = _download(str(name))
    content = _read_config(folder)
    config = _make_config(folder / CONFIG, content)
    weights = _read_weights(folder, content)
    try:
        model = config.build(lstm)
    except ValueError as error:
        msg = f"{folder}: {error}"
        raise CheckpointError(msg) from error
    kinds = {value.dtype for value in weights.values() if value.is_floating_point()}
    if len(kinds) == 1:
        model.to(kinds.pop())
    _check_weights(folder / content["weights"], model, weights)
    model.load_state_dict(weights)
    return Checkpoint(model.eval(), content["task"])


def read_sizes(folder: str | Path) -> tuple[Config, dict[str, Any] | None]:
    """Sizes of a checkpoint's model, and what was given with it; the weights are not read.

    Raises:
        CheckpointError: as `from_pretrained`.
    """
    content = _read_config(Path(folder))
    return _make_config(Path(folder) / CONFIG, content), content["task"]


def is_checkpoint(folder: str | Path) -> bool:
    """Return whether a folder holds a checkpoint of this project, whole or damaged."""
    try:
        return bool(json.loads((Path(folder) / CONFIG).read_text(encoding="utf-8"))["format"] == FORMAT)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _safetensors() -> Any:
    """The functions of safetensors for torch."""
    try:
        return importlib.import_module("safetensors.torch")
    except ModuleNotFoundError as error:
        msg = f"checkpoints need {error.name}, which is not installed: pip install safetensors"
        raise CheckpointError(msg) from error


def _config_class(family: str) -> Callable[..., Config]:
    """The config class of a family."""
    if family not in FAMILIES:
        msg = f"family is {family!r}, expected one of {', '.join(FAMILIES)}"
        raise CheckpointError(msg)
    try:
        module = importlib.import_module(FAMILIES[family])
    except ModuleNotFoundError as error:
        msg = f"family {family!r} needs {error.name}, which cannot be imported here"
        raise CheckpointError(msg) from error
    for value in vars(module).values():
        if isinstance(value, type) and dataclasses.is_dataclass(value) and getattr(value, "family", None) == family:
            return cast("Callable[..., Config]", value)
    msg = f"{FAMILIES[family]} has no config of the family {family!r}"
    raise CheckpointError(msg)


def _replaceable(folder: Path) -> bool:
    return folder.is_dir() and (is_checkpoint(folder) or not any(folder.iterdir()))


def _write(folder: Path, name: str, weights: bytes, text: str) -> None:
    """Weights first; config.json, which names them, commits; then weights that nothing names any more go."""
    _replace(folder / name, weights)
    _replace(folder / CONFIG, text.encode())
    for path in folder.iterdir():
        if _WEIGHTS.fullmatch(path.name) and path.name != name:
            path.unlink()


def _replace(path: Path, data: bytes) -> None:
    """Write a file in one step: at every moment it holds all of the old or all of the new."""
    with replacing(path) as file:
        file.write(data)
    sync_folder(path.parent)


def _umask() -> int:
    """Permissions that new files must not have; a temporary folder belongs to its owner only, a checkpoint need not."""
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _download(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415 - optional
    except ImportError as error:
        msg = f"{name} is not a folder here, and the hub needs huggingface_hub: pip install huggingface_hub"
        raise CheckpointError(msg) from error
    try:
        return Path(snapshot_download(name, allow_patterns=[CONFIG, "model-*.safetensors"]))
    except Exception as error:
        reason = " ".join(str(error).split())
        msg = f"{name} is not a folder here, and the hub does not give it: {type(error).__name__}: {reason}"
        raise CheckpointError(msg) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        what = "is not a folder" if not folder.is_dir() else f"has no {CONFIG}"
        msg = f"{folder} {what}, expected the folder of a training run or of a model, or a hub name user/model"
        raise CheckpointError(msg)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        msg = f"{path} is not JSON ({error})"
        raise CheckpointError(msg) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        msg = f'{path} has no "format": "{FORMAT}", so it is not of a checkpoint of this project'
        raise CheckpointError(msg)
    if content.get("version") != VERSION:
        msg = f"{path}: version is {content.get('version')!r}, expected {VERSION}; a newer release wrote it"
        raise CheckpointError(msg)
    for name, kind in {"family": str, "sizes": dict, "weights": str, "sha256": str}.items():
        if not isinstance(content.get(name), kind):
            msg = f"{path}: {name} is {content.get(name)!r}, expected a {kind.__name__}"
            raise CheckpointError(msg)
    # A name with a folder in it would read from elsewhere.
    if not _WEIGHTS.fullmatch(content["weights"]):
        msg = f"{path}: weights is {content['weights']!r}, expected model-*.safetensors"
        raise CheckpointError(msg)
    return {"task": None, **content}


def _make_config(path: Path, content: Mapping[str, Any]) -> Config:
    try:
        return _config_class(content["family"])(**content["sizes"])
    except (TypeError, ValueError) as error:
        msg = f"{path}: {error}"
        raise CheckpointError(msg) from error


def _read_weights(folder: Path, content: Mapping[str, Any]) -> dict[str, Tensor]:
    tensors = _safetensors()
    path = folder / content["weights"]
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        msg = f"{path} is missing, and {CONFIG} names it"
        raise CheckpointError(msg) from error
    if hashlib.sha256(data).hexdigest() != content["sha256"]:
        msg = f"{path} is damaged or cut off ({len(data)} bytes; its SHA-256 is not what {CONFIG} says)"
        raise CheckpointError(msg)
    try:
        weights: dict[str, Tensor] = tensors.load(data)
    except importlib.import_module("safetensors").SafetensorError as error:
        msg = f"{path} is not a safetensors file ({error})"
        raise CheckpointError(msg) from error
    return weights


def _check_weights(path: Path, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise for the first tensor that the model has otherwise."""
    expected: dict[str, torch.Size] = {name: value.shape for name, value in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in weights:
            msg = f"{path} has no {name}, which {CONFIG}'s model needs with shape {tuple(shape)}"
            raise CheckpointError(msg)
        if weights[name].shape != shape:
            msg = f"{path}: {name} has shape {tuple(weights[name].shape)}, expected {tuple(shape)} by {CONFIG}"
            raise CheckpointError(msg)
    if unknown := sorted(weights.keys() - expected.keys()):
        msg = f"{path} has {unknown[0]}, which {CONFIG}'s model does not have"
        raise CheckpointError(msg)
