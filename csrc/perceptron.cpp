// Schedules a perceptron: threads share the outputs of each layer, and wait for each other after it.
#include "perceptron.h"

#include <algorithm>
#include <memory>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int64_t kOutputsAtOnce = 16;
constexpr int64_t kSmall = 1 << 15;  // weights: for fewer of them a second thread would come too late

}  // namespace

void perceptron(const PerceptronArguments& arguments, int threads) {
  const int64_t rows = arguments.rows, last = arguments.count - 1;
  if (rows == 0) return;
  const PerceptronKernels& kernel = SAM_FAST_PICK(kPerceptron);
  int64_t weights = 0, widest = 0;
  for (int64_t i = 0; i <= last; ++i) {
    weights += arguments.layers[i].inputs * arguments.layers[i].outputs;
    if (i < last) widest = std::max(widest, arguments.layers[i].outputs);
  }
  // Allocated here: an exception must not leave a parallel region.
  const std::unique_ptr<float[]> hidden(new float[2 * rows * widest]);
#pragma omp parallel num_threads(threads) if (weights > kSmall)
  {
    const float* x = arguments.x;
    for (int64_t i = 0; i <= last; ++i) {
      const PerceptronLayer& layer = arguments.layers[i];
      float* const y = i == last ? arguments.output : hidden.get() + i % 2 * rows * widest;
#pragma omp for schedule(static)
      for (int64_t begin = 0; begin < layer.outputs; begin += kOutputsAtOnce) {
        kernel.linear(y, x, rows, layer, begin, std::min(begin + kOutputsAtOnce, layer.outputs), i < last);
      }
      x = y;
    }
    if (arguments.residual != nullptr || arguments.norm_weight != nullptr) {
#pragma omp for schedule(static)
      for (int64_t row = 0; row < rows; ++row) {
        kernel.finish(arguments.output + row * arguments.layers[last].outputs, arguments, row);
      }
    }
  }
}

}  // namespace sam_fast
