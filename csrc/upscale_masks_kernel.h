// The inner loops of upscale_masks, compiled once per instruction set; no include guard, no std.
//
// A tile of 24 tokens lies with channels as rows and tokens as lanes: normalisation and classifiers then need no sums
// across lanes, and the weights of both products are read as they are stored. In bfloat16 a row is one of pairs of
// channels, where it is multiplied.

#include "vector_math.h"

namespace sam_fast {
namespace {

constexpr int64_t kTileVectors = kUpscaleTile / kLanes;

// Rows of the image to columns: [rows, C] -> [C, 24], or [C / 2, 24] pairs; zeros where the tile is not full.
template <typename T>
void transpose_tile(float* out, const T* image, int64_t rows, int64_t channels) {
  constexpr int64_t n = kPerFactor<T>;
  const int64_t full = rows - rows % kLanes;
  for (int64_t c = 0; c < channels; c += n * kLanes) {
    float* columns = out + c / n * kUpscaleTile;
    for (int64_t p = 0; p < full; p += kLanes) {
      const float* tokens[kLanes];
      for (int i = 0; i < kLanes; ++i) tokens[i] = reinterpret_cast<const float*>(image + (p + i) * channels + c);
      transpose_rows(columns + p, kUpscaleTile, tokens);
    }
    for (int i = 0; i < kLanes; ++i) {
      LooseBits* row = reinterpret_cast<LooseBits*>(columns + i * kUpscaleTile);
      for (int64_t p = full; p < kUpscaleTile; ++p) {
        row[p] = p < rows ? reinterpret_cast<const LooseBits*>(image + p * channels + c)[i] : 0;
      }
    }
  }
}

// LayerNorm over rows, then GELU; x [channels, 24] without its bias becomes a factor of the next product.
template <typename T>
void normalise_and_activate(float* x, const float* bias, const float* weight, const float* shift, int64_t channels,
                            float eps) {
  for (int64_t j = 0; j < kUpscaleTile; j += kLanes) {
    Vec total{};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load(x + c * kUpscaleTile + j) + bias[c];
      store(x + c * kUpscaleTile + j, v);
      total += v;
    }
    const Vec mean = total / static_cast<float>(channels);
    Vec squares{};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = load(x + c * kUpscaleTile + j) - mean;
      squares += v * v;
    }
    squares = squares / static_cast<float>(channels) + eps;
    Vec scale;
#if defined(__AVX__)
    scale = 1.0f / reinterpret_cast<Vec>(_mm256_sqrt_ps(reinterpret_cast<__m256>(squares)));
#else
    for (int i = 0; i < kLanes; ++i) scale[i] = 1.0f / __builtin_sqrtf(squares[i]);
#endif
    const auto activated = [&](int64_t c) {
      return gelu_for<T>((load(x + c * kUpscaleTile + j) - mean) * scale * weight[c] + shift[c]);
    };
    for (int64_t c = 0; c < channels; c += kPerFactor<T>) {
      float* row = x + c / kPerFactor<T> * kUpscaleTile + j;  // not below the channels that are still to be read
      if constexpr (sizeof(T) == sizeof(float)) {
        store(row, activated(c));
      } else {
        const Vec first = activated(c), second = activated(c + 1);
        store_pairs(reinterpret_cast<uint16_t*>(row), narrow(first), narrow(second));
      }
    }
  }
}

// Up to four masks of pixels x [channels, 24], activated here; classifiers [4, channels]; out rows are 16 tiles apart.
template <typename T>
void classify(float* out, const float* x, const float* bias, const float* classifiers, int64_t channels,
              int64_t masks) {
  for (int64_t j = 0; j < kUpscaleTile; j += kLanes) {
    Vec sums[kMasksAtOnce] = {};
    for (int64_t c = 0; c < channels; ++c) {
      const Vec v = gelu_for<T>(load(x + c * kUpscaleTile + j) + bias[c]);
#pragma GCC unroll 4
      for (int64_t m = 0; m < kMasksAtOnce; ++m) sums[m] += classifiers[m * channels + c] * v;
    }
    for (int64_t m = 0; m < masks; ++m) store(out + 16 * m * kUpscaleTile + j, sums[m]);
  }
}

