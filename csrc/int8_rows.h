// Rows of numbers to 8-bit integers and back, around products of integers: a scale per row, one zero for all.
// int8_rows_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

// T is float, or uint16_t for the bits of bfloat16.
template <typename T>
struct QuantiseArguments {
  int64_t rows, width;
  const T* x;            // [rows, width]
  const float* factors;  // [rows], what rows are multiplied with first; or null
  const float* bias;     // [width], then added; or null
  bool gelu;             // then applied
  int32_t most;          // the largest integer, without the zero `most` + 1 that is added to all
  uint8_t* integers;     // [rows, width]
  float* scales;         // [rows], of the integers without the zero
};

template <typename T>
struct ScaleArguments {
  int64_t rows, width;
  const float* x;        // [rows, width]
  const float* factors;  // [rows]
  const float* bias;     // [width] or null
  bool add;              // to what is there
  T* out;                // [rows, width]
};

template <typename T>
void quantise_rows(const QuantiseArguments<T>& arguments, int threads);
template <typename T>
void scale_rows(const ScaleArguments<T>& arguments, int threads);

// Rows [begin, end); `row` has room for one.
struct Int8RowsKernels {
  void (*quantise)(const QuantiseArguments<float>&, int64_t begin, int64_t end, float* row);
  void (*quantise_bf16)(const QuantiseArguments<uint16_t>&, int64_t begin, int64_t end, float* row);
  void (*scale)(const ScaleArguments<float>&, int64_t begin, int64_t end);
  void (*scale_bf16)(const ScaleArguments<uint16_t>&, int64_t begin, int64_t end);
};
extern const Int8RowsKernels kInt8RowsBase, kInt8RowsAvx2, kInt8RowsAvx512;

}  // namespace sam_fast
