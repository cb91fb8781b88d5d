// Arithmetic that every implementation of an operation shares, on the host and on the device: written once, so that
// a machine without a GPU tests what a GPU runs. Header-only, no std templates (they would carry one file's
// instruction set into another), internal linkage for the same reason.
#pragma once

#include <math.h>
#include <stdint.h>

#if defined(__CUDACC__)
#define SAM_FAST_HD __host__ __device__
#else
#define SAM_FAST_HD
#endif

namespace sam_fast {

// The two samples of one axis that a bilinear output position reads, and their weights.
struct Tap {
  int32_t first, second;
  float first_weight, second_weight;
};

namespace {

// a * b + c, rounded once (kFused) or twice. PyTorch's bilinear kernels are compiled per instruction set: those for
// AVX2, AVX-512, ARM and CUDA contract products into fused multiply-adds, the one for plain x86-64 cannot.
template <bool kFused>
SAM_FAST_HD inline float multiply_add(float a, float b, float c) {
  return kFused ? fmaf(a, b, c) : a * b + c;
}

// Linear interpolation without aligned corners: output position `out` of `out_size` reads an axis of `in_size`.
//   source = max(scale * (out + 1/2) - 1/2, 0), all of it in float32, as torch.nn.functional.interpolate computes it.
template <bool kFused>
SAM_FAST_HD inline Tap bilinear_tap(int32_t out, int32_t in_size, int32_t out_size) {
  if (in_size == out_size) return {out, out, 1.0f, 0.0f};
  const float scale = static_cast<float>(in_size) / static_cast<float>(out_size);
  float source = multiply_add<kFused>(scale, static_cast<float>(out) + 0.5f, -0.5f);
  if (source < 0.0f) source = 0.0f;
  int32_t first = static_cast<int32_t>(floorf(source));
  if (first > in_size - 1) first = in_size - 1;
  float weight = source - static_cast<float>(first);
  if (weight > 1.0f) weight = 1.0f;
  return {first, first + (first < in_size - 1 ? 1 : 0), 1.0f - weight, weight};
}

// a * wa + b * wb in the order that the separable kernel rounds it.
template <bool kFused>
SAM_FAST_HD inline float blend(float a, float wa, float b, float wb) {
  return multiply_add<kFused>(a, wa, b * wb);
}

// PyTorch's CPU kernels resize separably (rows first), except for outputs whose sides sum to at most this: those
// weight the four samples by products of weights (bilinear_small).
constexpr int32_t kSmallOutputSides = 128;

template <bool kFused>
SAM_FAST_HD inline float bilinear_small(float top_first, float top_second, float bottom_first, float bottom_second,
                                        Tap row, Tap column) {
  float sum = (row.first_weight * column.second_weight) * top_second;
  sum = multiply_add<kFused>(row.first_weight * column.first_weight, top_first, sum);
  sum = multiply_add<kFused>(row.second_weight * column.first_weight, bottom_first, sum);
  return multiply_add<kFused>(row.second_weight * column.second_weight, bottom_second, sum);
}

}  // namespace
}  // namespace sam_fast
