// Column-major runs from row-major bits without a transposition. A run starts where a pixel differs from the one before
// it in column-major order: the pixel above, or for row 0 the last pixel of the column to the left. So XOR of a packed
// row with the row above marks 64 run starts at a time, nearly all words are zero, and the set bits, met in row-major
// order, are brought into column-major order by one counting sort on the column.
#include "rle.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "arithmetic.h"
#include "packed_masks.h"

namespace sam_fast {
namespace {

// Calls visit(y, k, word) for every non-zero word of run starts: bit i of `word` says that a run starts at row y and
// column 64 * k + i of the mask. y may be `height` (the zeros below the mask) and the column may be `width` (the zeros
// to its right, when the mask has the full height); a start at the very end of the canvas is none and is left out.
// For each column, y comes in ascending order.
template <typename Visit>
void for_each_run_start(const uint8_t* bits, const Placement& place, Visit visit) {
  const int64_t height = place.height, width = place.width;
  if (height == 0 || width == 0) return;
  const int64_t last = row_words(width) - 1, stride = row_bytes(width);
  const uint64_t pixels = last_word_mask(width);
  const uint8_t* bottom = bits + (height - 1) * stride;
  const bool full_height = height == place.canvas_height;
  const bool at_right_edge = place.x0 + width == place.canvas_width;
  const auto emit = [&](int64_t y, int64_t k, uint64_t word) {
    if (word != 0) visit(y, k, word);
  };

  uint64_t carry = 0;  // full height: the last pixel of a column is followed by the first one of the next column
  for (int64_t k = 0; k <= last; ++k) {
    const uint64_t mask = k == last ? pixels : ~uint64_t{0};
    uint64_t start = load_word(bits, k) & mask;
    if (full_height) {
      const uint64_t word = load_word(bottom, k) & mask;
      start ^= (word << 1) | carry;
      carry = word >> 63;
      if (k == last && at_right_edge && width % 64 != 0) start &= pixels;
    }
    emit(0, k, start);
  }
  if (!at_right_edge) emit(0, last + 1, carry);

  for (int64_t y = 1; y < height; ++y) {
    const uint8_t* row = bits + y * stride;
    const uint8_t* above = row - stride;
    int64_t k = 0;
    for (; k + 4 <= last; k += 4) {  // most words are zero: one branch for four
      uint64_t words[4];
      for (int i = 0; i < 4; ++i) words[i] = load_word(row, k + i) ^ load_word(above, k + i);
      if ((words[0] | words[1] | words[2] | words[3]) == 0) continue;
      for (int i = 0; i < 4; ++i) emit(y, k + i, words[i]);
    }
    for (; k < last; ++k) emit(y, k, load_word(row, k) ^ load_word(above, k));
    emit(y, last, (load_word(row, last) ^ load_word(above, last)) & pixels);
  }
  if (full_height) return;
  const bool at_corner = at_right_edge && place.y0 + height == place.canvas_height;
  for (int64_t k = 0; k < last; ++k) emit(height, k, load_word(bottom, k));
  emit(height, last, load_word(bottom, last) & (at_corner ? pixels >> 1 : pixels));
}

struct RunStart {
  int64_t x, y;  // of the mask
};

// Scratch memory: `columns` [width + 1] and `starts` [size - 1].
void encode_one(int64_t* counts, int64_t size, const uint8_t* bits, const Placement& place, int64_t* columns,
                RunStart* starts) {
  std::fill(columns, columns + place.width + 1, int64_t{0});
  int64_t found = 0;
  for_each_run_start(bits, place, [&](int64_t y, int64_t k, uint64_t word) {
    for (; word != 0; word &= word - 1) {
      const int64_t x = 64 * k + __builtin_ctzll(word);
      starts[found++] = {x, y};
      ++columns[x];
    }
  });
  int64_t total = 0;
  for (int64_t x = 0; x <= place.width; ++x) {
    const int64_t here = columns[x];
    columns[x] = total;
    total += here;
  }
  for (int64_t i = 0; i < found; ++i) {
    const RunStart& start = starts[i];
    counts[columns[start.x]++] = (place.x0 + start.x) * place.canvas_height + place.y0 + start.y;
  }
  counts[size - 1] = place.canvas_height * place.canvas_width;
  for (int64_t i = size - 1; i > 0; --i) counts[i] -= counts[i - 1];
}

bool counts_fill(const int64_t* counts, int64_t size, int64_t pixels) {
  int64_t left = pixels;
  for (int64_t i = 0; i < size; ++i) {
    if (counts[i] < 0 || counts[i] > left) return false;
    left -= counts[i];
  }
  return left == 0;
}

// First marks in each column where the value changes on the way down, then sums the marks up (mod 2) row by row.
void decode_one(uint8_t* bits, const int64_t* counts, int64_t size, int64_t height, int64_t width) {
  const int64_t stride = row_bytes(width);
  std::fill(bits, bits + height * stride, uint8_t{0});
  int64_t end = 0;
  for (int64_t i = 0; i < size; ++i) {
    const int64_t begin = end;
    end += counts[i];
    if (i % 2 == 0 || begin == end) continue;
    const int64_t x0 = begin / height, y0 = begin % height, x1 = end / height, y1 = end % height;
    flip_range(bits + y0 * stride, x0, x0 + 1);
    flip_range(bits, x0 + 1, x1 + (y1 > 0));  // columns that the run enters from the top
    if (y1 > 0) flip_range(bits + y1 * stride, x1, x1 + 1);
  }
  for (int64_t i = stride; i < height * stride; i += 8) {
    store_word(bits + i, 0, load_word(bits + i, 0) ^ load_word(bits + i - stride, 0));
  }
}

// One thread writes this many counts in 0.5 ms.
constexpr int64_t kParallelCounts = 1 << 16;

// What COCO's string stores for count i: the difference to the count of the same colour before it, from the 4th on.
inline int64_t stored_value(const int64_t* counts, int64_t i) { return i > 2 ? counts[i] - counts[i - 2] : counts[i]; }

}  // namespace

void rle_offsets(int64_t* offsets, const uint8_t* bits, int64_t n, const Placement& place, int num_threads) {
  const int64_t stride = place.height * row_bytes(place.width);
  offsets[0] = 0;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (worth_threads(n, place.height * place.width))
  for (int64_t i = 0; i < n; ++i) {
    int64_t runs = 1;
    for_each_run_start(bits + i * stride, place,
                       [&](int64_t, int64_t, uint64_t word) { runs += __builtin_popcountll(word); });
    offsets[i + 1] = runs;
  }
  for (int64_t i = 0; i < n; ++i) offsets[i + 1] += offsets[i];
}

void rle_encode(int64_t* counts, const int64_t* offsets, const uint8_t* bits, int64_t n, const Placement& place,
                int num_threads) {
  const int64_t stride = place.height * row_bytes(place.width);
  const bool threaded = worth_threads(n, place.height * place.width);
  const int threads = threaded ? static_cast<int>(std::min<int64_t>(num_threads, n)) : 1;
  int64_t most = 0;
  for (int64_t i = 0; i < n; ++i) most = std::max(most, offsets[i + 1] - offsets[i]);
  std::vector<int64_t> columns(static_cast<size_t>(threads * (place.width + 1)));
  std::vector<RunStart> starts(static_cast<size_t>(threads * most));
#pragma omp parallel for num_threads(threads) schedule(dynamic) if (threads > 1)
  for (int64_t i = 0; i < n; ++i) {
    const int64_t thread = omp_get_thread_num();
    encode_one(counts + offsets[i], offsets[i + 1] - offsets[i], bits + i * stride, place,
               columns.data() + thread * (place.width + 1), starts.data() + thread * most);
  }
}

int64_t rle_decode(uint8_t* bits, const int64_t* counts, const int64_t* offsets, int64_t n, int64_t height,
                   int64_t width, int num_threads) {
  int64_t first_bad = n;
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) \
    reduction(min : first_bad) if (worth_threads(n, height * width))
  for (int64_t i = 0; i < n; ++i) {
    const int64_t* mine = counts + offsets[i];
    const int64_t size = offsets[i + 1] - offsets[i];
    if (counts_fill(mine, size, height * width)) {
      decode_one(bits + i * height * row_bytes(width), mine, size, height, width);
    } else {
      first_bad = std::min(first_bad, i);
    }
  }
  return first_bad == n ? -1 : first_bad;
}

