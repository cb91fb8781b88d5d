// The end of the mask decoder: each token of an image becomes 4 x 4 pixels by two transposed convolutions, and masks
// are linear classifiers of these pixels. The upscaled image is never made. upscale_masks.cpp schedules,
// upscale_masks_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

// N images of h x w tokens of C channels; C1 = C/4 channels after the first convolution, C2 = C/8 after the second.
struct UpscaleArguments {
  int64_t images, height, width, channels, first_channels, second_channels, masks;
  const float* image;         // [N, h w, C]
  const float* first_weight;  // [4 C1, C]: row 2 i + j of four makes the pixel (i, j) of a square
  const float* first_bias;    // [C1]
  const float* norm_weight;   // [C1]
  const float* norm_bias;     // [C1]
  float eps;
  const float* second_weight;  // [4 C2, C1]
  const float* second_bias;    // [C2]
  const float* classifiers;    // [N, M, C2]
  float* logits;               // [N, M, 4h, 4w]
};

void upscale_masks(const UpscaleArguments& arguments, int threads);

constexpr int64_t kUpscaleTile = 24;  // tokens: three vectors
constexpr int64_t kMasksAtOnce = 4;

static inline int64_t upscale_workspace(const UpscaleArguments& a) {
  return kUpscaleTile * (a.channels + 4 * a.first_channels + 4 * a.second_channels + 16 * a.masks) +
         kMasksAtOnce * a.second_channels;
}

// Logits of the tokens [begin, end) of one image.
using UpscaleKernel = void (*)(const UpscaleArguments&, int64_t image, int64_t begin, int64_t end, float* workspace);
extern const UpscaleKernel kUpscaleBase, kUpscaleAvx2, kUpscaleAvx512;

}  // namespace sam_fast
