"""Parts that all kernels share: the description of a recurrence, the fast path of eager mode, torch.func.

Imports torch alone.
"""
