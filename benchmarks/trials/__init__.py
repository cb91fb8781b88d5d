"""Trials of the GPU kernels, beside their ceilings: `python -m benchmarks.trials`. See `__main__.py`."""
