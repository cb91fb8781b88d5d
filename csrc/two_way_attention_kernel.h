// The inner loops of two_way_attention, compiled once per instruction set; no include guard, no std.
//
// A tile of pixels goes through all of its steps while it is in the second-level cache. The eight heads are the lanes
// of a vector: row t of a pixel's scores is one vector per token, and the softmax over tokens needs no shuffles.

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

// Softmax over the tokens, for each pixel and head.
void softmax_over_tokens(float* scores, int64_t rows, int64_t tokens) {
  for (int64_t p = 0; p < rows; ++p) {
    float* row = scores + p * tokens * kLanes;
    Vec largest = load(row);
    for (int64_t t = 1; t < tokens; ++t) largest = larger(load(row + t * kLanes), largest);
    Vec total{};
    for (int64_t t = 0; t < tokens; ++t) {
      const Vec e = exp_nonpositive(load(row + t * kLanes) - largest);
      store(row + t * kLanes, e);
      total += e;
    }
    const Vec share = 1.0f / total;
    for (int64_t t = 0; t < tokens; ++t) store(row + t * kLanes, load(row + t * kLanes) * share);
  }
}

// LayerNorm of x [channels], in place and to `copy`; the result with its encoding to `placed`.
void layer_norm(float* x, float* copy, float* placed, const float* pe, const float* weight, const float* bias,
                int64_t channels, float eps) {
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
    store(x + c, v);
    store(copy + c, v);
    store(placed + c, v + load(pe + c));
  }
}

void add_rows(float* out, int64_t ldo, const float* a, const float* b, int64_t rows, int64_t channels) {
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t c = 0; c < channels; c += kLanes) {
      store(out + p * ldo + c, load(a + p * channels + c) + load(b + p * channels + c));
    }
  }
}

void copy_rows(float* out, int64_t ldo, const float* in, int64_t ldi, int64_t rows, int64_t channels) {
  for (int64_t p = 0; p < rows; ++p) {
    for (int64_t c = 0; c < channels; c += kLanes) store(out + p * ldo + c, load(in + p * ldi + c));
  }
}

// Turns scores into exponentials against the largest score so far, and brings what was read before to the same scale.
void softmax_over_pixels(float* scores, int64_t rows, int64_t tokens, const TwoWayPartial& partial, int64_t channels,
                         int64_t stride) {
  for (int64_t t = 0; t < tokens; ++t) {
    float* column = scores + t * kLanes;
    const int64_t step = tokens * kLanes;
    const Vec before = load(partial.largest + t * kLanes);
    Vec largest = before;
    for (int64_t p = 0; p < rows; ++p) largest = larger(load(column + p * step), largest);
    Vec total = load(partial.total + t * kLanes);
    if (any_greater(largest, before)) {
      const Vec scale = exp_nonpositive(before - largest);
      total *= scale;
      store(partial.largest + t * kLanes, largest);
      for (int h = 0; h < kLanes; ++h) {
        float* read = partial.read + (t * kLanes + h) * stride;
        for (int64_t c = 0; c < channels; c += kLanes) store(read + c, load(read + c) * scale[h]);
      }
    }
    for (int64_t p = 0; p < rows; ++p) {
      const Vec e = exp_nonpositive(load(column + p * step) - largest);
      store(column + p * step, e);
      total += e;
    }
    store(partial.total + t * kLanes, total);
  }
}

// What pixels take from tokens, added to the source; pixels [rows, C] in rows of `stride`.
struct Writer {
  const TwoWayWrite& w;
  int64_t C, R, stride;
  const float* keys;      // of this prompt
  const float* constant;  // of this prompt
  float* absorbed;        // [C, R], packed
  float* offered;         // [R, C], packed

  Writer(const TwoWayWrite& write, int64_t channels, int64_t prompt, float* memory)
      : w(write),
        C(channels),
        R(write.tokens * kLanes),
        stride(two_way_stride(channels)),
        absorbed(memory),
        offered(memory + R * C) {
    keys = w.queries == nullptr ? nullptr : w.keys + prompt * R * w.width;
    constant = w.queries == nullptr ? w.constant + prompt * R : nullptr;
    if (w.queries == nullptr) pack(absorbed, w.absorbed + prompt * C * R, R, w.tokens, C);
    pack(offered, w.offered + prompt * R * C, C, C / kLanes, R);
    // The shares of one head sum to one: with the bias in all rows of the first head, every pixel gets it once.
    for (int64_t j = 0, column = 0; j < C / kLanes;) {
      const int64_t block = column_block(C / kLanes - j) * kLanes;
      for (int64_t r = 0; r < R; r += kLanes) {
        float* row = offered + column * R + r * block;
        for (int64_t i = 0; i < block; i += kLanes) store(row + i, load(row + i) + load(w.bias + column + i));
      }
      column += block;
      j += block / kLanes;
    }
  }

  void take(float* pixels, float* placed, float* scores, const float* source, const float* pe, int64_t start,
            int64_t rows) const {
    if (w.queries != nullptr) {
      projected_scores(scores, w.queries + start * w.width * kLanes, keys, rows, w.tokens, w.width);
    } else {
      add_rows(placed, stride, source, pe, rows, C);
      for (int64_t p = 0; p < rows; ++p) {
        for (int64_t r = 0; r < R; r += kLanes) store(scores + p * R + r, load(constant + r));
      }
      product<true>(scores, R, {placed, stride, 1}, absorbed, 0, rows, w.tokens, C, true);
    }
    softmax_over_tokens(scores, rows, w.tokens);
    copy_rows(pixels, stride, source, C, rows, C);
    product<true>(pixels, stride, {scores, R, 1}, offered, 0, rows, C / kLanes, R, true);
  }
};

void sweep(const TwoWayArguments& a, int64_t prompt, int64_t begin, int64_t end, float* workspace,
           const TwoWayPartial& partial) {
  const int64_t C = a.shape.channels, stride = two_way_stride(C), R = a.readers * kLanes;
  const TwoWayWrite none{};
  const TwoWayWrite& write = a.write == nullptr ? none : *a.write;
  const int64_t most = write.tokens > a.readers ? write.tokens : a.readers;
  float* const scores = workspace;
  float* const pixels = scores + kTwoWayTile * most * kLanes;
  float* const placed = pixels + kTwoWayTile * stride;
  float* const reading = placed + kTwoWayTile * stride;  // [C, R], packed
  const Writer writer(write, a.write == nullptr ? 0 : C, prompt, reading + C * R);
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
    const float* const source = a.image + ((a.shared ? 0 : prompt * a.shape.pixels) + start) * C;
    const float* const pe = a.pe + start * C;
    if (a.write != nullptr) {
      writer.take(pixels, placed, scores, source, pe, start, rows);
      float* const written = a.written + (prompt * a.shape.pixels + start) * C;
      for (int64_t p = 0; p < rows; ++p) {
        layer_norm(pixels + p * stride, written + p * C, placed + p * stride, pe + p * C, write.norm_weight,
                   write.norm_bias, C, write.eps);
      }
    } else {
      copy_rows(pixels, stride, source, C, rows, C);
      add_rows(placed, stride, source, pe, rows, C);
    }
    if (R == 0) continue;
    product<true>(scores, R, {placed, stride, 1}, reading, 0, rows, a.readers, C, false);
    softmax_over_pixels(scores, rows, a.readers, partial, C, stride);
    product<false>(partial.read, stride, {scores, 1, R}, pixels, stride, R, C / kLanes, rows, true);
  }
}

}  // namespace
}  // namespace sam_fast
