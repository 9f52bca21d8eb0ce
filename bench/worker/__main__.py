"""`python -m bench.worker REQUESTS ANSWERS` or `--forks CONTROL [MODULE ...]`: what the parent starts."""

import importlib
import sys

from bench.worker.forking import serve_forks
from bench.worker.server import main

if __name__ == "__main__":
    if sys.argv[1] == "--forks":
        for name in sys.argv[3:]:
            importlib.import_module(name)
        sys.exit(serve_forks(int(sys.argv[2]), main))
    sys.exit(main(*sys.argv[1:]))
