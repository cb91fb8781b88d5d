// A warp walks down 32 columns of a mask: each lane loads one of 32 rows, XOR with the row above marks where runs
// start, and only rows that have starts (few) are looked at by all lanes, a column each. The first walk counts the
// starts of each column, sums of the counts say where the codes of a column go, and the second walk writes them:
// column-major order without a transposition or a sort. A code is kept as the end of its run, so that run lengths come
// from neighbours. Sums are int64: a mask may have more than 2**31 pixels.
#include "arithmetic.h"
#include "launch.cuh"
#include "packed_masks.h"
#include "rle.h"

namespace sam_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// Groups of 32 columns, of which the last one holds column `width`: that of the zeros to the right of a mask.
__host__ __device__ inline int64_t column_groups(const Placement& place) { return place.width / kWarp + 1; }

// The 32 columns that a warp walks down.
class Columns {
 public:
  __device__ Columns(const uint32_t* bits, const Placement& place, int64_t group)
      : bits_(bits), height_(place.height), stride_(2 * row_words(place.width)), group_(group) {
    const int64_t left = place.width - group * kWarp;
    pixels_ = left >= kWarp ? kAllLanes : left > 0 ? (1u << left) - 1 : 0;
  }

  // Row y, zero outside of the mask.
  __device__ uint32_t row(int64_t y) const {
    return pixels_ != 0 && y < height_ ? bits_[y * stride_ + group_] & pixels_ : 0;
  }

  // What comes before row 0 in a mask as high as its canvas: the bottom of the columns to the left.
  __device__ uint32_t bottom_of_the_left() const {
    const uint32_t before = group_ > 0 ? bits_[(height_ - 1) * stride_ + group_ - 1] >> (kWarp - 1) : 0;
    return row(height_ - 1) << 1 | before;
  }

  __device__ uint32_t pixels() const { return pixels_; }

 private:
  const uint32_t* bits_;
  int64_t height_, stride_, group_;
  uint32_t pixels_;  // of the 32 columns, those that the mask has
};

// Calls visit(y, starts) with ascending y for every row in which runs start; bit i of `starts` is column i of the 32.
// As on the CPU, y may be `height` and the column `width`, and a start at the very end of the canvas is none.
template <typename Visit>
__device__ void for_each_run_start(const uint32_t* bits, const Placement& place, int64_t group, Visit visit) {
  if (place.height == 0 || place.width == 0) return;
  const Columns columns(bits, place, group);
  const int lane = lane_index();
  const bool full_height = place.height == place.canvas_height;
  const bool at_right_edge = place.x0 + place.width == place.canvas_width;
  const bool at_corner = at_right_edge && place.y0 + place.height == place.canvas_height;
  const int64_t rows = place.height + (full_height ? 0 : 1);
  uint32_t above_all = full_height ? columns.bottom_of_the_left() : 0;
  uint32_t next = columns.row(lane);
  for (int64_t base = 0; base < rows; base += kWarp) {
    const uint32_t word = next;
    const int64_t y = base + lane;
    next = columns.row(y + kWarp);
    uint32_t above = __shfl_up_sync(kAllLanes, word, 1);
    if (lane == 0) above = above_all;
    above_all = __shfl_sync(kAllLanes, word, kWarp - 1);
    uint32_t starts = y < rows ? word ^ above : 0;
    if (y == 0 && at_right_edge) starts &= columns.pixels();
    if (y == place.height && at_corner && (place.width - 1) / kWarp == group) {
      starts &= ~(1u << ((place.width - 1) % kWarp));
    }
    unsigned occupied = __ballot_sync(kAllLanes, starts != 0);
    for (; occupied != 0; occupied &= occupied - 1) {
      const int row = __ffs(static_cast<int>(occupied)) - 1;
      visit(base + row, __shfl_sync(kAllLanes, starts, row));
    }
  }
}

// Calls visit(mask, group) for each mask and group of columns, a warp each.
template <typename Visit>
__device__ void for_each_group(int64_t n, const Placement& place, Visit visit) {
  const int64_t groups = column_groups(place);
  const int64_t step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < n * groups; i += step) {
    visit(i / groups, i % groups);
  }
}

__device__ inline const uint32_t* mask_bits(const uint32_t* bits, const Placement& place, int64_t mask) {
  return bits + mask * place.height * 2 * row_words(place.width);
}

__global__ void __launch_bounds__(kThreads)
    count_kernel(int64_t* columns, const uint32_t* bits, int64_t n, Placement place) {
  const int lane = lane_index();
  for_each_group(n, place, [&](int64_t mask, int64_t group) {
    int64_t count = 0;
    for_each_run_start(mask_bits(bits, place, mask), place, group,
                       [&](int64_t, uint32_t starts) { count += starts >> lane & 1; });
    const int64_t x = group * kWarp + lane;
    if (x <= place.width) columns[mask * (place.width + 1) + x] = count;
  });
}

