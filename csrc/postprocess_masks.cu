// A warp takes a run of tiles of one mask, 64 columns by kTileRows rows of the output each.
//
// First its lanes look at the logits that a tile reads, a lane per tile (or all lanes at one tile after the other,
// where there are few tiles for many warps). A tile whose logits lie on one side of every threshold is certain: it is
// counted without interpolation. Most tiles are. The others the warp makes one by one, stepping down their rows: lane i
// has columns i and i + 32; values are compared with three thresholds, a ballot makes a word of bits.
//
// The float image is never in memory: of a mask, 256 KB of logits are read and H * W / 8 bytes of bits are written,
// instead of about 20 bytes per pixel. Counts are summed over a run in registers and then by atomics on integers, so
// results do not depend on the order. Limits: sides below 2**24, where floats count exactly.
#include "arithmetic.h"
#include "launch.cuh"
#include "mask_values.cuh"
#include "postprocess_masks.h"

// Warps that keep a GPU busy several times over: with fewer tiles each has one. Tests set it to a few.
#if !defined(SAM_FAST_TALLY_WARPS)
#define SAM_FAST_TALLY_WARPS 16384
#endif

namespace sam_fast {
namespace {

constexpr int kWarps = 4;                                     // of a block
constexpr int kTileColumns = 64;                              // of the output
constexpr int kTileRows = 32;                                 // one per lane
constexpr int kMostTiles = kWarp;                             // of a run: one per lane
constexpr int kFewTiles = 8;                                  // fewer of a run are tested by all lanes together
constexpr int kMostTestedSamples = kTileColumns * kTileRows;  // a tile that reads more is computed untested

// Sums of a mask. Sides of the box are stored such that 0 means none and larger is further out.
struct MaskSums {
  unsigned long long area, inner, outer;
  int32_t from_right, right_end, from_bottom, bottom_end;  // width - left, right + 1, height - top, bottom + 1
};
static_assert(sizeof(MaskSums) == kMaskWorkspace * sizeof(int64_t), "a row of the workspace");

// ---- Certain tiles.

struct Sides {
  int mask, inner, outer;  // of the threshold: 1 above, -1 below, 0 uncertain
  __device__ bool certain() const { return mask != 0 && inner != 0 && outer != 0; }
};

struct Extent {
  float least, most;
  bool sided;  // no sample is NaN, infinite or huge

  __device__ Sides sides(const MaskThresholds& t) const {
    if (!sided) return {0, 0, 0};
    return {side_of(least, most, t.mask), side_of(least, most, t.inner), side_of(least, most, t.outer)};
  }
};

// The samples that a tile reads, every `step`th from `first` on.
template <typename T>
__device__ Extent extent_of_tile(const T* source, const MaskGeometry& g, int32_t x0, int32_t y0, int32_t first,
                                 int32_t step) {
  const int32_t x1 = min(x0 + kTileColumns, g.width) - 1, y1 = min(y0 + kTileRows, g.height) - 1;
  const int32_t left = grid_column_tap(g, bilinear_tap<true>(x0, g.input_width, g.width).first).first;
  const int32_t right = grid_column_tap(g, bilinear_tap<true>(x1, g.input_width, g.width).second).second;
  const int32_t top = row_taps(g, y0).grid[0].first, bottom = row_taps(g, y1).grid[1].second;
  const int32_t width = right - left + 1;
  const int64_t samples = static_cast<int64_t>(width) * (bottom - top + 1);
  Extent extent = {kHuge, -kHuge, samples <= kMostTestedSamples};
  if (!extent.sided) return extent;
  int32_t column = first % width;
  const T* row = source + static_cast<int64_t>(top + first / width) * g.low_width + left;
  for (int32_t i = first; i < static_cast<int32_t>(samples); i += step) {
    const float value = widen(row[column]);
    extent.sided = extent.sided && value < kHuge && value > -kHuge;
    extent.least = fminf(extent.least, value);
    extent.most = fmaxf(extent.most, value);
    for (column += step; column >= width; column -= width) row += g.low_width;
  }
  return extent;
}

// The same of all samples, by all lanes; each returns the same.
template <typename T>
__device__ Extent extent_together(const T* source, const MaskGeometry& g, int32_t x0, int32_t y0) {
  Extent extent = extent_of_tile(source, g, x0, y0, lane_index(), kWarp);
  extent.sided = __all_sync(kAllLanes, extent.sided);
  for (int step = kWarp / 2; step > 0; step /= 2) {
    extent.least = fminf(extent.least, __shfl_xor_sync(kAllLanes, extent.least, step));
    extent.most = fmaxf(extent.most, __shfl_xor_sync(kAllLanes, extent.most, step));
  }
  return extent;
}

// ---- Runs of tiles.

// How masks are divided: into tiles, row by row, and these into runs.
struct Runs {
  int64_t across, tiles;  // of a mask; tiles side by side and in all
  int64_t each;           // tiles of a run
  int64_t per_mask, count;

