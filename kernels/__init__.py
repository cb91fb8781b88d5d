"""Home of the Triton kernels, installed as `sam_fast.kernels`; this version has none yet."""
