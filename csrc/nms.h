// Greedy non-maximum suppression of boxes.
#pragma once

#include <cstdint>

namespace sam_fast {

// kept [N]: indices of the boxes that survive, by descending score; returns how many there are. boxes [N, 4] are XYXY,
// scores [N]. Boxes are visited by descending score, equal scores by index, NaN scores last; a box is suppressed when
// its IoU (float32, area (x2-x1)*(y2-y1)) with a kept one exceeds `iou_threshold`. A NaN IoU (0/0) exceeds nothing.
int64_t nms(int64_t* kept, const float* boxes, const float* scores, int64_t n, double iou_threshold);

}  // namespace sam_fast
