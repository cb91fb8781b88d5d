// Shares rows out to threads.
#include "int8_rows.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int64_t kRowsTogether = 16;

template <typename T>
void run(void (*kernel)(const QuantiseArguments<T>&, int64_t, int64_t, float*), const QuantiseArguments<T>& a,
         int threads) {
  std::vector<float> memory(threads * a.width);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < a.rows; row += kRowsTogether) {
    kernel(a, row, std::min(row + kRowsTogether, a.rows), memory.data() + omp_get_thread_num() * a.width);
  }
}

template <typename T>
void run(void (*kernel)(const ScaleArguments<T>&, int64_t, int64_t), const ScaleArguments<T>& a, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < a.rows; row += kRowsTogether) kernel(a, row, std::min(row + kRowsTogether, a.rows));
}

}  // namespace

template <>
void quantise_rows(const QuantiseArguments<float>& arguments, int threads) {
  run(SAM_FAST_PICK(kInt8Rows).quantise, arguments, threads);
}

template <>
void quantise_rows(const QuantiseArguments<uint16_t>& arguments, int threads) {
  run(SAM_FAST_PICK(kInt8Rows).quantise_bf16, arguments, threads);
}

template <>
void scale_rows(const ScaleArguments<float>& arguments, int threads) {
  run(SAM_FAST_PICK(kInt8Rows).scale, arguments, threads);
}

template <>
void scale_rows(const ScaleArguments<uint16_t>& arguments, int threads) {
  run(SAM_FAST_PICK(kInt8Rows).scale_bf16, arguments, threads);
}

}  // namespace sam_fast
