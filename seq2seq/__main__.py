"""`python -m seq2seq`: see `seq2seq.command_line`."""

import sys

from seq2seq.command_line import main

if __name__ == "__main__":
    sys.exit(main())
