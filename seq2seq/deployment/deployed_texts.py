"""Translate or summarise with an exported model, by onnxruntime, tokenizers and numpy: python MODEL.onnx.py < LINES.

It stands beside MODEL.onnx and MODEL.onnx.json, where `python -m seq2seq export` wrote it; change it as you like. Each
input line gives one output line, by the likeliest token at each step.
"""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from tokenizers import Tokenizer


def tidy(text: str) -> str:
    """The text on one line, with single spaces."""
    return re.sub(r"[ \t\r\n\f\v]+", " ", text).strip()


def translate(session: Any, tokenizer: Any, facts: dict[str, Any], line: str) -> str:
    """Translation or summary of a line."""
    special = facts["special_tokens"]
    source = tokenizer.encode(tidy(line)).ids[: facts["max_source"]]
    if not source:
        return ""
    tokens = [special["begin"]]
    while len(tokens) <= facts["max_target"] + 1:
        given = {"source": np.array([source]), "target": np.array([tokens])}
        (outputs,) = session.run(["outputs"], given)
        tokens.append(int(outputs[0, -1].argmax()))
        if tokens[-1] == special["end"]:
            break
    return tidy(tokenizer.decode(tokens, skip_special_tokens=True))


def main() -> None:
    """Read lines and write lines, as UTF-8."""
    model = Path(__file__).with_suffix("")
    facts = json.loads(Path(f"{model}.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_str(json.dumps(facts["tokenizer"]))
    # The names of special tokens are words like any other in a text.
    tokenizer.encode_special_tokens = True
    session = onnxruntime.InferenceSession(model.read_bytes())
    *lines, last = sys.stdin.buffer.read().decode().split("\n")
    for line in [*lines, last] if last else lines:
        sys.stdout.buffer.write(f"{translate(session, tokenizer, facts, line)}\n".encode())


if __name__ == "__main__":
    main()
