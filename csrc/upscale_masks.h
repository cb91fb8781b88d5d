// The end of the mask decoder: each token of an image becomes 4 x 4 pixels by two transposed convolutions, and masks
// are linear classifiers of these pixels. The upscaled image is never made. upscale_masks.cpp schedules,
// upscale_masks_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

// N images of h x w tokens of C channels; C1 = C/4 channels after the first convolution, C2 = C/8 after the second.
struct UpscaleShape {
  int64_t images, height, width, channels, first_channels, second_channels, masks;
};

// T is float, or uint16_t for the bits of bfloat16: then factors of both convolutions are bfloat16, and all else
// float32.
template <typename T>
struct UpscaleArguments {
  UpscaleShape shape;
  const T* image;            // [N, h w, C]
  const T* first_weight;     // [4 C1, C]: row 2 i + j of four makes the pixel (i, j) of a square
  const float* first_bias;   // [C1]
  const float* norm_weight;  // [C1]
  const float* norm_bias;    // [C1]
  float eps;
  const T* second_weight;    // [4 C2, C1]
  const float* second_bias;  // [C2]
  const float* classifiers;  // [N, M, C2]
  float* logits;             // [N, M, 4h, 4w]
};

template <typename T>
void upscale_masks(const UpscaleArguments<T>& arguments, int threads);

constexpr int64_t kUpscaleTile = 24;  // tokens: three vectors
constexpr int64_t kMasksAtOnce = 4;

// In floats; enough for either type.
static inline int64_t upscale_workspace(const UpscaleShape& a) {
  return kUpscaleTile * (a.channels + 4 * a.first_channels + 4 * a.second_channels + 16 * a.masks) +
         kMasksAtOnce * a.second_channels;
}

// Logits of the tokens [begin, end) of one image.
template <typename T>
using UpscaleKernel = void (*)(const UpscaleArguments<T>&, int64_t image, int64_t begin, int64_t end, float* workspace);
extern const UpscaleKernel<float> kUpscaleBase, kUpscaleAvx2, kUpscaleAvx512;
extern const UpscaleKernel<uint16_t> kUpscaleBf16Base, kUpscaleBf16Avx2, kUpscaleBf16Avx512, kUpscaleBf16Avx512Bf16;

}  // namespace sam_fast