void rle_compressed_offsets(int64_t* string_offsets, const int64_t* counts, const int64_t* offsets, int64_t n) {
  string_offsets[0] = 0;
  for (int64_t m = 0; m < n; ++m) {
    const int64_t* mine = counts + offsets[m];
    int64_t length = 0;
    for (int64_t i = 0; i < offsets[m + 1] - offsets[m]; ++i) length += count_characters(stored_value(mine, i));
    string_offsets[m + 1] = string_offsets[m] + length;
  }
}

void rle_compress(uint8_t* text, const int64_t* string_offsets, const int64_t* counts, const int64_t* offsets,
                  int64_t n, int num_threads) {
#pragma omp parallel for num_threads(num_threads) schedule(dynamic) if (offsets[n] - offsets[0] >= kParallelCounts)
  for (int64_t m = 0; m < n; ++m) {
    const int64_t* mine = counts + offsets[m];
    uint8_t* out = text + string_offsets[m];
    for (int64_t i = 0; i < offsets[m + 1] - offsets[m]; ++i) out = write_characters(out, stored_value(mine, i));
  }
}

int64_t rle_decompress(int64_t* counts, const uint8_t* text, int64_t length) {
  constexpr int kMaxShift = 60;  // 13 digits of 5 bits hold any 64-bit number
  int64_t size = 0;
  uint64_t value = 0;
  int shift = 0;
  for (int64_t at = 0; at < length; ++at) {
    const int digit = text[at] - 48;
    if (digit < 0 || digit > 0x3f || shift > kMaxShift) return -1 - at;
    const int sign_bits = digit & 0x18;  // of the 13th digit: bit 63 and the sign, which must agree
    if (shift == kMaxShift && sign_bits != 0 && sign_bits != 0x18) return -1 - at;
    value |= static_cast<uint64_t>(digit & 0x1f) << shift;
    shift += 5;
    if ((digit & 0x20) != 0) continue;
    if ((digit & 0x10) != 0 && shift < 64) value |= ~uint64_t{0} << shift;
    int64_t count = static_cast<int64_t>(value);
    if (size > 2 && __builtin_add_overflow(count, counts[size - 2], &count)) return -1 - at;
    if (count < 0) return -1 - at;
    counts[size++] = count;
    value = 0;
    shift = 0;
  }
  return shift == 0 ? size : -1 - length;
}

}  // namespace sam_fast
