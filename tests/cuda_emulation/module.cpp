// The operations on a GPU as a module of their own, for kernels that an emulated GPU runs on CPU tensors.
#include "../../csrc/bindings.h"

PYBIND11_MODULE(_cuda_emulated, m) { sam_fast::bind_cuda(m); }
