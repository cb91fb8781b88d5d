// Packed masks: bits [N, H, row_bytes], row-major, pixel x of a row is bit x % 8 of byte x / 8, rows padded with zero
// bits to whole 64-bit words. On a little-endian CPU a row is therefore an array of 64-bit words whose bit x is pixel
// x.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "arithmetic.h"

namespace sam_fast {

SAM_FAST_HD inline int64_t row_words(int64_t width) { return (width + 63) / 64; }
SAM_FAST_HD inline int64_t row_bytes(int64_t width) { return 8 * row_words(width); }

// The bits of the last word of a row that are pixels.
SAM_FAST_HD inline uint64_t last_word_mask(int64_t width) {
  return width % 64 == 0 ? ~uint64_t{0} : (uint64_t{1} << (width % 64)) - 1;
}

// Word `k` of a row. A row may start at any address: a tensor can be a view with an odd offset.
inline uint64_t load_word(const uint8_t* row, int64_t k) {
  uint64_t word;
  std::memcpy(&word, row + 8 * k, 8);
  return word;
}
inline void store_word(uint8_t* row, int64_t k, uint64_t word) { std::memcpy(row + 8 * k, &word, 8); }

// Flips pixels [begin, end) of a row.
inline void flip_range(uint8_t* row, int64_t begin, int64_t end) {
  for (int64_t x = begin; x < end;) {
    const int64_t k = x / 64, stop = end < 64 * (k + 1) ? end : 64 * (k + 1);
    store_word(row, k, load_word(row, k) ^ (last_word_mask(stop - x) << (x % 64)));
    x = stop;
  }
}

// Whether an operation on n masks is worth a parallel region. A region costs a microsecond on an idle machine, but
// milliseconds where other processes keep one of its threads from running, so it should have a millisecond to save.
inline bool worth_threads(int64_t n, int64_t pixels_per_mask) {
  return n > 1 && n * pixels_per_mask >= (int64_t{1} << 22);
}

// masks [rows, width], one byte per pixel, non-zero = true  ->  bits [rows, row_bytes(width)].
void pack_masks(uint8_t* bits, const bool* masks, int64_t rows, int64_t width, int num_threads);

// bits [rows, row_bytes(width)]  ->  masks [rows, width], one byte per pixel, 0 or 1. Padding bits are ignored.
void unpack_masks(bool* masks, const uint8_t* bits, int64_t rows, int64_t width, int num_threads);

// Where a mask goes, and whether the system may still have to provide that memory.
struct MaskPlace {
  bool* pixels;
  bool fresh;
};

// The same for masks [height, width] that lie apart, each of which its owner may keep alone.
void unpack_masks_apart(const std::vector<MaskPlace>& masks, const uint8_t* bits, int64_t height, int64_t width,
                        int num_threads);

// The same on a GPU; bits start at a multiple of 8 bytes.
void pack_masks_cuda(uint8_t* bits, const bool* masks, int64_t rows, int64_t width, void* stream);
void unpack_masks_cuda(bool* masks, const uint8_t* bits, int64_t rows, int64_t width, void* stream);

}  // namespace sam_fast
