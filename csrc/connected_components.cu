// Union-find on blocks of 2 x 2 pixels: the set pixels of a block are of one component, so that a quarter of the labels
// does, and a component's lowest block number orders components as OpenCV does. A warp sees the 32 blocks of a 64-bit
// word in two rows. Blocks that touch their left neighbours are joined to the first of them by a ballot; of the other
// contacts only those are united that do not follow from them, so that the inside of a region costs no atomic.
// Trees only ever point to lower numbers, by atomicMin: whatever the order, the lowest block is the root.
// Memory: 8 bytes per block. Limits: masks of fewer than 2**31 pixels.
// After Allegretti, Bolelli, Grana: Optimized Block-Based Algorithms to Label Connected Components on GPUs (2020).
#include "arithmetic.h"
#include "connected_components.h"
#include "launch.cuh"
#include "packed_masks.h"

namespace sam_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Masks whose regions are those of the ones, or with `inverted` of the zeros.
struct Regions {
  const uint64_t* bits;
  int64_t n, height, width;
  bool inverted;

  __host__ __device__ int64_t words() const { return row_words(width); }
  __host__ __device__ int64_t block_rows() const { return (height + 1) / 2; }
  __host__ __device__ int64_t block_columns() const { return (width + 1) / 2; }
  __host__ __device__ int64_t blocks() const { return block_rows() * block_columns(); }
  __host__ __device__ int64_t units() const { return n * block_rows() * words(); }

  __device__ uint64_t pixels(int64_t k) const { return k == words() - 1 ? last_word_mask(width) : ~uint64_t{0}; }
  // Word k of row y of a mask; zero outside of it.
  __device__ uint64_t word(int64_t mask, int64_t y, int64_t k) const {
    if (y < 0 || y >= height || k < 0 || k >= words()) return 0;
    const uint64_t word = bits[(mask * height + y) * words() + k];
    return (inverted ? ~word : word) & pixels(k);
  }
};

// What a warp works on: word k of block row `row` (pixel rows 2 * row and 2 * row + 1), a block a lane.
struct Unit {
  int64_t mask, row, k;
  int32_t column, block;  // of this lane; the column may be behind the last one

  __device__ Unit(const Regions& r, int64_t index)
      : mask(index / (r.words() * r.block_rows())), row(index / r.words() % r.block_rows()), k(index % r.words()) {
    column = static_cast<int32_t>(k * kWarp + lane_index());
    block = static_cast<int32_t>(row * r.block_columns() + column);
  }
};

template <typename Visit>
__device__ void for_each_unit(const Regions& regions, Visit visit) {
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < regions.units(); i += step) {
    visit(Unit(regions, i));
  }
}

// Four pixels of a row around a lane's block: bit 0 is the one to its left, bits 1 and 2 are its own, bit 3 follows.
__device__ inline unsigned four_pixels(const Regions& r, const Unit& unit, int64_t y) {
  const int lane = lane_index();
  const uint64_t word = r.word(unit.mask, y, unit.k);
  if (lane == 0) return (word << 1 & 14) | static_cast<unsigned>(r.word(unit.mask, y, unit.k - 1) >> 63);
  const unsigned four = word >> (2 * lane - 1) & 15;
  return lane < kWarp - 1 ? four : four | static_cast<unsigned>(r.word(unit.mask, y, unit.k + 1) & 1) << 3;
}

// Which neighbours the set pixels of a block touch, as far as that does not follow from other contacts.
struct Contacts {
  bool west, north, north_west, north_east;

  __device__ Contacts(const Regions& r, const Unit& unit) {
    const int64_t y = 2 * unit.row;
    const unsigned top = four_pixels(r, unit, y), both = top | four_pixels(r, unit, y + 1);
    const unsigned above = four_pixels(r, unit, y - 1), both_above = above | four_pixels(r, unit, y - 2);
    const auto joined = [](unsigned pixels, unsigned left) { return (pixels & left) != 0 && (pixels & 2 * left) != 0; };
    west = joined(both, 1);
    const bool touches_north = (above & 6) != 0 && (top & 6) != 0;
    const bool west_touches_its_north = west && (above & top & 1) != 0;
    const bool north_joined_west = joined(both_above, 1), north_joined_east = joined(both_above, 4);
    north = touches_north && !(west_touches_its_north && north_joined_west);
    north_west = (above & 1) != 0 && (top & 2) != 0 && !(touches_north && north_joined_west) && !west_touches_its_north;
    north_east = (above & 8) != 0 && (top & 4) != 0 && !(touches_north && north_joined_east);
  }
};

