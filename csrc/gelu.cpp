#include "gelu.h"

#include <algorithm>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int64_t kPiece = 1 << 14;

}  // namespace

void gelu(float* x, int64_t n, int threads) {
  const GeluKernel kernel = SAM_FAST_PICK(kGelu);
#pragma omp parallel for num_threads(threads) schedule(static) if (n > 4 * kPiece)
  for (int64_t i = 0; i < n; i += kPiece) kernel(x + i, std::min(kPiece, n - i));
}

}  // namespace sam_fast
