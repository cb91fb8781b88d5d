// The loops of int8_rows, compiled once per instruction set; no include guard, no std.

#include "vector_math.h"

namespace sam_fast {
namespace {

typedef uint8_t ByteVec __attribute__((vector_size(kLanes)));
typedef uint8_t LooseByteVec __attribute__((vector_size(kLanes), aligned(1), may_alias));

constexpr float kSmallest = 1e-30f;  // of a row's largest number: a row of zeros stays zeros

template <typename T>
void quantise(const QuantiseArguments<T>& a, int64_t begin, int64_t end, float* row) {
  const float zero = static_cast<float>(a.most + 1);
  for (int64_t r = begin; r < end; ++r) {
    const T* const x = a.x + r * a.width;
    const float factor = a.factors == nullptr ? 1.0f : a.factors[r];
    Vec largest{}, not_finite{};
    for (int64_t c = 0; c < a.width; c += kLanes) {
      Vec v = widen(x + c) * factor;
      if (a.bias != nullptr) v += load(a.bias + c);
      if (a.gelu) v = gelu(v);
      store(row + c, v);
      largest = larger(v, largest);
      largest = larger(-v, largest);
      not_finite += v - v;
    }
    // A row with a NaN or an infinity has a scale that is not a number, and so will be all that is made of it.
    const float top = largest_lane(largest), scale = (top > kSmallest ? top : kSmallest) / a.most + sum(not_finite);
    a.scales[r] = scale;
    const float inverse = 1.0f / scale;
    for (int64_t c = 0; c < a.width; c += kLanes) {
      // Above 2^23 a float has no fraction, and its lowest bits are the integer.
      const Vec shifted = load(row + c) * inverse + (zero + 8388608.0f);
      const IntVec integers = reinterpret_cast<IntVec>(shifted) & 255;
      *reinterpret_cast<LooseByteVec*>(a.integers + r * a.width + c) = __builtin_convertvector(integers, ByteVec);
    }
  }
}

template <typename T>
void scale(const ScaleArguments<T>& a, int64_t begin, int64_t end) {
  for (int64_t r = begin; r < end; ++r) {
    T* const out = a.out + r * a.width;
    for (int64_t c = 0; c < a.width; c += kLanes) {
      Vec v = load(a.x + r * a.width + c) * a.factors[r];
      if (a.bias != nullptr) v += load(a.bias + c);
      if (a.add) v += widen(out + c);
      store_narrow(out + c, v);
    }
  }
}

}  // namespace
}  // namespace sam_fast
