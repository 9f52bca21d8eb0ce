"""`python -m seq2seq`: see `seq2seq.command_line`."""

from kernels.host.output import run_command
from seq2seq.command_line import main

if __name__ == "__main__":
    run_command(main)
