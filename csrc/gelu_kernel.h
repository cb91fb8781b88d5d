// The loop of gelu, compiled once per instruction set; no include guard, no std.

#include "vector_math.h"

namespace sam_fast {
namespace {

void activate(float* x, int64_t n) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store(x + i, gelu(load(x + i)));
  if (i == n) return;
  float rest[kLanes] = {};
  for (int64_t j = i; j < n; ++j) rest[j - i] = x[j];
  store(rest, gelu(load(rest)));
  for (int64_t j = i; j < n; ++j) x[j] = rest[j - i];
}

}  // namespace
}  // namespace sam_fast
