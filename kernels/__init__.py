"""The Triton kernels: one file per operation, with its launch table; `launch.py` is what they share."""
