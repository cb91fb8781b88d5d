// GELU in place.
#pragma once

#include <cstdint>

namespace sam_fast {

void gelu(float* x, int64_t n, int threads);

using GeluKernel = void (*)(float* x, int64_t n);
extern const GeluKernel kGeluBase, kGeluAvx2, kGeluAvx512;

}  // namespace sam_fast