// ---- Union-find. Others may write at the same time: what is read is an ancestor at some time, and stays one.

__device__ inline int32_t parent_of(const int32_t* parent, int32_t block) {
  return *static_cast<const volatile int32_t*>(parent + block);
}

__device__ inline int32_t find(const int32_t* parent, int32_t block) {
  for (int32_t next = parent_of(parent, block); next != block; next = parent_of(parent, block)) block = next;
  return block;
}

__device__ inline void unite(int32_t* parent, int32_t a, int32_t b) {
  for (;;) {
    a = find(parent, a);
    b = find(parent, b);
    if (a == b) return;
    const int32_t low = min(a, b), high = max(a, b);
    const int32_t before = atomicMin(parent + high, low);
    if (before == high) return;  // it was a root, and hangs below the lower one now
    a = before;                  // it was not any more: what it hung below has to be united, too
    b = low;
  }
}

__global__ void __launch_bounds__(kThreads) begin_kernel(int32_t* parents, int32_t* areas, Regions regions) {
  for_each_unit(regions, [&](const Unit& unit) {
    const Contacts contacts(regions, unit);
    const int lane = lane_index();
    const unsigned starts = ~__ballot_sync(kAllLanes, contacts.west) | 1;
    const int first = 31 - __clz(static_cast<int>(starts & (kAllLanes >> (31 - lane))));
    if (unit.column >= regions.block_columns()) return;
    const int64_t at = unit.mask * regions.blocks() + unit.block;
    parents[at] = unit.block - (lane - first);
    areas[at] = 0;
  });
}

__global__ void __launch_bounds__(kThreads) unite_kernel(int32_t* parents, Regions regions) {
  for_each_unit(regions, [&](const Unit& unit) {
    const Contacts contacts(regions, unit);
    int32_t* parent = parents + unit.mask * regions.blocks();
    const int32_t above = unit.block - static_cast<int32_t>(regions.block_columns());
    if (contacts.west && lane_index() == 0) unite(parent, unit.block, unit.block - 1);
    if (contacts.north) unite(parent, unit.block, above);
    if (contacts.north_west) unite(parent, unit.block, above - 1);
    if (contacts.north_east) unite(parent, unit.block, above + 1);
  });
}

// Points every block at its root, and sums up the areas there.
__global__ void __launch_bounds__(kThreads) root_kernel(int32_t* parents, int32_t* areas, Regions regions) {
  for_each_unit(regions, [&](const Unit& unit) {
    const int64_t first = unit.mask * regions.blocks(), y = 2 * unit.row;
    const unsigned top = four_pixels(regions, unit, y) & 6, bottom = four_pixels(regions, unit, y + 1) & 6;
    int32_t root = -1;
    if ((top | bottom) != 0) {
      root = find(parents + first, unit.block);
      parents[first + unit.block] = root;
    }
    const unsigned same = __match_any_sync(kAllLanes, root);
    const unsigned area = __reduce_add_sync(same, static_cast<unsigned>(__popc(top) + __popc(bottom)));
    const bool speaks = __ffs(static_cast<int>(same)) - 1 == lane_index();
    if (root >= 0 && speaks) atomicAdd(areas + first + root, static_cast<int32_t>(area));
  });
}

void find_components(int32_t* parents, int32_t* areas, const Regions& regions, void* stream) {
  const int64_t blocks = ceil_div(regions.units(), kWarps);
  launch(begin_kernel, blocks, kThreads, stream, parents, areas, regions);
  launch(unite_kernel, blocks, kThreads, stream, parents, regions);
  launch(root_kernel, blocks, kThreads, stream, parents, areas, regions);
}

__device__ inline bool is_root(const int32_t* parents, const int32_t* areas, const Regions& regions, const Unit& unit) {
  const int64_t at = unit.mask * regions.blocks() + unit.block;
  return unit.column < regions.block_columns() && areas[at] > 0 && parents[at] == unit.block;
}

