"""`python -m bench.worker REQUESTS ANSWERS`: what the parent starts."""

import sys

from bench.worker.server import main

if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