// columns [N, width]: counts become sums of those before; sizes [N]: one more than all, for the last run. A block each.
__global__ void __launch_bounds__(kThreads)
    column_sums_kernel(int64_t* sizes, int64_t* columns, int64_t n, int64_t width) {
  for (int64_t mask = blockIdx.x; mask < n; mask += gridDim.x) {
    int64_t* mine = columns + mask * width;
    int64_t sum = 0;
    for (int64_t base = 0; base < width; base += kThreads) {
      const int64_t x = base + threadIdx.x;
      int64_t total;
      const int64_t before = scan_block<kThreads>(x < width ? mine[x] : 0, &total);
      if (x < width) mine[x] = sum + before;
      sum += total;
    }
    if (threadIdx.x == 0) sizes[mask] = sum + 1;
  }
}

// offsets [N+1]: sizes in offsets[1..N] become offsets. One block.
__global__ void __launch_bounds__(kThreads) offsets_kernel(int64_t* offsets, int64_t n) {
  int64_t sum = 0;
  for (int64_t base = 0; base < n; base += kThreads) {
    const int64_t i = base + threadIdx.x;
    const int64_t size = i < n ? offsets[1 + i] : 0;
    int64_t total;
    const int64_t before = scan_block<kThreads>(size, &total);
    if (i < n) offsets[1 + i] = sum + before + size;
    sum += total;
  }
  if (threadIdx.x == 0) offsets[0] = 0;
}

__global__ void __launch_bounds__(kThreads) ends_kernel(int64_t* ends, const int64_t* offsets, const int64_t* columns,
                                                        const uint32_t* bits, int64_t n, Placement place) {
  const int lane = lane_index();
  for_each_group(n, place, [&](int64_t mask, int64_t group) {
    const int64_t x = group * kWarp + lane;
    int64_t at = offsets[mask] + (x <= place.width ? columns[mask * (place.width + 1) + x] : 0);
    const int64_t column_start = (place.x0 + x) * place.canvas_height + place.y0;
    for_each_run_start(mask_bits(bits, place, mask), place, group, [&](int64_t y, uint32_t starts) {
      if ((starts >> lane & 1) != 0) ends[at++] = column_start + y;
    });
    if (x == 0) ends[offsets[mask + 1] - 1] = place.canvas_height * place.canvas_width;
  });
}

__global__ void __launch_bounds__(kThreads)
    counts_kernel(int64_t* counts, const int64_t* ends, const int64_t* offsets, int64_t n) {
  for (int64_t mask = blockIdx.x; mask < n; mask += gridDim.x) {
    const int64_t begin = offsets[mask], size = offsets[mask + 1] - begin;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      counts[begin + i] = i == 0 ? ends[begin] : ends[begin + i] - ends[begin + i - 1];
    }
  }
}

// ---- COCO's strings.

// What the string stores for run i of a mask.
__device__ inline int64_t stored_value(const int64_t* counts, int64_t i) {
  return i > 2 ? counts[i] - counts[i - 2] : counts[i];
}

// sizes [N]: the characters of each mask's string. A block each.
__global__ void __launch_bounds__(kThreads)
    sizes_kernel(int64_t* sizes, const int64_t* counts, const int64_t* offsets, int64_t n) {
  for (int64_t mask = blockIdx.x; mask < n; mask += gridDim.x) {
    const int64_t begin = offsets[mask], size = offsets[mask + 1] - begin;
    int64_t characters = 0;
    for (int64_t i = threadIdx.x; i < size; i += kThreads) {
      characters += count_characters(stored_value(counts + begin, i));
    }
    int64_t total;
    scan_block<kThreads>(characters, &total);
    if (threadIdx.x == 0) sizes[mask] = total;
  }
}

__global__ void __launch_bounds__(kThreads) text_kernel(uint8_t* text, int64_t capacity, const int64_t* string_offsets,
                                                        const int64_t* counts, const int64_t* offsets, int64_t n) {
  for (int64_t mask = blockIdx.x; mask < n; mask += gridDim.x) {
    const int64_t begin = offsets[mask], size = offsets[mask + 1] - begin;
    int64_t at = string_offsets[mask];
    for (int64_t base = 0; base < size; base += kThreads) {
      const int64_t i = base + threadIdx.x;
      const int64_t value = i < size ? stored_value(counts + begin, i) : 0;
      const int64_t length = i < size ? count_characters(value) : 0;
      int64_t total;
      const int64_t mine = at + scan_block<kThreads>(length, &total);
      if (i < size && mine + length <= capacity) write_characters(text + mine, value);
      at += total;
    }
  }
}

