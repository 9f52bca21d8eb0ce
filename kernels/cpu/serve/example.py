"""Runs the exported LSTM by ctypes, without torch: `python example.py` prints its output for a step of zeros."""

import array
import ctypes
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    """Run a step of zeros."""
    library = ctypes.CDLL(str(FOLDER / "libseq2seq_lstm.so"))
    library.seq2seq_lstm_create.restype = ctypes.c_void_p
    library.seq2seq_lstm_create.argtypes = [ctypes.c_char_p, ctypes.c_int64, ctypes.c_char_p, ctypes.c_size_t]
    for name in ("input_size", "output_size"):
        function = getattr(library, f"seq2seq_lstm_{name}")
        function.restype, function.argtypes = ctypes.c_int64, [ctypes.c_void_p]
    library.seq2seq_lstm_step.argtypes = [ctypes.c_void_p] * 3
    library.seq2seq_lstm_destroy.argtypes = [ctypes.c_void_p]

    message = ctypes.create_string_buffer(256)
    lstm = library.seq2seq_lstm_create(str(FOLDER / "weights.bin").encode(), 1, message, len(message))
    if not lstm:
        raise SystemExit("error: " + message.value.decode())
    x = array.array("f", [0.0] * library.seq2seq_lstm_input_size(lstm))
    y = array.array("f", [0.0] * library.seq2seq_lstm_output_size(lstm))
    library.seq2seq_lstm_step(lstm, x.buffer_info()[0], y.buffer_info()[0])
    print(*y)
    library.seq2seq_lstm_destroy(lstm)


if __name__ == "__main__":
    main()
