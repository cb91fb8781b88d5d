// Greedy non-maximum suppression of boxes.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

namespace sam_fast {

// kept [N]: indices of the boxes that survive, by descending score; returns how many there are. boxes [N, 4] are XYXY,
// scores [N]. Boxes are visited by descending score, equal scores by index, NaN scores last; a box is suppressed when
// its IoU (float32, area (x2-x1)*(y2-y1)) with a kept one exceeds `iou_threshold`. A NaN IoU (0/0) exceeds nothing.
int64_t nms(int64_t* kept, const float* boxes, const float* scores, int64_t n, double iou_threshold);

// The same on a GPU, in two steps around a sort by the caller: keys [N] from scores [N], and from the keys in ascending
// order kept [N] and count [1]. N < 2**31; workspace [nms_workspace(N)] int64.
void nms_keys_cuda(int64_t* keys, const float* scores, int64_t n, void* stream);
int64_t nms_workspace(int64_t n);
void nms_cuda(int64_t* kept, int64_t* count, int64_t* workspace, const int64_t* keys, const float* boxes, int64_t n,
              double iou_threshold, void* stream);

// Comparing floats with this equals comparing them with `value` in double.
inline float largest_float_not_above(double value) {
  const float rounded = static_cast<float>(value);
  return static_cast<double>(rounded) > value ? std::nextafter(rounded, -std::numeric_limits<float>::infinity())
                                              : rounded;
}

}  // namespace sam_fast
