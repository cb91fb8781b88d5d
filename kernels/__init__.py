"""Triton kernels of sam_fast, imported only when a CUDA device is going to run them."""
