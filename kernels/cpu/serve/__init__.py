"""An LSTM stack as C: exported with its kernel, and run by any program without Python, torch or allocations.

`export.py` writes the folder; the other files go into it. Uses the kernel's headers in `kernels/cpu` alone.
"""
