// postprocess_masks for AVX2 and FMA. Include order: lanes first, kernel second.
#include <immintrin.h>
#include <stdint.h>

#include "postprocess_masks_plan.h"

namespace sam_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 8;
  static constexpr bool kFused = true;
  typedef __m256 Float;
  typedef __m256i Int;
  typedef __m256 Mask;

  static Float load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, Float v) { _mm256_storeu_ps(p, v); }
  static Float set(float x) { return _mm256_set1_ps(x); }
  static Float blend(Float a, Float wa, Float b, Float wb) { return _mm256_fmadd_ps(a, wa, _mm256_mul_ps(b, wb)); }
  static __m256i indices(const int32_t* index) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(index)); }
  static Float permute(Float v, const int32_t* index) { return _mm256_permutevar8x32_ps(v, indices(index)); }
  static Float gather(const float* p, const int32_t* index) { return _mm256_i32gather_ps(p, indices(index), 4); }
  static Mask greater(Float a, Float b) { return _mm256_cmp_ps(a, b, _CMP_GT_OQ); }
  static uint64_t bits(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
  static uint64_t word(const Mask* m) {
    uint64_t all = 0;
#pragma GCC unroll 16
    for (int i = 0; i < 64 / kCount; ++i) all |= bits(m[i]) << (i * kCount);
    return all;
  }
  static Int zero() { return _mm256_setzero_si256(); }
  static Int count(Int sum, Mask m) { return _mm256_sub_epi32(sum, _mm256_castps_si256(m)); }
  static int64_t total(Int sum) {
    alignas(32) int32_t lane[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(lane), sum);
    int64_t all = 0;
    for (int i = 0; i < 8; ++i) all += lane[i];
    return all;
  }
  static int popcount(uint64_t w) { return __builtin_popcountll(w); }
};

}  // namespace
}  // namespace sam_fast

#include "postprocess_masks_kernel.h"

namespace sam_fast {
const MaskKernels kMaskKernelsAvx2 = {Lanes::kCount, Lanes::kFused, tally_bands, resize_bands};
}
