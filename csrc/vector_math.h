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

// Two neighbouring numbers in bfloat16, the first in the lower half; and bfloat16 itself, as its bits. Products of
// pairs take two steps at once, with sums in float32; processors without AVX512-BF16 do it in four instructions.
enum class Pair : uint32_t {};
typedef uint32_t LooseBits __attribute__((aligned(2), may_alias));
typedef uint32_t PairVec __attribute__((vector_size(4 * kLanes)));
typedef uint32_t LoosePairVec __attribute__((vector_size(4 * kLanes), aligned(2), may_alias));
typedef uint16_t ShortVec __attribute__((vector_size(2 * kLanes)));
typedef uint16_t LooseShortVec __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));

inline PairVec load(const Pair* p) { return *reinterpret_cast<const LoosePairVec*>(p); }
inline ShortVec load(const uint16_t* p) { return *reinterpret_cast<const LooseShortVec*>(p); }
inline void store(uint16_t* p, ShortVec v) { *reinterpret_cast<LooseShortVec*>(p) = v; }
inline PairVec splat_bits(uint32_t x) { return PairVec{x, x, x, x, x, x, x, x}; }
inline PairVec splat(const Pair* p) { return splat_bits(*reinterpret_cast<const LooseBits*>(p)); }
inline Vec splat(const float* p) { return splat(*p); }

// To bfloat16, to the nearest, ties to even.
inline ShortVec narrow(Vec v) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<ShortVec>(_mm256_cvtneps_pbh(reinterpret_cast<__m256>(v)));
#else
  const PairVec bits = reinterpret_cast<PairVec>(v);
  const PairVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const PairVec quiet = (bits >> 16) | 0x40u;  // rounding a NaN could make it infinite
  return __builtin_convertvector(v == v ? rounded : quiet, ShortVec);
#endif
}

// From and to the type of what is in memory, float or bfloat16.
inline Vec widen(const float* p) { return load(p); }
inline Vec widen(const uint16_t* p) { return reinterpret_cast<Vec>(__builtin_convertvector(load(p), PairVec) << 16); }
inline void store_narrow(float* p, Vec v) { store(p, v); }
inline void store_narrow(uint16_t* p, Vec v) { store(p, narrow(v)); }

// What a product multiplies at once: a float, or a pair of bfloat16.
template <typename T>
struct FactorOf;
template <>
struct FactorOf<float> {
  typedef float Type;
};
template <>
struct FactorOf<uint16_t> {
  typedef Pair Type;
};
template <typename T>
constexpr int64_t kPerFactor = 4 / sizeof(T);

// Pairs of two vectors' lanes.
inline void store_pairs(uint16_t* p, ShortVec first, ShortVec second) {
#if defined(__clang__)
  store(p, __builtin_shufflevector(first, second, 0, 8, 1, 9, 2, 10, 3, 11));
  store(p + kLanes, __builtin_shufflevector(first, second, 4, 12, 5, 13, 6, 14, 7, 15));
#else
  store(p, __builtin_shuffle(first, second, ShortVec{0, 8, 1, 9, 2, 10, 3, 11}));
  store(p + kLanes, __builtin_shuffle(first, second, ShortVec{4, 12, 5, 13, 6, 14, 7, 15}));
#endif
}

inline Vec multiply_add(Vec sum, Vec a, Vec b) { return sum + a * b; }
inline Vec multiply_add(Vec sum, PairVec a, PairVec b) {
#if defined(__AVX512BF16__)
  return reinterpret_cast<Vec>(
      _mm256_dpbf16_ps(reinterpret_cast<__m256>(sum), reinterpret_cast<__m256bh>(a), reinterpret_cast<__m256bh>(b)));
#else
  const PairVec upper = splat_bits(0xffff0000u);
  sum += reinterpret_cast<Vec>(a & upper) * reinterpret_cast<Vec>(b & upper);
  return sum + reinterpret_cast<Vec>(a << 16) * reinterpret_cast<Vec>(b << 16);
#endif
}

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

