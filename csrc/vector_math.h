// Vectors of eight floats, exp and GELU on them, and the matrix product whose operands lie in the cache: what the inner
// loops of the model's kernels are made of. Included by csrc/<kernel>_kernel.h only, hence compiled once per
// instruction set; everything has internal linkage, and nothing comes from std. Products may be fused here: the files
// that include this are compiled with -ffp-contract=fast.
#pragma once

#include <stdint.h>
#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace sam_fast {
namespace {

constexpr int kLanes = 8;

typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLanes)));
typedef float LooseVec __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline Vec load(const float* p) { return *reinterpret_cast<const LooseVec*>(p); }
inline void store(float* p, Vec v) { *reinterpret_cast<LooseVec*>(p) = v; }
inline Vec splat(float x) { return Vec{x, x, x, x, x, x, x, x}; }

// The second operand where one of them is NaN.
inline Vec larger(Vec a, Vec b) {
#if defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
inline Vec smaller(Vec a, Vec b) {
#if defined(__AVX__)
  return reinterpret_cast<Vec>(_mm256_min_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a < b ? a : b;
#endif
}

inline float largest_lane(Vec v) {
  const float a = v[0] > v[4] ? v[0] : v[4], b = v[1] > v[5] ? v[1] : v[5];
  const float c = v[2] > v[6] ? v[2] : v[6], d = v[3] > v[7] ? v[3] : v[7];
  const float e = a > c ? a : c, f = b > d ? b : d;
  return e > f ? e : f;
}
inline float sum(Vec v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }

// Sums of the lanes of four vectors.
inline void sum_four(float* sums, const Vec* v) {
#if defined(__AVX__)
  const __m256 first = _mm256_hadd_ps(reinterpret_cast<__m256>(v[0]), reinterpret_cast<__m256>(v[1]));
  const __m256 second = _mm256_hadd_ps(reinterpret_cast<__m256>(v[2]), reinterpret_cast<__m256>(v[3]));
  const __m256 halves = _mm256_hadd_ps(first, second);
  _mm_storeu_ps(sums, _mm_add_ps(_mm256_castps256_ps128(halves), _mm256_extractf128_ps(halves, 1)));
#else
  for (int i = 0; i < 4; ++i) sums[i] = sum(v[i]);
#endif
}

inline bool any_greater(Vec a, Vec b) {
  const IntVec greater = a > b;
#if defined(__AVX__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(greater)) != 0;
#else
  int32_t any = 0;
  for (int i = 0; i < kLanes; ++i) any |= greater[i];
  return any != 0;
#endif
}

// Eight rows of eight, transposed: out[j][i] = in[i][j]; leading dimensions ldi and ldo.
inline void transpose_block(float* out, int64_t ldo, const float* in, int64_t ldi) {
#if defined(__AVX__)
  __m256 rows[8], pairs[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) rows[i] = _mm256_loadu_ps(in + i * ldi);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    rows[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    rows[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    rows[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    rows[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * ldo, _mm256_permute2f128_ps(rows[j], rows[j + 4], 0x20));
    _mm256_storeu_ps(out + (j + 4) * ldo, _mm256_permute2f128_ps(rows[j], rows[j + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) out[j * ldo + i] = in[i * ldi + j];
  }
#endif
}

// e^x for x <= 0: relative error below 3e-7 where the result matters (x > -20), 2^-126 below -87; NaN stays NaN.
// 2^x = 2^n 2^r with n = round(x): x + 1.5 * 2^23 + 127 has n + 127, the exponent of 2^n, in its low bits. The
// polynomial is a minimax fit on [-1/2, 1/2].
inline Vec exp_nonpositive(Vec x) {
  const Vec y = larger(splat(-126.0f), x * 1.44269504f);
  const Vec shifted = y + 12583039.0f;
  const Vec r = y - (shifted - 12583039.0f);
  Vec p = r * 1.32764668e-3f + 9.67554129e-3f;
  p = p * r + 5.55071329e-2f;
  p = p * r + 2.40221197e-1f;
  p = p * r + 6.93146967e-1f;
  p = p * r + 1.00000007f;
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
}

// x (1 + erf(x / sqrt 2)) / 2, absolute error below 2e-7 max(1, |x|).
// erf(x / sqrt 2) = x P(x^2) / Q(x^2), a minimax fit on |x| <= 5.6, beyond which it is 1 in float32.
inline Vec gelu(Vec x) {
  const Vec c = smaller(larger(x, splat(-5.6f)), splat(5.6f));
  const Vec t = c * c;
  Vec p = t * 4.43418008e-8f + 1.26801892e-5f;
  p = p * t + 3.45498315e-4f;
  p = p * t + 9.40129723e-3f;
  p = p * t + 6.85546901e-2f;
  p = p * t + 7.97884492e-1f;
  Vec q = t * 1.17971723e-6f + 7.46989196e-5f;
  q = q * t + 1.90689122e-3f;
  q = q * t + 2.88820228e-2f;
  q = q * t + 2.52586494e-1f;
  q = q * t + 1.0f;
  const Vec result = 0.5f * x * (1.0f + c * p / q);
  return x < -5.6f ? x * 0.0f : result;  // not plain 0: NaN stays NaN
}

// A factor of a product: element (row, column) at data[row * row_stride + column * column_stride].
struct Matrix {
  const float* data;
  int64_t row_stride, column_stride;
};

template <int kRows, int kVectors>
inline void product_block(float* c, int64_t ldc, const float* a, const Matrix& shape, const float* b, int64_t ldb,
                          int64_t depth, bool accumulate) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) sums[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Vec row[kVectors];
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const Vec factor = splat(a[i * shape.row_stride + k * shape.column_stride]);
#pragma GCC unroll 12
      for (int j = 0; j < kVectors; ++j) sums[i][j] += factor * row[j];
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
  }
}

// Twelve sums stay in registers: what two multiply-adds per cycle of latency four need, and sixteen registers hold.
template <int kVectors>
inline void product_columns(float* c, int64_t ldc, const Matrix& a, const float* b, int64_t ldb, int64_t rows,
                            int64_t depth, bool accumulate) {
  constexpr int kRows = 12 / kVectors;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows) {
    product_block<kRows, kVectors>(c + i * ldc, ldc, a.data + i * a.row_stride, a, b, ldb, depth, accumulate);
  }
  for (; i + 2 <= rows; i += 2) {
    product_block<2, kVectors>(c + i * ldc, ldc, a.data + i * a.row_stride, a, b, ldb, depth, accumulate);
  }
  if (i < rows) product_block<1, kVectors>(c + i * ldc, ldc, a.data + i * a.row_stride, a, b, ldb, depth, accumulate);
}

// Vectors that the next columns of a product take together, of `left` ones: 3 where that leaves no single one.
inline int64_t column_block(int64_t left) { return left >= 5 || left == 3 ? 3 : left >= 2 ? 2 : 1; }

// C [rows, 8 vectors] = A [rows, depth] B [depth, 8 vectors], or C += A B. B and C have unit stride along a row.
// Packed, B is what `pack` made, and ldb does not matter.
template <bool kPacked>
inline void product(float* c, int64_t ldc, const Matrix& a, const float* b, int64_t ldb, int64_t rows, int64_t vectors,
                    int64_t depth, bool accumulate) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    const float* columns = kPacked ? b + j * kLanes * depth : b + j * kLanes;
    const int64_t step = kPacked ? block * kLanes : ldb;
    float* out = c + j * kLanes;
    if (block == 3) {
      product_columns<3>(out, ldc, a, columns, step, rows, depth, accumulate);
    } else if (block == 2) {
      product_columns<2>(out, ldc, a, columns, step, rows, depth, accumulate);
    } else {
      product_columns<1>(out, ldc, a, columns, step, rows, depth, accumulate);
    }
    j += block;
  }
}

// B [depth, 8 vectors] in blocks of columns as a product takes them, each contiguous: a block stays in the first-level
// cache, where rows of B would fill more lines than they need.
inline void pack(float* packed, const float* b, int64_t ldb, int64_t vectors, int64_t depth) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    for (int64_t k = 0; k < depth; ++k) {
      for (int64_t i = 0; i < block; ++i, packed += kLanes) store(packed, load(b + k * ldb + (j + i) * kLanes));
    }
    j += block;
  }
}

}  // namespace
}  // namespace sam_fast
