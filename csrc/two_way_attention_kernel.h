// The inner loops of two_way_attention, compiled once per instruction set; no include guard, no std.
//
// A tile of pixels goes through all of its steps while it is in the second-level cache. The eight heads are the lanes
// of a vector: row t of a pixel's scores is one vector per token, and the softmax over tokens needs no shuffles.
//
// In bfloat16 products take pairs along their depth: of channels for scores, of rows of tokens for what pixels take, of
// pixels for what tokens read. Shares of a softmax are rounded where the scores lie.

#include "vector_math.h"

namespace sam_fast {
namespace {

static_assert(kLanes == 8, "lanes are heads");

// Scores [rows, T, 8] of pixels with projected queries [rows, width, 8], against keys [T, width, 8].
void projected_scores(float* scores, const float* queries, const float* keys, int64_t rows, int64_t tokens,
                      int64_t width) {
  for (int64_t p = 0; p < rows; ++p) {
    const float* query = queries + p * width * kLanes;
    for (int64_t t = 0; t < tokens; ++t) {
      const float* key = keys + t * width * kLanes;
      Vec even{}, odd{};
      int64_t d = 0;
      for (; d + 2 <= width; d += 2) {
        even += load(query + d * kLanes) * load(key + d * kLanes);
        odd += load(query + (d + 1) * kLanes) * load(key + (d + 1) * kLanes);
      }
      if (d < width) even += load(query + d * kLanes) * load(key + d * kLanes);
      store(scores + (p * tokens + t) * kLanes, even + odd);
    }
  }
}

// Softmax over the tokens, for each pixel and head; shares as the factors of a product, a row R floats from the next.
template <typename T>
void softmax_over_tokens(float* scores, int64_t rows, int64_t tokens) {
  for (int64_t p = 0; p < rows; ++p) {
    float* row = scores + p * tokens * kLanes;
    Vec largest = load(row);
    for (int64_t t = 1; t < tokens; ++t) largest = larger(load(row + t * kLanes), largest);
    Vec total{};
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec e = exp_nonpositive<T>(load(row + t * kLanes) - largest);
      store(row + t * kLanes, e);
      total += e;
    }
    const Vec share = 1.0f / total;
    for (int64_t t = 0; t < tokens; ++t) {
      store_narrow(reinterpret_cast<T*>(row) + t * kLanes, load(row + t * kLanes) * share);
    }
  }
}

// LayerNorm of x [channels], in place and to `copy`; the result with its encoding to `placed`.
template <typename T>
void layer_norm(float* x, T* copy, T* placed, const float* pe, const float* weight, const float* bias, int64_t channels,
                float eps) {
  Vec sums[2] = {};
  for (int64_t c = 0; c < channels; c += 2 * kLanes) {
    sums[0] += load(x + c);
    if (c + kLanes < channels) sums[1] += load(x + c + kLanes);
  }
  const float mean = sum(sums[0] + sums[1]) / channels;
  Vec squares[2] = {};
  for (int64_t c = 0; c < channels; c += 2 * kLanes) {
    const Vec first = load(x + c) - mean;
    squares[0] += first * first;
    if (c + kLanes < channels) {
      const Vec second = load(x + c + kLanes) - mean;
      squares[1] += second * second;
    }
  }
  const float scale = 1.0f / __builtin_sqrtf(sum(squares[0] + squares[1]) / channels + eps);
  for (int64_t c = 0; c < channels; c += kLanes) {
    const Vec v = (load(x + c) - mean) * scale * load(weight + c) + load(bias + c);
    if constexpr (sizeof(T) == sizeof(float)) store(x + c, v);
    store_narrow(copy + c, v);
    store_narrow(placed + c, v + load(pe + c));
  }
}

// The image [rows, C] with its encoding; rows of `placed` are ldo apart.
template <typename T>
void place(T* placed, int64_t ldo, const T* image, const float* pe, int64_t rows, int64_t channels) {
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      store_narrow(placed + p * ldo + c, widen(image + p * channels + c) + load(pe + p * channels + c));
    }
  }
}

template <typename T>
void copy_rows(float* out, int64_t ldo, const T* in, int64_t rows, int64_t channels) {
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t c = 0; c < channels; c += kLanes) store(out + p * ldo + c, widen(in + p * channels + c));
  }
}

