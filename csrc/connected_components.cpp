// Components are found by union-find on horizontal runs instead of pixels: a mask of two million pixels has a few
// thousand runs, which XOR of a word with itself shifted by one reads off 64 pixels at a time.
#include "connected_components.h"

#include <omp.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "packed_masks.h"

namespace sam_fast {
namespace {

// Pixels [begin, end) of a row. `parent` is an index into the array of runs, of a run not behind this one; a run that
// is its own parent stands for its component.
struct Run {
  int32_t begin, end, row, parent;
  int64_t area;  // of the component, where the run stands for one
};

struct Regions {
  const uint8_t* bits;
  int64_t height, width;
  bool inverted;  // regions are those of the zeros

  const uint8_t* row(int64_t y) const { return bits + y * row_bytes(width); }
  uint64_t word(const uint8_t* row, int64_t k) const {
    const uint64_t pixels = k == row_words(width) - 1 ? last_word_mask(width) : ~uint64_t{0};
    return (load_word(row, k) ^ (inverted ? ~uint64_t{0} : 0)) & pixels;
  }
};

int64_t count_runs(const Regions& mask) {
  int64_t runs = 0;
  for (int64_t y = 0; y < mask.height; ++y) {
    uint64_t carry = 0;
    for (int64_t k = 0; k < row_words(mask.width); ++k) {
      const uint64_t word = mask.word(mask.row(y), k);
      const uint64_t begins = word & ~((word << 1) | carry);
      carry = word >> 63;
      if (begins != 0) runs += __builtin_popcountll(begins);
    }
  }
  return runs;
}

// Writes the runs of row `y` and returns the end of them.
Run* read_runs(Run* out, const Regions& mask, int64_t y) {
  const uint8_t* row = mask.row(y);
  int64_t begin = 0;
  bool open = false;
  uint64_t carry = 0;
  for (int64_t k = 0; k < row_words(mask.width); ++k) {
    const uint64_t word = mask.word(row, k);
    uint64_t changes = word ^ ((word << 1) | carry);
    carry = word >> 63;
    for (; changes != 0; changes &= changes - 1) {
      const int64_t x = 64 * k + __builtin_ctzll(changes);
      if (open) {
        *out++ = {static_cast<int32_t>(begin), static_cast<int32_t>(x), static_cast<int32_t>(y), 0, 0};
      } else {
        begin = x;
      }
      open = !open;
    }
  }
  if (open) *out++ = {static_cast<int32_t>(begin), static_cast<int32_t>(mask.width), static_cast<int32_t>(y), 0, 0};
  return out;
}

int32_t find(Run* runs, int32_t i) {
  while (runs[i].parent != i) {
    runs[i].parent = runs[runs[i].parent].parent;
    i = runs[i].parent;
  }
  return i;
}

void unite(Run* runs, int32_t a, int32_t b) {
  a = find(runs, a);
  b = find(runs, b);
  runs[std::max(a, b)].parent = std::min(a, b);
}

// Fills `runs` with the runs of the mask in reading order, each with the run that stands for its component as parent,
// and those with the component's area. Returns how many runs there are.
int32_t find_components(Run* runs, const Regions& mask) {
  int32_t above = 0, here = 0;  // first runs of the row above and of this one
  for (int64_t y = 0; y < mask.height; ++y) {
    const int32_t stop = static_cast<int32_t>(read_runs(runs + here, mask, y) - runs);
    for (int32_t i = here; i < stop; ++i) runs[i].parent = i;
    for (int32_t a = above, b = here; a < here && b < stop;) {
      // Ends are exclusive, so that equality is a contact by a corner.
      if (runs[a].begin <= runs[b].end && runs[b].begin <= runs[a].end) unite(runs, a, b);
      runs[a].end < runs[b].end ? ++a : ++b;
    }
    above = here;
    here = stop;
  }
  for (int32_t i = 0; i < here; ++i) {
    runs[i].parent = runs[runs[i].parent].parent;
    runs[runs[i].parent].area += runs[i].end - runs[i].begin;
  }
  return here;
}

// Replaces each component's area by its number and returns how many components there are.
int64_t number_components(Run* runs, int32_t size) {
  for (int32_t i = 0; i < size; ++i) runs[i].area = 0;
  int64_t count = 0;
  const auto visit = [&](const Run& run) {
    int64_t& number = runs[run.parent].area;
    if (number == 0) number = ++count;
  };
  for (int32_t i = 0; i < size;) {
    const int32_t block_row = runs[i].row / 2;
    int32_t j = i;
    while (j < size && runs[j].row == 2 * block_row) ++j;
    const int32_t upper_stop = j;
    while (i < upper_stop || (j < size && runs[j].row == 2 * block_row + 1)) {
      const bool lower_left = j < size && runs[j].row == 2 * block_row + 1;
      const bool take_upper = i < upper_stop && (!lower_left || runs[i].begin / 2 <= runs[j].begin / 2);
      visit(runs[take_upper ? i++ : j++]);
    }
    i = j;
  }
  return count;
}

// The largest component; of several, the one whose first 2 x 2 block comes first.
int32_t largest_component(const Run* runs, int32_t size, int64_t width) {
  int64_t best_area = 0, best_block = std::numeric_limits<int64_t>::max();
  int32_t best = -1;
  for (int32_t i = 0; i < size; ++i) {
    const int64_t area = runs[runs[i].parent].area;
    const int64_t block = (runs[i].row / 2) * ((width + 1) / 2) + runs[i].begin / 2;
    if (area < best_area || (area == best_area && block >= best_block)) continue;
    best_area = area;
    best_block = block;
    best = runs[i].parent;
  }
  return best;
}

bool remove_small_regions_of_one(uint8_t* out, const Regions& mask, double area_threshold, Run* runs) {
  const int64_t stride = row_bytes(mask.width), last = row_words(mask.width) - 1;
  std::memcpy(out, mask.bits, static_cast<size_t>(mask.height * stride));
  for (int64_t y = 0; y < mask.height; ++y) {
    uint8_t* row = out + y * stride;
    store_word(row, last, load_word(row, last) & last_word_mask(mask.width));
  }
  const int32_t size = find_components(runs, mask);
  bool any_small = false, all_small = true;
  for (int32_t i = 0; i < size; ++i) {
    if (runs[i].parent != i) continue;
    const bool small = static_cast<double>(runs[i].area) < area_threshold;
    any_small |= small;
    all_small &= small;
  }
  if (!any_small) return false;
  const int32_t kept = all_small && !mask.inverted ? largest_component(runs, size, mask.width) : -1;
  for (int32_t i = 0; i < size; ++i) {
    const int32_t component = runs[i].parent;
    if (component == kept || !(static_cast<double>(runs[component].area) < area_threshold)) continue;
    flip_range(out + runs[i].row * stride, runs[i].begin, runs[i].end);
  }
  return true;
}

// Calls visit(n, mask, scratch for its runs) for each mask.
template <typename Visit>
void for_each_mask(const uint8_t* bits, int64_t n, int64_t height, int64_t width, bool inverted, int num_threads,
                   Visit visit) {
  if (n == 0 || height == 0 || width == 0) return;
  const int threads = worth_threads(n, height * width) ? static_cast<int>(std::min<int64_t>(num_threads, n)) : 1;
  const int64_t stride = height * row_bytes(width);
  int64_t most = 0;
#pragma omp parallel for num_threads(threads) schedule(dynamic) reduction(max : most) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) most = std::max(most, count_runs({bits + i * stride, height, width, inverted}));
  std::vector<Run> scratch(static_cast<size_t>(threads * most));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    visit(i, Regions{bits + i * stride, height, width, inverted}, scratch.data() + omp_get_thread_num() * most);
  }
}

}  // namespace

