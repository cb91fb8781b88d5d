// Values of masks at output pixels, interpolated twice: low -> S x S -> original size. What two neighbouring rows share
// stays in registers:
//   source row r  -> samples: the row at the two grid columns of each output column   (once per row of the logits)
//   grid row y    -> line: both at grid row y, blended to output columns              (once per row of S x S)
//   output row    -> two lines blended
#pragma once

#include "arithmetic.h"
#include "launch.cuh"
#include "postprocess_masks.h"

namespace sam_fast {
namespace {

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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const Tap row = taps.grid[i];
    const T* top = source + static_cast<int64_t>(row.first) * g.low_width;
    const T* bottom = source + static_cast<int64_t>(row.second) * g.low_width;
#pragma unroll
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

}  // namespace
}  // namespace sam_fast