// Rows of an image in pairs, the last one with zeros if it is alone: [rows / 2, C] pairs, ldo apart.
void pair_rows(Pair* out, int64_t ldo, const uint16_t* in, int64_t rows, int64_t channels) {
  for (int64_t p = 0; p < rows; p += 2) {
    uint16_t* to = reinterpret_cast<uint16_t*>(out + p / 2 * ldo);
    for (int64_t c = 0; c < channels; c += kLanes) {
      const ShortVec second = p + 1 < rows ? load(in + (p + 1) * channels + c) : ShortVec{};
      store_pairs(to + 2 * c, load(in + p * channels + c), second);
    }
  }
}

// Turns scores into exponentials against the largest score so far, and brings what was read before to the same scale.
// As factors of a product they lie in `weights`: the scores themselves, or [rows / 2, R] pairs of pixels.
template <typename T>
void softmax_over_pixels(float* scores, T* weights, int64_t rows, int64_t tokens, const TwoWayPartial& partial,
                         int64_t channels, int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* column = scores + t * kLanes;
    T* const out = weights + t * kLanes * kPerFactor<T>;
    const int64_t step = tokens * kLanes;
    const Vec before = load(partial.largest + t * kLanes);
    Vec largest = before;
    for (int64_t p = 0; p < rows; ++p) largest = larger(load(column + p * step), largest);
    Vec total = load(partial.total + t * kLanes);
    if (any_greater(largest, before)) {
      const Vec scale = exp_nonpositive<float>(before - largest);
      total *= scale;
      store(partial.largest + t * kLanes, largest);
      for (int h = 0; h < kLanes; ++h) {
        float* read = partial.read + (t * kLanes + h) * stride;
        for (int64_t c = 0; c < channels; c += kLanes) store(read + c, load(read + c) * scale[h]);
      }
    }
    for (int64_t p = 0; p < rows; p += kPerFactor<T>) {
      const Vec e = exp_nonpositive<T>(load(column + p * step) - largest);
      total += e;
      if constexpr (sizeof(T) == sizeof(float)) {
        store(out + p * step, e);
      } else {
        Vec next{};
        if (p + 1 < rows) next = exp_nonpositive<T>(load(column + (p + 1) * step) - largest);
        total += next;
        store_pairs(out + p * step, narrow(e), narrow(next));
      }
    }
    store(partial.total + t * kLanes, total);
  }
}

// What pixels take from tokens, added to the source; pixels [rows, C] in rows of `stride`.
template <typename T>
struct Writer {
  typedef typename FactorOf<T>::Type Factor;
  const TwoWayWrite& w;
  int64_t C, R, stride;
  const float* keys;      // of this prompt
  const float* constant;  // of this prompt
  Factor* absorbed;       // [C, R], packed
  Factor* offered;        // [R, C], packed

  // Memory: 2 R C floats.
  Writer(const TwoWayWrite& write, int64_t channels, int64_t prompt, float* memory)
      : w(write),
        C(channels),
        R(write.tokens * kLanes),
        stride(two_way_stride(channels)),
        absorbed(reinterpret_cast<Factor*>(memory)),
        offered(reinterpret_cast<Factor*>(memory + R * C)) {
    keys = w.queries == nullptr ? nullptr : w.keys + prompt * R * w.width;
    constant = w.queries == nullptr ? w.constant + prompt * R : nullptr;
    if (w.queries == nullptr) pack(absorbed, w.absorbed + prompt * C * R, R, w.tokens, C);
    pack(offered, w.offered + prompt * R * C, C, C / kLanes, R);
  }