// ---- Decoding, as on the CPU: marks where the value changes on the way down a column, then sums them up (mod 2).

// Flips pixels [begin, end) of a row.
__device__ inline void flip_range_atomically(unsigned long long* row, int64_t begin, int64_t end) {
  for (int64_t x = begin; x < end;) {
    const int64_t k = x / 64, stop = min(end, 64 * (k + 1));
    atomicXor(row + k, static_cast<unsigned long long>(last_word_mask(stop - x) << (x % 64)));
    x = stop;
  }
}

__global__ void __launch_bounds__(kThreads)
    mark_kernel(unsigned long long* bits, const int64_t* sums, const int64_t* offsets, int64_t n, int64_t height,
                int64_t width) {
  const int64_t words = row_words(width);
  for (int64_t mask = blockIdx.x; mask < n; mask += gridDim.x) {
    const int64_t first = offsets[mask], size = offsets[mask + 1] - first;
    unsigned long long* mine = bits + mask * height * words;
    for (int64_t i = 1 + 2 * int64_t{threadIdx.x}; i < size; i += 2 * kThreads) {
      const int64_t begin = sums[first + i] - sums[first], end = sums[first + i + 1] - sums[first];
      if (begin < 0 || begin >= end || end > height * width) continue;
      const int64_t x0 = begin / height, y0 = begin % height, x1 = end / height, y1 = end % height;
      flip_range_atomically(mine + y0 * words, x0, x0 + 1);
      flip_range_atomically(mine, x0 + 1, x1 + (y1 > 0 ? 1 : 0));  // columns that the run enters from the top
      if (y1 > 0) flip_range_atomically(mine + y1 * words, x1, x1 + 1);
    }
  }
}

__global__ void __launch_bounds__(kThreads)
    sum_rows_kernel(unsigned long long* bits, int64_t n, int64_t height, int64_t words) {
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < n * words; i += step) {
    unsigned long long* column = bits + i / words * height * words + i % words;
    unsigned long long sum = 0;
    for (int64_t y = 0; y < height; ++y) {
      sum ^= column[y * words];
      column[y * words] = sum;
    }
  }
}

}  // namespace

void rle_offsets_cuda(int64_t* offsets, int64_t* columns, const uint8_t* bits, int64_t n, const Placement& place,
                      void* stream) {
  const auto* in = reinterpret_cast<const uint32_t*>(bits);
  launch(count_kernel, ceil_div(n * column_groups(place), kWarps), kThreads, stream, columns, in, n, place);
  launch(column_sums_kernel, n, kThreads, stream, offsets + 1, columns, n, place.width + 1);
  launch(offsets_kernel, 1, kThreads, stream, offsets, n);
}

void rle_ends_cuda(int64_t* ends, const int64_t* offsets, const int64_t* columns, const uint8_t* bits, int64_t n,
                   const Placement& place, void* stream) {
  const auto* in = reinterpret_cast<const uint32_t*>(bits);
  launch(ends_kernel, ceil_div(n * column_groups(place), kWarps), kThreads, stream, ends, offsets, columns, in, n,
         place);
}

void rle_counts_cuda(int64_t* counts, const int64_t* ends, const int64_t* offsets, int64_t n, void* stream) {
  launch(counts_kernel, n, kThreads, stream, counts, ends, offsets, n);
}

void rle_strings_cuda(uint8_t* text, int64_t capacity, int64_t* string_offsets, const int64_t* counts,
                      const int64_t* offsets, int64_t n, void* stream) {
  launch(sizes_kernel, n, kThreads, stream, string_offsets + 1, counts, offsets, n);
  launch(offsets_kernel, 1, kThreads, stream, string_offsets, n);
  launch(text_kernel, n, kThreads, stream, text, capacity, string_offsets, counts, offsets, n);
}

void rle_decode_cuda(uint8_t* bits, const int64_t* sums, const int64_t* offsets, int64_t n, int64_t height,
                     int64_t width, void* stream) {
  const int64_t words = row_words(width);
  auto* out = reinterpret_cast<unsigned long long*>(bits);
  if (n * height * words == 0) return;
  check_cuda(cudaMemsetAsync(out, 0, static_cast<size_t>(n * height * words) * 8, static_cast<cudaStream_t>(stream)),
             "clearing masks failed");
  launch(mark_kernel, n, kThreads, stream, out, sums, offsets, n, height, width);
  launch(sum_rows_kernel, ceil_div(n * words, kThreads), kThreads, stream, out, n, height, words);
}

}  // namespace sam_fast
