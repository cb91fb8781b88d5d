// Low-resolution mask logits -> packed masks of the original image with area, stability and box, in one pass:
// bilinear low -> S x S, crop to the input size, bilinear -> original size, three thresholds. The float image is
// never made. postprocess_masks.cpp schedules, postprocess_masks_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

struct MaskGeometry {
  int32_t low_height, low_width;      // of the logits
  int32_t image_size;                 // S, side of the model's square input
  int32_t input_height, input_width;  // the part of S x S that shows the image
  int32_t height, width;              // of the original image
};

struct MaskThresholds {
  float mask, inner, outer;  // threshold, threshold + offset, threshold - offset
};

// area [N] int64: pixels above thresholds.mask; stability [N] float32: pixels above inner / pixels above outer, NaN if
// there are none; boxes [N,4] int64: inclusive XYXY, zeros if empty; bits [N,height,8*ceil(width/64)] or null.
// logits [N,low_height,low_width].
void postprocess_masks(int64_t* area, float* stability, int64_t* boxes, uint8_t* bits, const float* logits, int64_t n,
                       const MaskGeometry& geometry, const MaskThresholds& thresholds, int threads);

// output [N,height,width]: the float image itself. logits [N,low_height,low_width].
void resize_logits(float* output, const float* logits, int64_t n, const MaskGeometry& geometry, int threads);

// The same on a GPU, with the same roundings as a CPU that has fused multiply-adds. T is float, Half or Bfloat16; bits
// start at a multiple of 8 bytes; workspace [N,kMaskWorkspace].
constexpr int64_t kMaskWorkspace = 5;
template <typename T>
void postprocess_masks_cuda(int64_t* area, float* stability, int64_t* boxes, uint8_t* bits, int64_t* workspace,
                            const T* logits, int64_t n, const MaskGeometry& geometry, const MaskThresholds& thresholds,
                            void* stream);
template <typename T>
void resize_logits_cuda(float* output, const T* logits, int64_t n, const MaskGeometry& geometry, void* stream);

}  // namespace sam_fast