// Logits [M, 16, 24] by position in the token's square of 4 x 4, to the rows of the masks.
void scatter(const UpscaleShape& a, float* all_logits, const float* tile, int64_t image, int64_t start, int64_t rows) {
  const int64_t width = 4 * a.width;
  for (int64_t m = 0; m < a.masks; ++m) {
    float* mask = all_logits + (image * a.masks + m) * 4 * a.height * width;
    const float* logits = tile + 16 * m * kUpscaleTile;
    for (int64_t p = 0; p < rows; ++p) {
      float* square = mask + 4 * ((start + p) / a.width) * width + 4 * ((start + p) % a.width);
      for (int i = 0; i < 2; ++i) {
        for (int j = 0; j < 2; ++j) {
          const float* from = logits + (2 * i + j) * 4 * kUpscaleTile + p;
          float* to = square + 2 * i * width + 2 * j;
          to[0] = from[0];
          to[1] = from[kUpscaleTile];
          to[width] = from[2 * kUpscaleTile];
          to[width + 1] = from[3 * kUpscaleTile];
        }
      }
    }
  }
}

template <typename T>
void upscale(const UpscaleArguments<T>& a, int64_t image, int64_t begin, int64_t end, float* workspace) {
  typedef typename FactorOf<T>::Type Factor;
  constexpr int64_t n = kPerFactor<T>;
  const UpscaleShape& shape = a.shape;
  const int64_t C = shape.channels, C1 = shape.first_channels, C2 = shape.second_channels, M = shape.masks;
  float* const tokens = workspace;                       // [C, 24]
  float* const first = tokens + C * kUpscaleTile;        // [4, C1, 24]
  float* const second = first + 4 * C1 * kUpscaleTile;   // [4, C2, 24]
  float* const logits = second + 4 * C2 * kUpscaleTile;  // [M, 4, 4, 24]
  float* const some = logits + 16 * M * kUpscaleTile;
  const Matrix<Factor> first_weight = {reinterpret_cast<const Factor*>(a.first_weight), C / n, 1};
  const Matrix<Factor> second_weight = {reinterpret_cast<const Factor*>(a.second_weight), C1 / n, 1};
  for (int64_t start = begin; start < end; start += kUpscaleTile) {
    const int64_t rows = end - start < kUpscaleTile ? end - start : kUpscaleTile;
    transpose_tile(tokens, a.image + (image * shape.height * shape.width + start) * C, rows, C);
    product<false>(first, kUpscaleTile, first_weight, reinterpret_cast<const Factor*>(tokens), kUpscaleTile, 4 * C1,
                   kTileVectors, C / n, false);
    for (int square = 0; square < 4; ++square) {
      float* const pixels = first + square * C1 * kUpscaleTile;
      normalise_and_activate<T>(pixels, a.first_bias, a.norm_weight, a.norm_bias, C1, a.eps);
      product<false>(second, kUpscaleTile, second_weight, reinterpret_cast<const Factor*>(pixels), kUpscaleTile, 4 * C2,
                     kTileVectors, C1 / n, false);
      for (int64_t m = 0; m < M; m += kMasksAtOnce) {
        const int64_t count = M - m < kMasksAtOnce ? M - m : kMasksAtOnce;
        for (int64_t i = 0; i < kMasksAtOnce; ++i) {
          for (int64_t c = 0; c < C2; ++c) {
            some[i * C2 + c] = i < count ? a.classifiers[((image * M) + m + i) * C2 + c] : 0.0f;
          }
        }
        for (int inner = 0; inner < 4; ++inner) {
          classify<T>(logits + (16 * m + 4 * square + inner) * kUpscaleTile, second + inner * C2 * kUpscaleTile,
                      a.second_bias, some, C2, count);
        }
      }
    }
    scatter(shape, a.logits, logits, image, start, rows);
  }
}

}  // namespace
}  // namespace sam_fast
