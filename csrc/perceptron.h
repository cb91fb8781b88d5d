// A perceptron on few rows, such as the tokens of a prompt: linear layers with ReLU between them, then a residual and a
// LayerNorm. General matrix products first copy weights into an order of their own, which for so few rows costs more
// than the product; here weights are read once, where they are. perceptron.cpp schedules, perceptron_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

struct PerceptronLayer {
  int64_t inputs, outputs;
  const float* weight;  // [outputs, inputs]
  const float* bias;    // [outputs]
};

struct PerceptronArguments {
  int64_t rows, count;            // M rows, and layers, at least one
  const float* x;                 // [M, inputs of the first layer]
  const PerceptronLayer* layers;  // [count]
  const float* residual;          // [M, outputs of the last layer], or null
  const float* norm_weight;       // [outputs of the last layer], or null: no LayerNorm
  const float* norm_bias;
  float eps;
  float* output;  // [M, outputs of the last layer]
};

void perceptron(const PerceptronArguments& arguments, int threads);

struct PerceptronKernels {
  // Columns [begin, end) of y [rows, outputs] = x W^T + b, with `relu` the positive part of it.
  void (*linear)(float* y, const float* x, int64_t rows, const PerceptronLayer& layer, int64_t begin, int64_t end,
                 bool relu);
  // Residual and LayerNorm of one row, in place.
  void (*finish)(float* row, const PerceptronArguments& arguments, int64_t index);
};

extern const PerceptronKernels kPerceptronBase, kPerceptronAvx2, kPerceptronAvx512;

}  // namespace sam_fast
