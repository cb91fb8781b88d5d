// One sweep over the pixels of an image: they take from a prompt's tokens, are normalised, and are read by the tokens.
// Projections of the image are absorbed into the token side (sam_fast/ops/two_way_attention.py has the algebra).
// two_way_attention.cpp schedules, two_way_attention_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

// N prompts, P pixels of C channels, 8 heads. T tokens have R = 8 T rows, row 8 t + h being token t's head h; those
// that are read by pixels may be more than those that read.
struct TwoWayShape {
  int64_t prompts, pixels, channels;
};

// What pixels take: softmax over the tokens of each head of `scores`, times `offered`; then residual and LayerNorm.
// Scores are queries . keys where queries is not null, and (image + pe) . absorbed + constant otherwise.
struct TwoWayWrite {
  int64_t tokens;
  const float* queries;   // [P, width, 8] of an image that all prompts share
  const float* keys;      // [N, T, width, 8]
  int64_t width;          // of a head
  const float* absorbed;  // [N, C, R]
  const float* constant;  // [N, R]
  const float* offered;   // [N, R, C]
  const float* bias;      // [C]
  const float* norm_weight;
  const float* norm_bias;
  float eps;
};

// T is float, or uint16_t for the bits of bfloat16: then factors of all products with pixels are bfloat16, and sums,
// softmax and LayerNorm float32.
template <typename T>
struct TwoWayArguments {
  TwoWayShape shape;
  const T* image;            // [N or 1, P, C]
  bool shared;               // one image for all prompts
  const float* pe;           // [P, C]
  const TwoWayWrite* write;  // or null: the image stays as it is
  int64_t readers;           // tokens that read
  const float* absorbed;     // [N, C, R], queries of the tokens that read, projected to the image; or null: none reads
  T* written;                // [N, P, C], may be the image itself; null without write
  float* read;               // [N, R, C], softmax over pixels of (image + pe) . absorbed, times the image; or null
};

template <typename T>
void two_way_attention(const TwoWayArguments<T>& arguments, int threads);

// What one sweep over some pixels of one prompt leaves of the readings: per row the largest score, the sum of
// exponentials against it, and the sum of pixels weighted by them.
struct TwoWayPartial {
  float* largest;  // [R]
  float* total;    // [R]
  float* read;     // [R, two_way_stride(C)]
};

// Rows of buffers are padded, lest rows of 1 KB share the same few sets of the first-level cache.
static inline int64_t two_way_stride(int64_t channels) { return channels + 16; }

constexpr int64_t kTwoWayTile = 48;  // pixels; all that a tile needs stays in the second-level cache

// In floats; enough for either type.
template <typename T>
static inline int64_t two_way_workspace(const TwoWayArguments<T>& a) {
  const int64_t tokens = a.write == nullptr ? 0 : a.write->tokens, most = tokens > a.readers ? tokens : a.readers;
  return kTwoWayTile * (8 * (most + a.readers) + 2 * two_way_stride(a.shape.channels)) +
         8 * (2 * tokens + a.readers) * a.shape.channels;
}

template <typename T>
using TwoWaySweep = void (*)(const TwoWayArguments<T>&, int64_t prompt, int64_t begin, int64_t end, float* workspace,
                             const TwoWayPartial&);
extern const TwoWaySweep<float> kTwoWaySweepBase, kTwoWaySweepAvx2, kTwoWaySweepAvx512;
extern const TwoWaySweep<uint16_t> kTwoWaySweepBf16Base, kTwoWaySweepBf16Avx2, kTwoWaySweepBf16Avx512,
    kTwoWaySweepBf16Avx512Bf16;

}  // namespace sam_fast
