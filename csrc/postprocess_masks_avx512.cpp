// postprocess_masks for AVX-512 (F, BW, DQ, VL). Include order: lanes first, kernel second.
#include <immintrin.h>
#include <stdint.h>

#include "postprocess_masks_plan.h"

namespace sam_fast {
namespace {

struct Lanes {
  static constexpr int kCount = 16;
  static constexpr bool kFused = true;
  typedef __m512 Float;
  typedef __m512i Int;
  typedef __mmask16 Mask;

  static Float load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, Float v) { _mm512_storeu_ps(p, v); }
  static Float set(float x) { return _mm512_set1_ps(x); }
  static Float blend(Float a, Float wa, Float b, Float wb) { return _mm512_fmadd_ps(a, wa, _mm512_mul_ps(b, wb)); }
  static Float permute(Float v, const int32_t* index) { return _mm512_permutexvar_ps(_mm512_loadu_si512(index), v); }
  static Float gather(const float* p, const int32_t* index) {
    return _mm512_i32gather_ps(_mm512_loadu_si512(index), p, 4);
  }
  static Mask greater(Float a, Float b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
  static uint64_t bits(Mask m) { return _cvtmask16_u32(m); }
  static uint64_t word(const Mask* m) {
    return _cvtmask64_u64(_mm512_kunpackd(_mm512_kunpackw(m[3], m[2]), _mm512_kunpackw(m[1], m[0])));
  }
  static Int zero() { return _mm512_setzero_si512(); }
  static Int count(Int sum, Mask m) { return _mm512_mask_sub_epi32(sum, m, sum, _mm512_set1_epi32(-1)); }
  static int64_t total(Int sum) { return _mm512_reduce_add_epi32(sum); }
  static int popcount(uint64_t w) { return __builtin_popcountll(w); }
};

}  // namespace
}  // namespace sam_fast

#include "postprocess_masks_kernel.h"

namespace sam_fast {
const MaskKernels kMaskKernelsAvx512 = {Lanes::kCount, Lanes::kFused, tally_bands, resize_bands};
}