// ---- Labels.

// Calls visit(unit, whether the lane's block is a root) for the units of each row of blocks, a warp a row.
template <typename Visit>
__device__ void for_each_root_in_row(const int32_t* parents, const int32_t* areas, const Regions& regions, int64_t row,
                                     Visit visit) {
  for (int64_t k = 0; k < regions.words(); ++k) {
    const Unit unit(regions, row * regions.words() + k);
    visit(unit, is_root(parents, areas, regions, unit));
  }
}

// rows [N, block rows]: how many roots there are.
__global__ void __launch_bounds__(kThreads)
    count_roots_kernel(int64_t* rows, const int32_t* parents, const int32_t* areas, Regions regions) {
  const int64_t all = regions.n * regions.block_rows(), step = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < all; row += step) {
    int64_t count = 0;
    for_each_root_in_row(parents, areas, regions, row,
                         [&](const Unit&, bool root) { count += __popc(__ballot_sync(kAllLanes, root)); });
    if (lane_index() == 0) rows[row] = count;
  }
}

// rows: counts become sums of those before; count [N]: of all. A block a mask.
__global__ void __launch_bounds__(kThreads) row_sums_kernel(int64_t* count, int64_t* rows, Regions regions) {
  const int64_t size = regions.block_rows();
  for (int64_t mask = blockIdx.x; mask < regions.n; mask += gridDim.x) {
    int64_t sum = 0;
    for (int64_t base = 0; base < size; base += kThreads) {
      const int64_t i = base + threadIdx.x;
      int64_t total;
      const int64_t before = scan_block<kThreads>(i < size ? rows[mask * size + i] : 0, &total);
      if (i < size) rows[mask * size + i] = sum + before;
      sum += total;
    }
    if (threadIdx.x == 0) count[mask] = sum;
  }
}

// Replaces the areas of roots by the numbers of their components.
__global__ void __launch_bounds__(kThreads)
    number_kernel(int32_t* areas, const int64_t* rows, const int32_t* parents, Regions regions) {
  const int64_t all = regions.n * regions.block_rows(), step = int64_t{gridDim.x} * kWarps;
  for (int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; row < all; row += step) {
    int32_t number = 1 + static_cast<int32_t>(rows[row]);
    for_each_root_in_row(parents, areas, regions, row, [&](const Unit& unit, bool root) {
      const unsigned roots = __ballot_sync(kAllLanes, root);
      const unsigned before = roots & ((1u << lane_index()) - 1);
      if (root) areas[unit.mask * regions.blocks() + unit.block] = number + __popc(before);
      number += __popc(roots);
    });
  }
}

__global__ void __launch_bounds__(kThreads)
    label_kernel(int32_t* labels, const int32_t* parents, const int32_t* numbers, Regions regions) {
  const int64_t pixels = regions.height * regions.width, step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < regions.n * pixels; i += step) {
    const int64_t mask = i / pixels, y = i % pixels / regions.width, x = i % regions.width;
    const int64_t first = mask * regions.blocks();
    const bool set = (regions.word(mask, y, x / 64) >> (x % 64) & 1) != 0;
    labels[i] = set ? numbers[first + parents[first + y / 2 * regions.block_columns() + x / 2]] : 0;
  }
}

// ---- Small regions.

// Of a mask. `largest` is 0 or orders regions: by area, then by the lower block.
struct Judgement {
  unsigned long long largest;
  int32_t any_small, any_large;
};
static_assert(sizeof(Judgement) == kJudgement * sizeof(int64_t), "a row of the workspace");

__device__ inline unsigned long long region_order(int32_t area, int32_t root) {
  return static_cast<unsigned long long>(area) << 32 | (0xffffffffu - static_cast<unsigned>(root));
}

