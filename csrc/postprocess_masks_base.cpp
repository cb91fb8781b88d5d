// postprocess_masks for any CPU, in the compiler's portable vectors. Include order: lanes first, kernel second.
#include <math.h>
#include <stdint.h>

#include "postprocess_masks_plan.h"

namespace sam_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 4;
#if defined(FP_FAST_FMAF)
  static constexpr bool kFused = true;
#else
  static constexpr bool kFused = false;
#endif
  typedef float Float __attribute__((vector_size(16)));
  typedef int32_t Int __attribute__((vector_size(16)));

  static Float load(const float* p) {
    Float v;
    __builtin_memcpy(&v, p, sizeof(v));
    return v;
  }
  static void store(float* p, Float v) { __builtin_memcpy(p, &v, sizeof(v)); }
  static Float set(float x) { return Float{x, x, x, x}; }
  static Float blend(Float a, Float wa, Float b, Float wb) {
    Float c = b * wb;
    if (!kFused) return a * wa + c;
    for (int i = 0; i < kCount; ++i) c[i] = fmaf(a[i], wa[i], c[i]);
    return c;
  }
  static Float permute(Float v, const int32_t* index) {
    return Float{v[index[0]], v[index[1]], v[index[2]], v[index[3]]};
  }
  static Float gather(const float* p, const int32_t* index) {
    return Float{p[index[0]], p[index[1]], p[index[2]], p[index[3]]};
  }
  typedef Int Mask;
  static Mask greater(Float a, Float b) { return a > b; }
  static uint64_t bits(Mask m) { return (m[0] & 1u) | (m[1] & 2u) | (m[2] & 4u) | (m[3] & 8u); }
  static uint64_t word(const Mask* m) {
    uint64_t all = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 64 / kCount; ++i) all |= bits(m[i]) << (i * kCount);
    return all;
  }
  static Int zero() { return Int{0, 0, 0, 0}; }
  static Int count(Int sum, Mask m) { return sum - m; }
  static int64_t total(Int sum) { return int64_t{sum[0]} + sum[1] + sum[2] + sum[3]; }
  static int popcount(uint64_t w) { return __builtin_popcountll(w); }
};

}  // namespace
}  // namespace sam_fast

#include "postprocess_masks_kernel.h"

namespace sam_fast {
const MaskKernels kMaskKernelsBase = {Lanes::kCount, Lanes::kFused, tally_bands, resize_bands};
}
