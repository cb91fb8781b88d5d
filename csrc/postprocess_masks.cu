// A warp makes a tile of 64 columns (a word of bits: lane i has columns i and i + 32) by kTileRows rows of one mask,
// stepping down the rows. What two neighbouring rows share stays in registers:
//   source row r  -> samples: the row at the two grid columns of each output column   (once per row of the logits)
//   grid row y    -> line: both at grid row y, blended to output columns              (once per row of S x S)
//   output row    -> two lines blended, compared with three thresholds, a ballot for the bits
// A tile whose samples lie on one side of every threshold is filled without interpolation. The float image is never in
// memory: of a mask, 256 KB of logits are read and H * W / 8 bytes of bits are written, instead of about 20 bytes per
// pixel. Counts are summed over a tile in registers and then by atomics on integers, so results do not depend on the
// order. Limits: sides below 2**24, where floats count exactly.
#include "arithmetic.h"
#include "launch.cuh"
#include "postprocess_masks.h"

namespace sam_fast {
namespace {

constexpr int kStrips = 4;                                    // warps of a block: neighbouring tiles
constexpr int kTileColumns = 64;                              // of the output
constexpr int kTileRows = 32;                                 // one per lane
constexpr int kMostTestedSamples = kTileColumns * kTileRows;  // a tile that reads more is computed untested

// Sums of a mask. Sides of the box are stored such that 0 means none and larger is further out.
struct MaskSums {
  unsigned long long area, inner, outer;
  int32_t from_right, right_end, from_bottom, bottom_end;  // width - left, right + 1, height - top, bottom + 1
};
static_assert(sizeof(MaskSums) == kMaskWorkspace * sizeof(int64_t), "a row of the workspace");

// The grid rows of an output row, and the source rows of both.
struct RowTaps {
  Tap output, grid[2];
};

__device__ inline Tap grid_row_tap(const MaskGeometry& g, int32_t y) {
  return bilinear_tap<true>(y, g.low_height, g.image_size);
}
__device__ inline Tap grid_column_tap(const MaskGeometry& g, int32_t x) {
  return bilinear_tap<true>(x, g.low_width, g.image_size);
}

__device__ inline RowTaps row_taps(const MaskGeometry& g, int32_t y) {
  const Tap output = bilinear_tap<true>(y, g.input_height, g.height);
  return {output, {grid_row_tap(g, output.first), grid_row_tap(g, output.second)}};
}

// ---- Values.

// An output column of a lane: the two source columns of both of its grid columns, and the weights of all.
struct Column {
  int32_t source[4];
  float weight[4], across[2];
};

// Columns behind the last one come out as NaN, which is above no threshold.
__device__ inline Column make_column(const MaskGeometry& g, int32_t x) {
  const bool inside = x < g.width;
  const Tap output = bilinear_tap<true>(inside ? x : g.width - 1, g.input_width, g.width);
  const Tap first = grid_column_tap(g, output.first), second = grid_column_tap(g, output.second);
  const float nothing = float_of_bits(0x7fc00000);
  return {{first.first, first.second, second.first, second.second},
          {first.first_weight, first.second_weight, second.first_weight, second.second_weight},
          {inside ? output.first_weight : nothing, inside ? output.second_weight : nothing}};
}

// The values of a lane's two columns, row after row: rows must not go up.
template <typename T>
class Strip {
 public:
  __device__ Strip(const T* source, const MaskGeometry& g, int32_t x)
      : source_(source), width_(g.low_width), column_{make_column(g, x), make_column(g, x + kWarp)} {}

  __device__ void row(const RowTaps& taps, float (&value)[2]) {
    need_line(0, taps.output.first, taps.grid[0]);
    need_line(1, taps.output.second, taps.grid[1]);
    for (int c = 0; c < 2; ++c) {
      value[c] = blend<true>(line_[0][c], taps.output.first_weight, line_[1][c], taps.output.second_weight);
    }
  }