  void take(float* pixels, T* placed, float* scores, const T* source, const float* pe, int64_t start,
            int64_t rows) const {
    if (w.queries != nullptr) {
      projected_scores(scores, w.queries + start * w.width * kLanes, keys, rows, w.tokens, w.width);
    } else {
      const int64_t step = stride / kPerFactor<T>;
      place(placed, stride, source, pe, rows, C);
      for (int64_t p = 0; p < rows; ++p) {
        for (int64_t r = 0; r < R; r += kLanes) store(scores + p * R + r, load(constant + r));
      }
      product<true>(scores, R, {reinterpret_cast<const Factor*>(placed), step, 1}, absorbed, 0, rows, w.tokens,
                    C / kPerFactor<T>, true);
    }
    softmax_over_tokens<T>(scores, rows, w.tokens);
    for (int64_t p = 0; p < rows; ++p) {
      for (int64_t c = 0; c < C; c += kLanes)
        store(pixels + p * stride + c, widen(source + p * C + c) + load(w.bias + c));
    }
    product<true>(pixels, stride, {reinterpret_cast<const Factor*>(scores), R, 1}, offered, 0, rows, C / kLanes,
                  R / kPerFactor<T>, true);
  }
};

template <typename T>
void sweep(const TwoWayArguments<T>& a, int64_t prompt, int64_t begin, int64_t end, float* workspace,
           const TwoWayPartial& partial) {
  typedef typename FactorOf<T>::Type Factor;
  constexpr bool kPairs = sizeof(T) != sizeof(float);
  const int64_t C = a.shape.channels, stride = two_way_stride(C), R = a.readers * kLanes;
  const TwoWayWrite none{};
  const TwoWayWrite& write = a.write == nullptr ? none : *a.write;
  const int64_t most = write.tokens > a.readers ? write.tokens : a.readers;
  float* const scores = workspace;
  float* const apart = scores + kTwoWayTile * most * kLanes;  // shares in pairs
  float* const pixels = apart + kTwoWayTile * R;              // [48, C]
  float* const others = pixels + kTwoWayTile * stride;        // with their encoding; in bfloat16 pairs of pixels, too
  float* const packed = others + kTwoWayTile * stride;        // [C, R]
  T* const placed = reinterpret_cast<T*>(others);
  Factor* const pairs = reinterpret_cast<Factor*>(others + kTwoWayTile * stride / 2);  // [24, C]
  Factor* const reading = reinterpret_cast<Factor*>(packed);
  T* const weights = reinterpret_cast<T*>(kPairs ? apart : scores);
  const Writer<T> writer(write, a.write == nullptr ? 0 : C, prompt, packed + C * R);
  if (R > 0) {
    pack(reading, a.absorbed + prompt * C * R, R, a.readers, C);
    for (int64_t r = 0; r < R; ++r) {
      partial.largest[r] = -__builtin_inff();
      partial.total[r] = 0;
      for (int64_t c = 0; c < C; ++c) partial.read[r * stride + c] = 0;
    }
  }
  for (int64_t start = begin; start < end; start += kTwoWayTile) {
    const int64_t rows = end - start < kTwoWayTile ? end - start : kTwoWayTile;
    const T* source = a.image + ((a.shared ? 0 : prompt * a.shape.pixels) + start) * C;
    const float* const pe = a.pe + start * C;
    if (a.write != nullptr) {
      writer.take(pixels, placed, scores, source, pe, start, rows);
      T* const written = a.written + (prompt * a.shape.pixels + start) * C;
      for (int64_t p = 0; p < rows; ++p) {
        layer_norm(pixels + p * stride, written + p * C, placed + p * stride, pe + p * C, write.norm_weight,
                   write.norm_bias, C, write.eps);
      }
      source = written;
    } else {
      if constexpr (!kPairs) copy_rows(pixels, stride, source, rows, C);
      place(placed, stride, source, pe, rows, C);
    }
    if (R == 0) continue;
    const Matrix<Factor> left = {reinterpret_cast<const Factor*>(placed), stride / kPerFactor<T>, 1};
    product<true>(scores, R, left, reading, 0, rows, a.readers, C / kPerFactor<T>, false);
    softmax_over_pixels(scores, weights, rows, a.readers, partial, C, stride);
    const Matrix<Factor> shares = {reinterpret_cast<const Factor*>(weights), 1, R};
    if constexpr (kPairs) {
      pair_rows(pairs, stride, source, rows, C);
      product<false>(partial.read, stride, shares, pairs, stride, R, C / kLanes, (rows + 1) / 2, true);
    } else {
      product<false>(partial.read, stride, shares, pixels, stride, R, C / kLanes, rows, true);
    }
  }
}

}  // namespace
}  // namespace sam_fast
