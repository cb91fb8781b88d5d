// Arithmetic that every implementation of an operation shares, on the host and on the device: written once, so that
// a machine without a GPU tests what a GPU runs. Header-only, no std templates (they would carry one file's
// instruction set into another), internal linkage for the same reason.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define SAM_FAST_HD __host__ __device__
#else
#define SAM_FAST_HD
#endif

namespace sam_fast {

// Logits of 16 bits: IEEE binary16, and the upper half of a binary32.
struct Half {
  uint16_t bits;
};
struct Bfloat16 {
  uint16_t bits;
};

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

// ---- Numbers.

SAM_FAST_HD inline float float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

SAM_FAST_HD inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

SAM_FAST_HD inline float widen(float value) { return value; }

SAM_FAST_HD inline float widen(Bfloat16 value) { return float_of_bits(static_cast<uint32_t>(value.bits) << 16); }

// A binary16 read as a binary32 of the same digits is too small by the difference of the exponents' biases.
SAM_FAST_HD inline float widen(Half value) {
  const uint32_t digits = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  const bool finite = (value.bits & 0x7c00) != 0x7c00;
  const uint32_t magnitude = finite ? bits_of_float(float_of_bits(digits) * 0x1p112f) : digits | 0x7f800000;
  return float_of_bits(sign | magnitude);
}

// ---- Certain regions: bilinear values are convex combinations of their samples, so where all samples lie on one side
// of a threshold, so do all values. "Side" keeps a margin above the rounding error (relative 1e-5 against about 1e-6),
// and samples that are NaN, infinite or huge lie on no side.

constexpr float kRelativeMargin = 1e-5f;
constexpr float kAbsoluteMargin = 1e-30f;  // products of weights and smaller samples may underflow
constexpr float kHuge = 1e37f;             // larger samples may overflow when blended

SAM_FAST_HD inline float side_margin(float threshold) { return fabsf(threshold) * kRelativeMargin + kAbsoluteMargin; }

// 1 if everything in [least, most] is certainly above the threshold, -1 if certainly below, else 0.
SAM_FAST_HD inline int side_of(float least, float most, float threshold) {
  const float margin = side_margin(threshold);
  if (least > threshold + margin) return 1;
  return most < threshold - margin ? -1 : 0;
}

// ---- Boxes, XYXY.

// max and min whose NaN cases do not matter: a NaN coordinate makes the box's area NaN, and with it every IoU.
SAM_FAST_HD inline float larger(float a, float b) { return a > b ? a : b; }
SAM_FAST_HD inline float smaller(float a, float b) { return a < b ? a : b; }

SAM_FAST_HD inline float intersection(float ax1, float ay1, float ax2, float ay2, float bx1, float by1, float bx2,
                                      float by2) {
  const float width = larger(0.0f, smaller(ax2, bx2) - larger(ax1, bx1));
  const float height = larger(0.0f, smaller(ay2, by2) - larger(ay1, by1));
  return width * height;
}

// False if inter / uni > limit is certainly false, for limit >= 0: for a positive union the product form is implied by
// it (rounding is monotonic and inter is a float); a negative union or a NaN passes and is left to the division.
SAM_FAST_HD inline bool may_exceed(float inter, float uni, float limit) {
  return !(inter < limit * uni) & (inter > 0.0f);
}

// Ranks of scores: descending, NaN last, -0 equal to +0.
SAM_FAST_HD inline uint32_t score_rank(float score) {
  if (score != score) return 0xffffffffu;
  const uint32_t raw = bits_of_float(score + 0.0f);
  return raw & 0x80000000u ? raw : 0x7fffffffu - raw;
}

// ---- Packed masks.

// Bit i of `bits` at bits 2 * i and 2 * i + 1.
SAM_FAST_HD inline uint64_t double_bits(uint32_t bits) {
  uint64_t word = bits;
  word = (word | word << 16) & 0x0000ffff0000ffffull;
  word = (word | word << 8) & 0x00ff00ff00ff00ffull;
  word = (word | word << 4) & 0x0f0f0f0f0f0f0f0full;
  word = (word | word << 2) & 0x3333333333333333ull;
  word = (word | word << 1) & 0x5555555555555555ull;
  return word | word << 1;
}

// The eight bytes (0 or 1) of the eight pixels in `byte`: copy the byte into all eight lanes, keep bit i in lane i and
// turn "non-zero" into 1 by an addition that carries into the top bit of the lane and never out of it.
SAM_FAST_HD inline uint64_t unpack_byte(uint8_t byte) {
  const uint64_t lanes = (byte * uint64_t{0x0101010101010101}) & uint64_t{0x8040201008040201};
  return ((lanes + uint64_t{0x7f7f7f7f7f7f7f7f}) >> 7) & uint64_t{0x0101010101010101};
}

// ---- COCO's string of run lengths: numbers in characters of five bits each, the lowest first.

// Whether the five bits `digit` do not yet say all of a number of which `rest` is what remains above them: the sign
// of the last digit (bit 4) is extended on reading.
SAM_FAST_HD inline bool has_more(int64_t digit, int64_t rest) { return (digit & 0x10) != 0 ? rest != -1 : rest != 0; }

// How many characters a number takes.
SAM_FAST_HD inline int32_t count_characters(int64_t value) {
  for (int32_t length = 1;; ++length) {
    const int64_t digit = value & 0x1f;
    value >>= 5;
    if (!has_more(digit, value)) return length;
  }
}

// Writes a number and returns where the next one goes.
SAM_FAST_HD inline uint8_t* write_characters(uint8_t* out, int64_t value) {
  for (bool more = true; more;) {
    const int64_t digit = value & 0x1f;
    value >>= 5;
    more = has_more(digit, value);
    *out++ = static_cast<uint8_t>(48 + digit + (more ? 0x20 : 0));
  }
  return out;
}

}  // namespace
}  // namespace sam_fast