 private:
  // Slot 0 is asked for before slot 1, so each may have what is wanted for the other.
  __device__ void need_line(int slot, int32_t row, const Tap& tap) {
    if (line_row_[slot] == row) return;
    const int other = 1 - slot;
    if (line_row_[other] == row) {
      for (int c = 0; c < 2; ++c) line_[slot][c] = line_[other][c];
    } else {
      need_samples(0, tap.first);
      need_samples(1, tap.second);
      for (int c = 0; c < 2; ++c) {
        float side[2];
        for (int s = 0; s < 2; ++s) {
          side[s] = blend<true>(sample_[0][c][s], tap.first_weight, sample_[1][c][s], tap.second_weight);
        }
        line_[slot][c] = blend<true>(side[0], column_[c].across[0], side[1], column_[c].across[1]);
      }
    }
    line_row_[slot] = row;
  }

  __device__ void need_samples(int slot, int32_t row) {
    if (sample_row_[slot] == row) return;
    const int other = 1 - slot;
    const bool known = sample_row_[other] == row;
    const T* values = source_ + static_cast<int64_t>(row) * width_;
    for (int c = 0; c < 2; ++c) {
      const Column& column = column_[c];
      for (int s = 0; s < 2; ++s) {
        sample_[slot][c][s] = known ? sample_[other][c][s]
                                    : blend<true>(widen(values[column.source[2 * s]]), column.weight[2 * s],
                                                  widen(values[column.source[2 * s + 1]]), column.weight[2 * s + 1]);
      }
    }
    sample_row_[slot] = row;
  }

  const T* source_;
  int64_t width_;
  Column column_[2];
  float sample_[2][2][2] = {};  // [slot][column][grid column]
  float line_[2][2] = {};       // [slot][column]
  int32_t sample_row_[2] = {-1, -1}, line_row_[2] = {-1, -1};
};

// One value where a side is small: there the CPU's kernels weight four samples at once (kSmallOutputSides).
template <typename T>
__device__ float small_value(const T* source, const MaskGeometry& g, const RowTaps& taps, int32_t x) {
  const Tap across = bilinear_tap<true>(x, g.input_width, g.width);
  const bool small_grid = 2 * g.image_size <= kSmallOutputSides;
  float grid[2][2];
  for (int i = 0; i < 2; ++i) {
    const Tap row = taps.grid[i];
    const T* top = source + static_cast<int64_t>(row.first) * g.low_width;
    const T* bottom = source + static_cast<int64_t>(row.second) * g.low_width;
    for (int j = 0; j < 2; ++j) {
      const Tap column = grid_column_tap(g, j == 0 ? across.first : across.second);
      const float a = widen(top[column.first]), b = widen(top[column.second]);
      const float c = widen(bottom[column.first]), d = widen(bottom[column.second]);
      grid[i][j] = small_grid
                       ? bilinear_small<true>(a, b, c, d, row, column)
                       : blend<true>(blend<true>(a, column.first_weight, b, column.second_weight), row.first_weight,
                                     blend<true>(c, column.first_weight, d, column.second_weight), row.second_weight);
    }
  }
  if (g.height + g.width <= kSmallOutputSides) {
    return bilinear_small<true>(grid[0][0], grid[0][1], grid[1][0], grid[1][1], taps.output, across);
  }
  return blend<true>(
      blend<true>(grid[0][0], across.first_weight, grid[0][1], across.second_weight), taps.output.first_weight,
      blend<true>(grid[1][0], across.first_weight, grid[1][1], across.second_weight), taps.output.second_weight);
}

__host__ __device__ inline bool has_small_side(const MaskGeometry& g) {
  return 2 * g.image_size <= kSmallOutputSides || g.height + g.width <= kSmallOutputSides;
}

// Calls visit(row of the tile, values of the lane's two columns) for each row of a tile.
template <bool kSmall, typename T, typename Visit>
__device__ void for_each_row(const T* source, const MaskGeometry& g, const RowTaps* taps, int32_t rows, int32_t x,
                             Visit visit) {
  float value[2];
  if constexpr (kSmall) {
    for (int32_t r = 0; r < rows; ++r) {
      for (int c = 0; c < 2; ++c) {
        const int32_t at = x + c * kWarp;
        value[c] = at < g.width ? small_value(source, g, taps[r], at) : float_of_bits(0x7fc00000);
      }
      visit(r, value);
    }
  } else {
    Strip<T> strip(source, g, x);
    for (int32_t r = 0; r < rows; ++r) {
      strip.row(taps[r], value);
      visit(r, value);
    }
  }
}

// ---- Certain tiles.

struct Sides {
  int mask, inner, outer;  // of the threshold: 1 above, -1 below, 0 uncertain
  __device__ bool certain() const { return mask != 0 && inner != 0 && outer != 0; }
};

// The side on which all samples of a tile lie; every lane returns the same.
template <typename T>
__device__ Sides sides_of_tile(const T* source, const MaskGeometry& g, const RowTaps* taps, int32_t rows, int32_t x0,
                               const MaskThresholds& thresholds) {
  const int32_t x1 = min(x0 + kTileColumns, g.width) - 1;
  const int32_t left = grid_column_tap(g, bilinear_tap<true>(x0, g.input_width, g.width).first).first;
  const int32_t right = grid_column_tap(g, bilinear_tap<true>(x1, g.input_width, g.width).second).second;
  const int32_t top = taps[0].grid[0].first, bottom = taps[rows - 1].grid[1].second;
  const int32_t width = right - left + 1;
  const int64_t samples = static_cast<int64_t>(width) * (bottom - top + 1);
  if (samples > kMostTestedSamples) return {0, 0, 0};
  float least = kHuge, most = -kHuge;
  bool sided = true;
  for (int32_t i = lane_index(); i < static_cast<int32_t>(samples); i += kWarp) {
    const float value = widen(source[static_cast<int64_t>(top + i / width) * g.low_width + left + i % width]);
    sided = sided && value < kHuge && value > -kHuge;
    least = fminf(least, value);
    most = fmaxf(most, value);
  }
  if (!__all_sync(kAllLanes, sided)) return {0, 0, 0};
  for (int step = kWarp / 2; step > 0; step /= 2) {
    least = fminf(least, __shfl_xor_sync(kAllLanes, least, step));
    most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, step));
  }
  return {side_of(least, most, thresholds.mask), side_of(least, most, thresholds.inner),
          side_of(least, most, thresholds.outer)};
}

