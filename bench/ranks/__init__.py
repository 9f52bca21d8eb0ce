"""Training over ranks: scaling, a straggler, gradients; `torchrun --nproc-per-node N -m bench ranks`.

Each process that torchrun starts is the keeper of one rank: it starts the process that trains (`bench.worker.ranks`),
watches it, and never hangs with it. The keeper of rank 0 writes the records. Uses `bench.records.ranks` for what is
kept; nothing here imports torch.
"""
