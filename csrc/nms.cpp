// A box is compared with the kept boxes, best first, until one suppresses it. That visits the same pairs as striking
// out after each kept box, but the boxes compared with lie densely in memory, in five arrays, and eight at a time need
// only one branch: a division is done only where the product form of the comparison says that it could matter.
#include "nms.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "arithmetic.h"

namespace sam_fast {
namespace {

constexpr int kLanes = 8;

// Kept boxes in groups of kLanes, the last one filled up with boxes whose area is NaN: they suppress nothing.
struct Group {
  float x1[kLanes], y1[kLanes], x2[kLanes], y2[kLanes], area[kLanes];
};

struct Box {
  float x1, y1, x2, y2, area;
};

// Keys that sort like this: descending score, then ascending index, NaN last.
uint64_t sort_key(float score, uint32_t index) { return (static_cast<uint64_t>(score_rank(score)) << 32) | index; }

float intersection(const Group& group, int i, const Box& box) {
  return intersection(group.x1[i], group.y1[i], group.x2[i], group.y2[i], box.x1, box.y1, box.x2, box.y2);
}

// `limit`: the largest float that is not above the threshold, so that comparing floats equals comparing in double.
bool suppresses(const Group& group, const Box& box, float limit) {
  float inter[kLanes], uni[kLanes];
  int maybe = 0;
  for (int i = 0; i < kLanes; ++i) {
    inter[i] = intersection(group, i, box);
    uni[i] = group.area[i] + box.area - inter[i];
    maybe |= may_exceed(inter[i], uni[i], limit);
  }
  if (maybe == 0) return false;
  for (int i = 0; i < kLanes; ++i) {
    if (inter[i] / uni[i] > limit) return true;
  }
  return false;
}

// The same for a negative threshold, which boxes that do not overlap exceed as well.
bool suppresses_below_zero(const Group& group, const Box& box, float limit) {
  for (int i = 0; i < kLanes; ++i) {
    const float inter = intersection(group, i, box);
    if (inter / (group.area[i] + box.area - inter) > limit) return true;
  }
  return false;
}

}  // namespace

int64_t nms(int64_t* kept, const float* boxes, const float* scores, int64_t n, double iou_threshold) {
  std::vector<uint64_t> order(static_cast<size_t>(n));
  for (int64_t i = 0; i < n; ++i) order[i] = sort_key(scores[i], static_cast<uint32_t>(i));
  std::sort(order.begin(), order.end());

  const float limit = largest_float_not_above(iou_threshold);
  const auto test = iou_threshold >= 0 ? suppresses : suppresses_below_zero;
  std::vector<Group> groups;
  int64_t count = 0;
  for (const uint64_t key : order) {
    const int64_t index = static_cast<int64_t>(key & 0xffffffffu);
    const float* b = boxes + 4 * index;
    const Box box{b[0], b[1], b[2], b[3], (b[2] - b[0]) * (b[3] - b[1])};
    bool suppressed = false;
    for (size_t g = 0; g < groups.size() && !suppressed; ++g) suppressed = test(groups[g], box, limit);
    if (suppressed) continue;
    const int lane = static_cast<int>(count % kLanes);
    if (lane == 0) {
      groups.emplace_back();
      std::fill_n(groups.back().area, kLanes, std::numeric_limits<float>::quiet_NaN());
    }
    Group& last = groups.back();
    last.x1[lane] = box.x1;
    last.y1[lane] = box.y1;
    last.x2[lane] = box.x2;
    last.y2[lane] = box.y2;
    last.area[lane] = box.area;
    kept[count++] = index;
  }
  return count;
}

}  // namespace sam_fast