// ---- Tiles.

// Where a block's tiles lie: kStrips tiles side by side.
struct TileGrid {
  int64_t across, down, count;  // groups of tiles of a mask, and of all masks

  __host__ __device__ TileGrid(const MaskGeometry& g, int64_t n)
      : across((g.width + int64_t{kTileColumns} * kStrips - 1) / (kTileColumns * kStrips)),
        down((g.height + kTileRows - 1) / kTileRows),
        count(n * across * down) {}
};

struct Tile {
  int64_t mask;
  int32_t x, y, rows;

  __device__ Tile(const TileGrid& grid, const MaskGeometry& g, int64_t index)
      : mask(index / (grid.across * grid.down)),
        x(static_cast<int32_t>((index % grid.across * kStrips + threadIdx.x / kWarp) * kTileColumns)),
        y(static_cast<int32_t>(index / grid.across % grid.down * kTileRows)),
        rows(min(kTileRows, g.height - y)) {}
};

// The taps of the block's rows, by all of its threads.
__device__ inline void share_taps(RowTaps* taps, const MaskGeometry& g, const Tile& tile) {
  __syncthreads();  // those of the tile before were read
  const int32_t row = static_cast<int32_t>(threadIdx.x);
  if (row < tile.rows) taps[row] = row_taps(g, tile.y + row);
  __syncthreads();
}

// Adds a tile's counts to its mask. `word`: the bits of the tile's row `lane`; inner and outer: pixels of this lane.
__device__ inline void add_tile(MaskSums* sums, const MaskGeometry& g, const Tile& tile, uint64_t word, int32_t inner,
                                int32_t outer) {
  const unsigned area = __reduce_add_sync(kAllLanes, static_cast<unsigned>(__popcll(word)));
  const unsigned inner_sum = __reduce_add_sync(kAllLanes, static_cast<unsigned>(inner));
  const unsigned outer_sum = __reduce_add_sync(kAllLanes, static_cast<unsigned>(outer));
  const uint64_t columns = static_cast<uint64_t>(__reduce_or_sync(kAllLanes, static_cast<unsigned>(word >> 32))) << 32 |
                           __reduce_or_sync(kAllLanes, static_cast<unsigned>(word));
  const unsigned occupied = __ballot_sync(kAllLanes, word != 0);
  const int lane = lane_index();
  if (lane == 0 && area != 0) atomicAdd(&sums->area, static_cast<unsigned long long>(area));
  if (lane == 1 && inner_sum != 0) atomicAdd(&sums->inner, static_cast<unsigned long long>(inner_sum));
  if (lane == 2 && outer_sum != 0) atomicAdd(&sums->outer, static_cast<unsigned long long>(outer_sum));
  if (area == 0) return;
  if (lane == 3) atomicMax(&sums->from_right, g.width - (tile.x + __ffsll(static_cast<long long>(columns)) - 1));
  if (lane == 4) atomicMax(&sums->right_end, tile.x + 64 - __clzll(static_cast<long long>(columns)));
  if (lane == 5) atomicMax(&sums->from_bottom, g.height - (tile.y + __ffs(static_cast<int>(occupied)) - 1));
  if (lane == 6) atomicMax(&sums->bottom_end, tile.y + 32 - __clz(static_cast<int>(occupied)));
}