  __host__ __device__ Runs(const MaskGeometry& g, int64_t n)
      : across((g.width + kTileColumns - 1) / kTileColumns),
        tiles(across * ((g.height + kTileRows - 1) / kTileRows)),
        each(min(max(n * tiles / SAM_FAST_TALLY_WARPS, int64_t{1}), int64_t{kMostTiles})),
        per_mask((tiles + each - 1) / each),
        count(n * per_mask) {}
};

// What a lane counted.
class Tally {
 public:
  // A tile on one side of each threshold, by one lane.
  __device__ void add_certain(const MaskGeometry& g, const Sides& sides, int32_t x, int32_t y) {
    const int32_t columns = min(kTileColumns, g.width - x), rows = min(kTileRows, g.height - y);
    if (sides.inner > 0) inner_ += columns * rows;
    if (sides.outer > 0) outer_ += columns * rows;
    if (sides.mask > 0) {
      area_ += columns * rows;
      enclose(g.width - x, x + columns, g.height - y, y + rows);
    }
  }

  // A row of a tile by its word of bits.
  __device__ void add_row(const MaskGeometry& g, uint64_t word, int32_t x, int32_t y) {
    if (word == 0) return;
    area_ += __popcll(word);
    enclose(g.width - (x + __ffsll(static_cast<long long>(word)) - 1), x + 64 - __clzll(static_cast<long long>(word)),
            g.height - y, y + 1);
  }

  // A value of a tile.
  __device__ void add_value(float value, const MaskThresholds& t) {
    if (value > t.inner) ++inner_;
    if (value > t.outer) ++outer_;
  }

  // Adds what all lanes counted to their mask.
  __device__ void add_to(MaskSums* sums) const {
    const unsigned area = __reduce_add_sync(kAllLanes, area_);
    const unsigned inner = __reduce_add_sync(kAllLanes, inner_), outer = __reduce_add_sync(kAllLanes, outer_);
    const unsigned from_right = __reduce_max_sync(kAllLanes, from_right_);
    const unsigned right_end = __reduce_max_sync(kAllLanes, right_end_);
    const unsigned from_bottom = __reduce_max_sync(kAllLanes, from_bottom_);
    const unsigned bottom_end = __reduce_max_sync(kAllLanes, bottom_end_);
    const int lane = lane_index();
    if (lane == 0 && area != 0) atomicAdd(&sums->area, static_cast<unsigned long long>(area));
    if (lane == 1 && inner != 0) atomicAdd(&sums->inner, static_cast<unsigned long long>(inner));
    if (lane == 2 && outer != 0) atomicAdd(&sums->outer, static_cast<unsigned long long>(outer));
    if (area == 0) return;
    if (lane == 3) atomicMax(&sums->from_right, static_cast<int32_t>(from_right));
    if (lane == 4) atomicMax(&sums->right_end, static_cast<int32_t>(right_end));
    if (lane == 5) atomicMax(&sums->from_bottom, static_cast<int32_t>(from_bottom));
    if (lane == 6) atomicMax(&sums->bottom_end, static_cast<int32_t>(bottom_end));
  }

 private:
  __device__ void enclose(int32_t from_right, int32_t right_end, int32_t from_bottom, int32_t bottom_end) {
    from_right_ = max(from_right_, static_cast<unsigned>(from_right));
    right_end_ = max(right_end_, static_cast<unsigned>(right_end));
    from_bottom_ = max(from_bottom_, static_cast<unsigned>(from_bottom));
    bottom_end_ = max(bottom_end_, static_cast<unsigned>(bottom_end));
  }