// Eight rows of eight, transposed: out[j][i] = rows[i][j]; the leading dimension of out is ldo.
inline void transpose_rows(float* out, int64_t ldo, const float* const* rows) {
#if defined(__AVX__)
  __m256 whole[8], pairs[8];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) whole[i] = _mm256_loadu_ps(rows[i]);
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(whole[i], whole[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(whole[i], whole[i + 1]);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {
    whole[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    whole[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    whole[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    whole[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    _mm256_storeu_ps(out + j * ldo, _mm256_permute2f128_ps(whole[j], whole[j + 4], 0x20));
    _mm256_storeu_ps(out + (j + 4) * ldo, _mm256_permute2f128_ps(whole[j], whole[j + 4], 0x31));
  }
#else
  for (int i = 0; i < 8; ++i) {
    for (int j = 0; j < 8; ++j) {
      *reinterpret_cast<LooseBits*>(out + j * ldo + i) = *reinterpret_cast<const LooseBits*>(rows[i] + j);
    }
  }
#endif
}

// The same of rows that are ldi apart.
inline void transpose_block(float* out, int64_t ldo, const float* in, int64_t ldi) {
  const float* rows[8];
  for (int i = 0; i < 8; ++i) rows[i] = in + i * ldi;
  transpose_rows(out, ldo, rows);
}

// 2^x for x <= 0, as exact as a result of type T needs: for float a relative error below 3e-7 where it matters
// (x > -29), for bfloat16, which rounds by 2e-3, 8e-5; 2^-126 below -126; NaN stays NaN.
// 2^x = 2^n 2^r with n = round(x): x + 1.5 * 2^23 + 127 has n + 127, the exponent of 2^n, in its low bits. The
// polynomials are minimax fits on [-1/2, 1/2].
template <typename T>
inline Vec exp2_nonpositive(Vec x) {
  const Vec y = larger(splat(-126.0f), x);
  const Vec shifted = y + 12583039.0f;
  const Vec r = y - (shifted - 12583039.0f);
  Vec p;
  if constexpr (sizeof(T) == 2) {
    p = r * 5.51716700e-2f + 2.42611130e-1f;
    p = p * r + 6.93260990e-1f;
    p = p * r + 9.99928070e-1f;
  } else {
    p = r * 1.32764668e-3f + 9.67554129e-3f;
    p = p * r + 5.55071329e-2f;
    p = p * r + 2.40221197e-1f;
    p = p * r + 6.93146967e-1f;
    p = p * r + 1.00000007f;
  }
  return p * reinterpret_cast<Vec>(reinterpret_cast<IntVec>(shifted) << 23);
}

constexpr float kLog2E = 1.44269504f;

template <typename T>
inline Vec exp_nonpositive(Vec x) {
  return exp2_nonpositive<T>(x * kLog2E);
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

// The same with an absolute error below 2e-4 max(1, |x| / 300), for results in bfloat16.
// erf(x / sqrt 2) / 2 = x P(x^2), a minimax fit of what is multiplied with x on |x| <= 4, with 1/2 at its end.
inline Vec gelu_roughly(Vec x) {
  const Vec c = smaller(larger(x, splat(-4.0f)), splat(4.0f));
  const Vec t = c * c;
  Vec p = t * 2.2588207e-8f + -1.5888271e-6f;
  p = p * t + 4.7763886e-5f;
  p = p * t + -8.1218750e-4f;
  p = p * t + 8.7636914e-3f;
  p = p * t + -6.4554416e-2f;
  p = p * t + 3.9787027e-1f;
  return x * (c * p + 0.5f);
}

template <typename T>
inline Vec gelu_for(Vec x) {
  if constexpr (sizeof(T) == 2) {
    return gelu_roughly(x);
  } else {
    return gelu(x);
  }
}

// A factor of a product: element (row, column) at data[row * row_stride + column * column_stride]. Elements are floats,
// or pairs along the depth of the product.
template <typename E>
struct Matrix {
  const E* data;
  int64_t row_stride, column_stride;
};

template <int kRows, int kVectors, typename E>
inline void product_block(float* c, int64_t ldc, const E* a, const Matrix<E>& shape, const E* b, int64_t ldb,
                          int64_t depth, bool accumulate) {
  Vec sums[kRows][kVectors];
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) sums[i][j] = accumulate ? load(c + i * ldc + j * kLanes) : Vec{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    decltype(load(b)) row[kVectors];
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) row[j] = load(b + k * ldb + j * kLanes);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto factor = splat(a + i * shape.row_stride + k * shape.column_stride);
#pragma GCC unroll 12
      for (int j = 0; j < kVectors; ++j) sums[i][j] = multiply_add(sums[i][j], factor, row[j]);
    }
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sums[i][j]);
  }
}

// Sums that stay in registers: sixteen registers hold twelve, what two multiply-adds per cycle of latency four need,
// and thirty-two of them hold twenty-four.
#if defined(__AVX512VL__)
constexpr int kSums = 24;
#else
constexpr int kSums = 12;
#endif

template <int kVectors, typename E>
inline void product_columns(float* c, int64_t ldc, const Matrix<E>& a, const E* b, int64_t ldb, int64_t rows,
                            int64_t depth, bool accumulate) {
  constexpr int kRows = kSums / kVectors < 12 ? kSums / kVectors : 12;
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
template <bool kPacked, typename E>
inline void product(float* c, int64_t ldc, const Matrix<E>& a, const E* b, int64_t ldb, int64_t rows, int64_t vectors,
                    int64_t depth, bool accumulate) {
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    const E* columns = kPacked ? b + j * kLanes * depth : b + j * kLanes;
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
// cache, where rows of B would fill more lines than they need. As pairs, depth must be even.
inline void pack(Pair* packed, const float* b, int64_t ldb, int64_t vectors, int64_t depth) {
  uint16_t* out = reinterpret_cast<uint16_t*>(packed);
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    for (int64_t k = 0; k < depth; k += 2) {
      for (int64_t i = 0; i < block; ++i, out += 2 * kLanes) {
        const float* from = b + k * ldb + (j + i) * kLanes;
        store_pairs(out, narrow(load(from)), narrow(load(from + ldb)));
      }
    }
    j += block;
  }
}
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
