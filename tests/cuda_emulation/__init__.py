"""A GPU on the CPU: csrc/*.cu compiled against `cuda_runtime.h` of this folder, for tests without a GPU."""