template <bool kSmall, typename T>
__global__ void __launch_bounds__(kStrips* kWarp)
    tally_kernel(MaskSums* sums, uint64_t* bits, const T* logits, int64_t n, MaskGeometry g, MaskThresholds t) {
  __shared__ RowTaps taps[kTileRows];
  const TileGrid grid(g, n);
  const int64_t words = (static_cast<int64_t>(g.width) + 63) / 64;
  const int lane = lane_index();
  for (int64_t index = blockIdx.x; index < grid.count; index += gridDim.x) {
    const Tile tile(grid, g, index);
    share_taps(taps, g, tile);
    if (tile.x >= g.width) continue;
    const T* source = logits + tile.mask * g.low_height * g.low_width;
    uint64_t word = 0;  // of row `lane`
    int32_t inner = 0, outer = 0;
    const Sides sides = sides_of_tile(source, g, taps, tile.rows, tile.x, t);
    if (sides.certain()) {
      const int32_t valid = min(kTileColumns, g.width - tile.x);
      if (lane < tile.rows) {
        word = sides.mask > 0 ? ~uint64_t{0} >> (kTileColumns - valid) : 0;
        inner = sides.inner > 0 ? valid : 0;
        outer = sides.outer > 0 ? valid : 0;
      }
    } else {
      for_each_row<kSmall>(source, g, taps, tile.rows, tile.x + lane, [&](int32_t row, const float (&value)[2]) {
        const uint64_t low = __ballot_sync(kAllLanes, value[0] > t.mask);
        const uint64_t high = __ballot_sync(kAllLanes, value[1] > t.mask);
        if (row == lane) word = high << 32 | low;
        for (int c = 0; c < 2; ++c) {
          inner += value[c] > t.inner;
          outer += value[c] > t.outer;
        }
      });
    }
    if (bits != nullptr && lane < tile.rows) {
      bits[(tile.mask * g.height + tile.y + lane) * words + tile.x / kTileColumns] = word;
    }
    add_tile(sums + tile.mask, g, tile, word, inner, outer);
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

template <bool kSmall, typename T>
__global__ void __launch_bounds__(kStrips* kWarp)
    resize_kernel(float* output, const T* logits, int64_t n, MaskGeometry g) {
  __shared__ RowTaps taps[kTileRows];
  const TileGrid grid(g, n);
  for (int64_t index = blockIdx.x; index < grid.count; index += gridDim.x) {
    const Tile tile(grid, g, index);
    share_taps(taps, g, tile);
    const int32_t x = tile.x + lane_index();
    if (x >= g.width) continue;
    float* pixels = output + (tile.mask * g.height + tile.y) * g.width + x;
    for_each_row<kSmall>(logits + tile.mask * g.low_height * g.low_width, g, taps, tile.rows, x,
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
  launch(kernel, TileGrid(geometry, n).count, kStrips * kWarp, stream, sums, words, logits, n, geometry, thresholds);
  launch(finish_kernel, ceil_div(n, 128), 128, stream, area, stability, boxes, sums, n, geometry.height,
         geometry.width);
}

template <typename T>
void resize_logits_cuda(float* output, const T* logits, int64_t n, const MaskGeometry& geometry, void* stream) {
  const auto kernel = has_small_side(geometry) ? resize_kernel<true, T> : resize_kernel<false, T>;
  launch(kernel, TileGrid(geometry, n).count, kStrips * kWarp, stream, output, logits, n, geometry);
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