  unsigned area_ = 0, inner_ = 0, outer_ = 0;
  unsigned from_right_ = 0, right_end_ = 0, from_bottom_ = 0, bottom_end_ = 0;
};

template <bool kSmall, typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    tally_kernel(MaskSums* sums, uint64_t* bits, const T* logits, int64_t n, MaskGeometry g, MaskThresholds t) {
  __shared__ RowTaps taps_of_warps[kWarps][kTileRows];
  const Runs runs(g, n);
  const int64_t words = (static_cast<int64_t>(g.width) + 63) / 64;
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  RowTaps* const taps = taps_of_warps[warp];
  for (int64_t run = int64_t{blockIdx.x} * kWarps + warp; run < runs.count; run += int64_t{gridDim.x} * kWarps) {
    const int64_t mask = run / runs.per_mask, first = run % runs.per_mask * runs.each;
    const T* source = logits + mask * g.low_height * g.low_width;
    const int count = static_cast<int>(min(runs.each, runs.tiles - first));
    // Of lane i: tile i.
    const int32_t x = static_cast<int32_t>((first + lane) % runs.across * kTileColumns);
    const int32_t y = static_cast<int32_t>((first + lane) / runs.across * kTileRows);
    Sides sides = {0, 0, 0};
    if (count >= kFewTiles) {
      if (lane < count) sides = extent_of_tile(source, g, x, y, 0, 1).sides(t);
    } else {
      for (int i = 0; i < count; ++i) {
        const Extent extent = extent_together(source, g, __shfl_sync(kAllLanes, x, i), __shfl_sync(kAllLanes, y, i));
        if (lane == i) sides = extent.sides(t);
      }
    }
    Tally tally;
    const bool certain = sides.certain();
    if (certain) tally.add_certain(g, sides, x, y);
    unsigned left = __ballot_sync(kAllLanes, lane < count && (!certain || bits != nullptr));
    for (; left != 0; left &= left - 1) {
      const int i = __ffs(static_cast<int>(left)) - 1;
      const int32_t tile_x = __shfl_sync(kAllLanes, x, i), tile_y = __shfl_sync(kAllLanes, y, i);
      const int side = __shfl_sync(kAllLanes, certain ? sides.mask : 0, i);
      const int32_t rows = min(kTileRows, g.height - tile_y);
      uint64_t word = 0;  // of row `lane`
      if (side > 0) {
        word = ~uint64_t{0} >> (kTileColumns - min(kTileColumns, g.width - tile_x));
      } else if (side == 0) {
        __syncwarp();  // the taps of the tile before were read
        if (lane < rows) taps[lane] = row_taps(g, tile_y + lane);
        __syncwarp();
        for_each_row<kSmall>(source, g, taps, rows, tile_x + lane, [&](int32_t row, const float (&value)[2]) {
          const uint64_t low = __ballot_sync(kAllLanes, value[0] > t.mask);
          const uint64_t high = __ballot_sync(kAllLanes, value[1] > t.mask);
          if (row == lane) word = high << 32 | low;
          tally.add_value(value[0], t);
          tally.add_value(value[1], t);
        });
        tally.add_row(g, word, tile_x, tile_y + lane);
      }
      if (bits != nullptr && lane < rows) {
        bits[(mask * g.height + tile_y + lane) * words + tile_x / kTileColumns] = word;
      }
    }
    tally.add_to(sums + mask);
  }
}

__global__ void finish_kernel(int64_t* area, float* stability, int64_t* boxes, const MaskSums* sums, int64_t n,
                              int32_t height, int32_t width) {
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) {
    const MaskSums all = sums[i];
    const bool empty = all.area == 0;
    area[i] = static_cast<int64_t>(all.area);
    stability[i] = static_cast<float>(all.inner) / static_cast<float>(all.outer);
    boxes[4 * i] = empty ? 0 : width - all.from_right;
    boxes[4 * i + 1] = empty ? 0 : height - all.from_bottom;
    boxes[4 * i + 2] = empty ? 0 : all.right_end - 1;
    boxes[4 * i + 3] = empty ? 0 : all.bottom_end - 1;
  }
}

__host__ __device__ inline int64_t blocks_across(const MaskGeometry& g) {
  return (g.width + int64_t{kTileColumns} * kWarps - 1) / (kTileColumns * kWarps);
}

// A warp makes 64 columns by kTileRows rows; those of a block lie side by side.
template <bool kSmall, typename T>
__global__ void __launch_bounds__(kWarps* kWarp)
    resize_kernel(float* output, const T* logits, int64_t n, MaskGeometry g) {
  __shared__ RowTaps taps[kTileRows];
  const int64_t across = blocks_across(g), down = (g.height + kTileRows - 1) / kTileRows;
  for (int64_t index = blockIdx.x; index < n * across * down; index += gridDim.x) {
    const int64_t mask = index / (across * down);
    const int32_t y = static_cast<int32_t>(index / across % down * kTileRows), rows = min(kTileRows, g.height - y);
    __syncthreads();  // the taps of the rows before were read
    if (static_cast<int32_t>(threadIdx.x) < rows)
      taps[threadIdx.x] = row_taps(g, y + static_cast<int32_t>(threadIdx.x));
    __syncthreads();
    const int64_t strip = index % across * kWarps + threadIdx.x / kWarp;
    const int32_t x = static_cast<int32_t>(strip * kTileColumns) + lane_index();
    if (x >= g.width) continue;
    float* pixels = output + (mask * g.height + y) * g.width + x;
    for_each_row<kSmall>(logits + mask * g.low_height * g.low_width, g, taps, rows, x,
                         [&](int32_t row, const float (&value)[2]) {
                           float* pixel = pixels + static_cast<int64_t>(row) * g.width;
                           pixel[0] = value[0];
                           if (x + kWarp < g.width) pixel[kWarp] = value[1];
                         });
  }
}

}  // namespace

