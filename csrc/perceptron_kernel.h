// The inner loops of perceptron, compiled once per instruction set; no include guard, no std.
//
// Rows of x and rows of weights are multiplied along their length, three by four of them at a time: weights come in the
// order in which they are stored, and stay in the first-level cache while the rows of x pass.

#include "vector_math.h"

namespace sam_fast {
namespace {

constexpr int kRowsAtOnce = 3, kWeightsAtOnce = 4;
constexpr int64_t kLongRow = 1024;  // of weights: from here on the processor fetches ahead well enough by itself

// y[r][o] = x[r] . weight[o] + bias[o], at least `least`; rows of x and weights have K elements, those of y are ldy
// apart.
template <int kRows, int kOutputs>
inline void dots(float* y, int64_t ldy, const float* x, const float* weight, const float* bias, int64_t K,
                 float least) {
  Vec sums[kRows][kOutputs] = {};
  for (int64_t k = 0; k < K; k += kLanes) {
    Vec values[kRows];
#pragma GCC unroll 4
    for (int r = 0; r < kRows; ++r) values[r] = load(x + r * K + k);
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const Vec factor = load(weight + o * K + k);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][o] += factor * values[r];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float totals[kOutputs];
    if constexpr (kOutputs == kWeightsAtOnce) {
      sum_four(totals, sums[r]);
    } else {
      totals[0] = sum(sums[r][0]);
    }
#pragma GCC unroll 4
    for (int o = 0; o < kOutputs; ++o) {
      const float value = totals[o] + bias[o];
      y[r * ldy + o] = value < least ? least : value;  // NaN stays NaN
    }
  }
}

template <int kOutputs>
inline void dots_of_rows(float* y, int64_t ldy, const float* x, int64_t rows, const float* weight, const float* bias,
                         int64_t K, float least) {
  int64_t r = 0;
  for (; r + kRowsAtOnce <= rows && rows - r != 4; r += kRowsAtOnce) {
    dots<kRowsAtOnce, kOutputs>(y + r * ldy, ldy, x + r * K, weight, bias, K, least);
  }
  for (; r + 2 <= rows; r += 2) dots<2, kOutputs>(y + r * ldy, ldy, x + r * K, weight, bias, K, least);
  if (r < rows) dots<1, kOutputs>(y + r * ldy, ldy, x + r * K, weight, bias, K, least);
}

void linear(float* y, const float* x, int64_t rows, const PerceptronLayer& layer, int64_t begin, int64_t end,
            bool relu) {
  const int64_t K = layer.inputs, N = layer.outputs;
  const float least = relu ? 0.0f : -__builtin_inff();
  int64_t o = begin;
  for (; o + kWeightsAtOnce <= end; o += kWeightsAtOnce) {
    const float* const weight = layer.weight + o * K;
    if (K < kLongRow && o + 2 * kWeightsAtOnce <= N) {
      const float* const next = weight + kWeightsAtOnce * K;
      for (int64_t k = 0; k < kWeightsAtOnce * K; k += 64 / sizeof(float)) __builtin_prefetch(next + k, 0, 2);
    }
    dots_of_rows<kWeightsAtOnce>(y + o, N, x, rows, weight, layer.bias + o, K, least);
  }
  for (; o < end; ++o) dots_of_rows<1>(y + o, N, x, rows, layer.weight + o * K, layer.bias + o, K, least);
}

void finish(float* row, const PerceptronArguments& a, int64_t index) {
  const int64_t C = a.layers[a.count - 1].outputs;
  if (a.residual != nullptr) {
    for (int64_t c = 0; c < C; ++c) row[c] += a.residual[index * C + c];
  }
  if (a.norm_weight == nullptr) return;
  Vec total{}, squares{};
  for (int64_t c = 0; c < C; c += kLanes) total += load(row + c);
  const float mean = sum(total) / static_cast<float>(C);
  for (int64_t c = 0; c < C; c += kLanes) {
    const Vec deviation = load(row + c) - mean;
    squares += deviation * deviation;
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares) / static_cast<float>(C) + a.eps);
  for (int64_t c = 0; c < C; c += kLanes) {
    store(row + c, (load(row + c) - mean) * scale * load(a.norm_weight + c) + load(a.norm_bias + c));
  }
}

}  // namespace
}  // namespace sam_fast
