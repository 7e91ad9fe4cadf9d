"""Triton kernels of the experts layer, each with its launcher; `reference.py` one level up has their torch twins.

Nothing here copies to the host, has a shape that depends on values, or adds atomically: every launch can be captured
in a CUDA graph, and equal inputs give equal bits.
"""