template <typename T>
void postprocess_masks_cuda(int64_t* area, float* stability, int64_t* boxes, uint8_t* bits, int64_t* workspace,
                            const T* logits, int64_t n, const MaskGeometry& geometry, const MaskThresholds& thresholds,
                            void* stream) {
  if (n == 0) return;
  auto* sums = reinterpret_cast<MaskSums*>(workspace);
  auto* words = reinterpret_cast<uint64_t*>(bits);
  check_cuda(cudaMemsetAsync(sums, 0, static_cast<size_t>(n) * sizeof(MaskSums), static_cast<cudaStream_t>(stream)),
             "clearing the counts of masks failed");
  const auto kernel = has_small_side(geometry) ? tally_kernel<true, T> : tally_kernel<false, T>;
  launch(kernel, ceil_div(Runs(geometry, n).count, kWarps), kWarps * kWarp, stream, sums, words, logits, n, geometry,
         thresholds);
  launch(finish_kernel, ceil_div(n, 128), 128, stream, area, stability, boxes, sums, n, geometry.height,
         geometry.width);
}

template <typename T>
void resize_logits_cuda(float* output, const T* logits, int64_t n, const MaskGeometry& geometry, void* stream) {
  const auto kernel = has_small_side(geometry) ? resize_kernel<true, T> : resize_kernel<false, T>;
  const int64_t blocks = n * blocks_across(geometry) * ceil_div(geometry.height, kTileRows);
  launch(kernel, blocks, kWarps * kWarp, stream, output, logits, n, geometry);
}

#define SAM_FAST_INSTANTIATE(T)                                                                              \
  template void postprocess_masks_cuda<T>(int64_t*, float*, int64_t*, uint8_t*, int64_t*, const T*, int64_t, \
                                          const MaskGeometry&, const MaskThresholds&, void*);                \
  template void resize_logits_cuda<T>(float*, const T*, int64_t, const MaskGeometry&, void*);
SAM_FAST_INSTANTIATE(float)
SAM_FAST_INSTANTIATE(Half)
SAM_FAST_INSTANTIATE(Bfloat16)
#undef SAM_FAST_INSTANTIATE

}  // namespace sam_fast
