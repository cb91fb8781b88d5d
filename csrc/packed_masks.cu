// One pass over memory that reads and writes what it must: 1 byte and 1 bit per pixel, where the reference makes
// several tensors of a byte per pixel.
#include "arithmetic.h"
#include "launch.cuh"
#include "packed_masks.h"

namespace sam_fast {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kPixels = 16;  // that a thread unpacks, with one store

// A warp makes a word: each lane reads two pixels.
__global__ void __launch_bounds__(kThreads)
    pack_kernel(uint64_t* bits, const uint8_t* pixels, int64_t rows, int64_t width) {
  const int lane = lane_index();
  const int64_t words = row_words(width), step = int64_t{gridDim.x} * kWarps;
  for (int64_t i = int64_t{blockIdx.x} * kWarps + threadIdx.x / kWarp; i < rows * words; i += step) {
    const int64_t x = i % words * 64 + lane;
    const uint8_t* row = pixels + i / words * width;
    const uint32_t low = __ballot_sync(kAllLanes, x < width && row[x] != 0);
    const uint32_t high = __ballot_sync(kAllLanes, x + kWarp < width && row[x + kWarp] != 0);
    if (lane == 0) bits[i] = static_cast<uint64_t>(high) << 32 | low;
  }
}

struct alignas(kPixels) Pixels {
  uint64_t low, high;
};

// A thread unpacks 16 pixels that lie one behind the other in memory, at a multiple of 16 bytes if `whole` stores are
// wanted. They may be of two rows or more.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(uint8_t* pixels, const uint64_t* bits, int64_t rows, int64_t width, bool whole) {
  const int64_t words = row_words(width), count = rows * width, step = int64_t{gridDim.x} * kThreads * kPixels;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kPixels; i < count; i += step) {
    int64_t x = i % width;
    const uint64_t* row = bits + i / width * words;
    if (whole && x + kPixels <= width) {
      const int64_t k = x / 64, shift = x % 64;
      uint64_t word = row[k] >> shift;
      if (shift > 64 - kPixels) word |= row[k + 1] << (64 - shift);
      *reinterpret_cast<Pixels*>(pixels + i) = {unpack_byte(static_cast<uint8_t>(word)),
                                                unpack_byte(static_cast<uint8_t>(word >> 8))};
      continue;
    }
    for (int64_t j = i; j < min(i + kPixels, count); ++j) {
      pixels[j] = static_cast<uint8_t>(row[x / 64] >> (x % 64) & 1);
      if (++x < width) continue;
      x = 0;
      row += words;
    }
  }
}

}  // namespace

void pack_masks_cuda(uint8_t* bits, const bool* masks, int64_t rows, int64_t width, void* stream) {
  launch(pack_kernel, ceil_div(rows * row_words(width), kWarps), kThreads, stream, reinterpret_cast<uint64_t*>(bits),
         reinterpret_cast<const uint8_t*>(masks), rows, width);
}

void unpack_masks_cuda(bool* masks, const uint8_t* bits, int64_t rows, int64_t width, void* stream) {
  const bool whole = reinterpret_cast<uintptr_t>(masks) % kPixels == 0;
  launch(unpack_kernel, ceil_div(rows * width, kThreads * kPixels), kThreads, stream, reinterpret_cast<uint8_t*>(masks),
         reinterpret_cast<const uint64_t*>(bits), rows, width, whole);
}

}  // namespace sam_fast
