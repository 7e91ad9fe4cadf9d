"""Triton kernels of the experts layer with their launchers; `ops/reference.py` has the implementation in torch.

There are no copies to the host, no shapes that depend on values, and no atomic additions: every launch can be captured
in a CUDA graph, and results are reproducible bit for bit.
"""
