"""`python -m seq2seq`: see `seq2seq.cli.main`."""

from kernels.host.output import run_command
from seq2seq.cli.main import main

if __name__ == "__main__":
    run_command(main)
