#include "packed_masks.h"

#include <algorithm>

#include "fresh_memory.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace sam_fast {
namespace {

// One thread packs this many pixels in 0.5 ms, near what memory allows: below, threads save too little. It unpacks a
// quarter of them in that time, into memory that is fresh.
constexpr int64_t kParallelPixels = 1 << 24;
constexpr int64_t kBlockPixels = 1 << 19;  // of a mask that one thread unpacks
constexpr int64_t kFreshPixels = 1 << 17;  // malloc of glibc may ask the system anew for so many

// One word from 64 bytes, of which any non-zero one is a set pixel.
uint64_t pack_word(const uint8_t* pixels) {
#if defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  uint64_t clear = 0;
  for (int i = 0; i < 4; ++i) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pixels + 16 * i));
    clear |= static_cast<uint64_t>(_mm_movemask_epi8(_mm_cmpeq_epi8(sixteen, zero))) << (16 * i);
  }
  return ~clear;
#else
  uint64_t word = 0;
  for (int i = 0; i < 64; ++i) word |= static_cast<uint64_t>(pixels[i] != 0) << i;
  return word;
#endif
}

struct UnpackTable {
  uint64_t lanes[256];
  UnpackTable() {
    for (int byte = 0; byte < 256; ++byte) lanes[byte] = unpack_byte(static_cast<uint8_t>(byte));
  }
};

}  // namespace

void pack_masks(uint8_t* bits, const bool* masks, int64_t rows, int64_t width, int num_threads) {
  const uint8_t* pixels = reinterpret_cast<const uint8_t*>(masks);
  const int64_t whole = width / 64, stride = row_bytes(width);
#pragma omp parallel for num_threads(num_threads) schedule(static) if (rows * width >= kParallelPixels)
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* in = pixels + row * width;
    uint8_t* out = bits + row * stride;
    for (int64_t k = 0; k < whole; ++k) store_word(out, k, pack_word(in + 64 * k));
    if (width % 64 != 0) {
      uint8_t tail[64] = {};
      std::memcpy(tail, in + 64 * whole, static_cast<size_t>(width % 64));
      store_word(out, whole, pack_word(tail));
    }
  }
}

namespace {

void unpack_rows(bool* masks, const uint8_t* bits, int64_t rows, int64_t width) {
  static const UnpackTable table;
  uint8_t* pixels = reinterpret_cast<uint8_t*>(masks);
  const int64_t whole = width / 8, stride = row_bytes(width);
  for (int64_t row = 0; row < rows; ++row) {
    const uint8_t* in = bits + row * stride;
    uint8_t* out = pixels + row * width;
    for (int64_t k = 0; k < whole; ++k) std::memcpy(out + 8 * k, &table.lanes[in[k]], 8);
    if (width % 8 != 0) std::memcpy(out + 8 * whole, &table.lanes[in[whole]], static_cast<size_t>(width % 8));
  }
}

}  // namespace

void unpack_masks(bool* masks, const uint8_t* bits, int64_t rows, int64_t width, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(static) if (rows * width >= kParallelPixels / 4)
  for (int64_t row = 0; row < rows; ++row) {
    unpack_rows(masks + row * width, bits + row * row_bytes(width), 1, width);
  }
}

void unpack_masks_apart(const std::vector<MaskPlace>& masks, const uint8_t* bits, int64_t height, int64_t width,
                        int num_threads) {
  const int64_t n = static_cast<int64_t>(masks.size()), stride = row_bytes(width);
  const int64_t rows = std::max<int64_t>(1, kBlockPixels / std::max<int64_t>(1, width));
  const int64_t blocks = (height + rows - 1) / rows;
#pragma omp parallel for num_threads(num_threads) schedule(static) if (worth_threads(n * blocks, rows * width))
  for (int64_t i = 0; i < n * blocks; ++i) {
    const int64_t mask = i / blocks, row = i % blocks * rows, count = std::min(rows, height - row);
    const MaskPlace place = masks[static_cast<size_t>(mask)];
    bool* out = place.pixels + row * width;
    if (place.fresh && count * width >= kFreshPixels) take_pages(out, count * width);
    unpack_rows(out, bits + (mask * height + row) * stride, count, width);
  }
}

}  // namespace sam_fast