__global__ void __launch_bounds__(kThreads) judge_kernel(Judgement* judgements, const int32_t* parents,
                                                         const int32_t* areas, Regions regions, double area_threshold) {
  for_each_unit(regions, [&](const Unit& unit) {
    const bool root = is_root(parents, areas, regions, unit);
    const int32_t area = root ? areas[unit.mask * regions.blocks() + unit.block] : 0;
    const bool small = root && static_cast<double>(area) < area_threshold;
    const bool any_small = __any_sync(kAllLanes, small), any_large = __any_sync(kAllLanes, root && !small);
    unsigned long long largest = root ? region_order(area, unit.block) : 0;
    for (int step = kWarp / 2; step > 0; step /= 2) largest = max(largest, __shfl_xor_sync(kAllLanes, largest, step));
    if (lane_index() != 0) return;
    Judgement* mine = judgements + unit.mask;
    if (any_small) atomicOr(&mine->any_small, 1);
    if (any_large) atomicOr(&mine->any_large, 1);
    if (largest != 0) atomicMax(&mine->largest, largest);
  });
}

__global__ void __launch_bounds__(kThreads)
    remove_kernel(uint64_t* out, bool* changed, const Judgement* judgements, const int32_t* parents,
                  const int32_t* areas, Regions regions, double area_threshold) {
  for_each_unit(regions, [&](const Unit& unit) {
    const Judgement judgement = judgements[unit.mask];
    const int64_t first = unit.mask * regions.blocks(), y = 2 * unit.row;
    const bool keep_largest = judgement.any_large == 0 && !regions.inverted;
    const uint64_t upper = regions.word(unit.mask, y, unit.k), lower = regions.word(unit.mask, y + 1, unit.k);
    bool drop = false;
    if (((upper | lower) >> (2 * lane_index()) & 3) != 0) {
      const int32_t root = parents[first + unit.block], area = areas[first + root];
      const bool kept = keep_largest && region_order(area, root) == judgement.largest;
      drop = static_cast<double>(area) < area_threshold && !kept;
    }
    const uint64_t flips = double_bits(__ballot_sync(kAllLanes, drop));
    const int64_t row = y + lane_index();
    if (lane_index() < 2 && row < regions.height) {
      const uint64_t pixels = lane_index() == 0 ? upper : lower, kept = pixels & ~flips;
      out[(unit.mask * regions.height + row) * regions.words() + unit.k] =
          (regions.inverted ? ~kept : kept) & regions.pixels(unit.k);
    }
    if (unit.row == 0 && unit.k == 0 && lane_index() == 0) changed[unit.mask] = judgement.any_small != 0;
  });
}

}  // namespace

void connected_components_cuda(int32_t* labels, int64_t* count, int32_t* blocks, int64_t* rows, const uint8_t* bits,
                               int64_t n, int64_t height, int64_t width, void* stream) {
  const Regions regions = {reinterpret_cast<const uint64_t*>(bits), n, height, width, false};
  int32_t *parents = blocks, *areas = blocks + n * regions.blocks();
  const int64_t row_blocks = ceil_div(n * regions.block_rows(), kWarps);
  find_components(parents, areas, regions, stream);
  launch(count_roots_kernel, row_blocks, kThreads, stream, rows, parents, areas, regions);
  launch(row_sums_kernel, n, kThreads, stream, count, rows, regions);
  launch(number_kernel, row_blocks, kThreads, stream, areas, rows, parents, regions);
  launch(label_kernel, ceil_div(n * height * width, kThreads), kThreads, stream, labels, parents, areas, regions);
}

void remove_small_regions_cuda(uint8_t* out, bool* changed, int32_t* blocks, int64_t* judgements, const uint8_t* bits,
                               int64_t n, int64_t height, int64_t width, double area_threshold, bool holes,
                               void* stream) {
  const Regions regions = {reinterpret_cast<const uint64_t*>(bits), n, height, width, holes};
  int32_t *parents = blocks, *areas = blocks + n * regions.blocks();
  auto* judged = reinterpret_cast<Judgement*>(judgements);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (n == 0) return;
  check_cuda(cudaMemsetAsync(judged, 0, static_cast<size_t>(n) * sizeof(Judgement), queue), "clearing failed");
  check_cuda(cudaMemsetAsync(changed, 0, static_cast<size_t>(n), queue), "clearing failed");
  const int64_t grid = ceil_div(regions.units(), kWarps);
  find_components(parents, areas, regions, stream);
  launch(judge_kernel, grid, kThreads, stream, judged, parents, areas, regions, area_threshold);
  launch(remove_kernel, grid, kThreads, stream, reinterpret_cast<uint64_t*>(out), changed, judged, parents, areas,
         regions, area_threshold);
}

}  // namespace sam_fast