void connected_components(int32_t* labels, int64_t* count, const uint8_t* bits, int64_t n, int64_t height,
                          int64_t width, int num_threads) {
  std::fill(count, count + n, int64_t{0});
  for_each_mask(bits, n, height, width, false, num_threads, [&](int64_t i, const Regions& mask, Run* runs) {
    int32_t* mine = labels + i * height * width;
    const int32_t size = find_components(runs, mask);
    count[i] = number_components(runs, size);
    std::fill(mine, mine + height * width, 0);
    for (int32_t r = 0; r < size; ++r) {
      int32_t* row = mine + runs[r].row * width;
      std::fill(row + runs[r].begin, row + runs[r].end, static_cast<int32_t>(runs[runs[r].parent].area));
    }
  });
}

void remove_small_regions(uint8_t* out, bool* changed, const uint8_t* bits, int64_t n, int64_t height, int64_t width,
                          double area_threshold, bool holes, int num_threads) {
  std::fill(changed, changed + n, false);
  const int64_t stride = height * row_bytes(width);
  for_each_mask(bits, n, height, width, holes, num_threads, [&](int64_t i, const Regions& mask, Run* runs) {
    changed[i] = remove_small_regions_of_one(out + i * stride, mask, area_threshold, runs);
  });
}

}  // namespace sam_fast
