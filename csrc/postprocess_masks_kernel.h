// The inner loops of postprocess_masks, compiled once per instruction set over its `Lanes`; no include guard, no std.
//
// A strip of 64 output columns runs down the rows of a part of one mask:
//   source row r  -> samples: the row at the strip's grid columns x0 and x1   (once per source row)
//   grid row y    -> line: both at grid row y, blended to output columns      (once per grid row)
//   output row    -> two lines blended, compared with three thresholds, one word of bits
// This is the order in which two calls of interpolate round, with every intermediate value in the first-level cache.
//
// Certain strips: where all samples that a strip reads in a band lie on one side of each threshold (arithmetic.h), the
// word is known.

namespace sam_fast {
namespace {

constexpr int kGroups = kStripWidth / Lanes::kCount;

using Float = Lanes::Float;

// The rows of a strip that are in use. A source row or grid row lives in slot (index & 1): those that are
// needed together are neighbours.
struct StripRows {
  alignas(64) float sample[2][2][kStripWidth];  // [slot][x0, x1]
  alignas(64) float line[2][kStripWidth];
  int32_t sample_row[2] = {-1, -1};
  int32_t line_row[2] = {-1, -1};
};

inline Float pick(const float* row, int32_t base, const int32_t* index) {
  return base >= 0 ? Lanes::permute(Lanes::load(row + base), index) : Lanes::gather(row, index);
}

// Called once per source row and strip: out of line, so that its registers do not burden the loop over output rows.
__attribute__((noinline)) void need_samples(StripRows& rows, const Plan& plan, const float* source, int32_t row,
                                            int32_t x) {
  const int slot = row & 1;
  if (rows.sample_row[slot] == row) return;
  rows.sample_row[slot] = row;
  const float* values = source + row * plan.row_stride;
  const int32_t* base = plan.group_base + x / Lanes::kCount;
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    const int32_t column = x + g * Lanes::kCount;
    for (int side = 0; side < 2; ++side) {
      Float value = pick(values, base[g], plan.source_column[2 * side] + column);
      if (!plan.one_step) {
        value = Lanes::blend(value, Lanes::load(plan.source_weight[2 * side] + column),
                             pick(values, base[g], plan.source_column[2 * side + 1] + column),
                             Lanes::load(plan.source_weight[2 * side + 1] + column));
      }
      Lanes::store(rows.sample[slot][side] + g * Lanes::kCount, value);
    }
  }
}

inline void need_line(StripRows& rows, const Plan& plan, const float* source, int32_t y, int32_t x) {
  const int slot = y & 1;
  if (rows.line_row[slot] == y) return;
  rows.line_row[slot] = y;
  const Tap tap = plan.grid_row[y];
  need_samples(rows, plan, source, tap.first, x);
  need_samples(rows, plan, source, tap.second, x);
  const float (*first)[kStripWidth] = rows.sample[tap.first & 1];
  const float (*second)[kStripWidth] = rows.sample[tap.second & 1];
  const Float first_weight = Lanes::set(tap.first_weight), second_weight = Lanes::set(tap.second_weight);
#pragma GCC unroll 16
  for (int g = 0; g < kGroups; ++g) {
    const int i = g * Lanes::kCount;
    Float left = Lanes::load(first[0] + i), right = Lanes::load(first[1] + i);
    if (!plan.one_step) {
      left = Lanes::blend(left, first_weight, Lanes::load(second[0] + i), second_weight);
      right = Lanes::blend(right, first_weight, Lanes::load(second[1] + i), second_weight);
    }
    Lanes::store(rows.line[slot] + i, Lanes::blend(left, Lanes::load(plan.column_weight[0] + x + i), right,
                                                   Lanes::load(plan.column_weight[1] + x + i)));
  }
}

// ---- Certain strips.

// Which of 64 columns of a source row are on no side of a threshold (codes[0]), and which are above each (codes[1..3]).
inline void code_row(const float* row, const Plan& plan, const MaskThresholds& thresholds, int32_t code_words,
                     uint64_t* codes) {
  const float threshold[3] = {thresholds.mask, thresholds.inner, thresholds.outer};
  Float above[3], below[3];
  for (int k = 0; k < 3; ++k) {
    const float margin = side_margin(threshold[k]);
    above[k] = Lanes::set(threshold[k] + margin);
    below[k] = Lanes::set(threshold[k] - margin);
  }
  const Float huge = Lanes::set(kHuge), minus_huge = Lanes::set(-kHuge);
  for (int32_t word = 0; word < code_words; ++word) {
    uint64_t code[4] = {0, 0, 0, 0};
    for (int g = 0; g < kGroups; ++g) {
      const int32_t x = word * 64 + g * Lanes::kCount;
      if (x >= plan.source_width) break;
      Float value;
      if (x + Lanes::kCount <= plan.source_width) {
        value = Lanes::load(row + x);
      } else {
        float rest[Lanes::kCount] = {};
        for (int i = 0; x + i < plan.source_width; ++i) rest[i] = row[x + i];
        value = Lanes::load(rest);
      }
      uint64_t sided = Lanes::bits(Lanes::greater(huge, value)) & Lanes::bits(Lanes::greater(value, minus_huge));
      for (int k = 0; k < 3; ++k) {
        const uint64_t is_above = Lanes::bits(Lanes::greater(value, above[k]));
        sided &= is_above | Lanes::bits(Lanes::greater(below[k], value));
        code[k + 1] |= is_above << (g * Lanes::kCount);
      }
      code[0] |= (sided ^ ((uint64_t{1} << Lanes::kCount) - 1)) << (g * Lanes::kCount);
    }
    for (int k = 0; k < 4; ++k) codes[k * code_words + word] = code[k];
  }
}

// The codes of a band: [0] columns that are not on one side, or not on the same side as the next column; [1] columns
// that are not on one side; [2..4] columns above each threshold.
inline void code_band(const uint64_t* codes, int32_t rows, int32_t code_words, uint64_t* band) {
  for (int32_t word = 0; word < code_words; ++word) {
    uint64_t mixed = 0, all[3] = {~uint64_t{0}, ~uint64_t{0}, ~uint64_t{0}}, some[3] = {0, 0, 0};
    for (int32_t row = 0; row < rows; ++row) {
      const uint64_t* code = codes + static_cast<int64_t>(row) * 4 * code_words + word;
      mixed |= code[0];
      for (int k = 0; k < 3; ++k) {
        all[k] &= code[(k + 1) * code_words];
        some[k] |= code[(k + 1) * code_words];
      }
    }
    for (int k = 0; k < 3; ++k) {
      mixed |= all[k] ^ some[k];
      band[(k + 2) * code_words + word] = all[k];
    }
    band[code_words + word] = mixed;
  }
  for (int32_t word = 0; word < code_words; ++word) {
    uint64_t edges = band[code_words + word];
    for (int k = 2; k < 5; ++k) {
      const uint64_t* above = band + k * code_words;
      const uint64_t next = word + 1 < code_words ? above[word + 1] << 63 : 0;
      edges |= above[word] ^ ((above[word] >> 1) | next);
    }
    band[word] = edges;
  }
}

inline uint64_t test(const uint64_t* bits, int32_t i) { return (bits[i >> 6] >> (i & 63)) & 1; }

// Whether any of bits [first, end) is set.
inline bool any(const uint64_t* bits, int32_t first, int32_t end) {
  if (first >= end) return false;
  const int32_t word = first >> 6, last = (end - 1) >> 6;
  const uint64_t head = ~uint64_t{0} << (first & 63), tail = ~uint64_t{0} >> (63 - ((end - 1) & 63));
  if (word == last) return (bits[word] & head & tail) != 0;
  uint64_t found = (bits[word] & head) | (bits[last] & tail);
  for (int32_t i = word + 1; i < last; ++i) found |= bits[i];
  return found != 0;
}

// ---- One part of a mask.

// What a strip adds up. Certain words are counted in pixels, computed ones per lane and by their bits.
struct Counts {
  Lanes::Int inner, outer;
  int64_t area, certain_inner, certain_outer;
  uint64_t columns;     // of one strip: which columns have a pixel
  int32_t top, bottom;  // of one strip: first and last row that have one; bottom -1 if none
};

// `bits`: where the word of the band's first row goes, or null.
inline void tally_rows(StripRows& rows, const Plan& plan, const float* source, const MaskThresholds& thresholds,
                       const Band& band, int32_t strip, uint64_t* bits, Counts& counts) {
  const Float mask = Lanes::set(thresholds.mask);
  const Float inner = Lanes::set(thresholds.inner), outer = Lanes::set(thresholds.outer);
  uint64_t unwanted;
  const int64_t stride = bits != nullptr ? plan.words : 0;
  if (bits == nullptr) bits = &unwanted;
  Lanes::Int inner_count = counts.inner, outer_count = counts.outer;
  int64_t area = counts.area;
  uint64_t columns = counts.columns, occupied = 0;  // occupied: one bit per row of the band
  for (int32_t y = band.row_begin; y < band.row_end; ++y, bits += stride) {
    const Tap tap = plan.output_row[y];
    need_line(rows, plan, source, tap.first, strip * kStripWidth);
    need_line(rows, plan, source, tap.second, strip * kStripWidth);
    const float* first = rows.line[tap.first & 1];
    const float* second = rows.line[tap.second & 1];
    const Float first_weight = Lanes::set(tap.first_weight), second_weight = Lanes::set(tap.second_weight);
    Lanes::Mask over[kGroups];
#pragma GCC unroll 16
    for (int g = 0; g < kGroups; ++g) {
      const int i = g * Lanes::kCount;
      const Float value = Lanes::blend(Lanes::load(first + i), first_weight, Lanes::load(second + i), second_weight);
      over[g] = Lanes::greater(value, mask);
      inner_count = Lanes::count(inner_count, Lanes::greater(value, inner));
      outer_count = Lanes::count(outer_count, Lanes::greater(value, outer));
    }
    const uint64_t word = Lanes::word(over);
    *bits = word;
    area += Lanes::popcount(word);
    columns |= word;
    occupied |= static_cast<uint64_t>(word != 0) << (y - band.row_begin);
  }
  counts.inner = inner_count;
  counts.outer = outer_count;
  counts.area = area;
  counts.columns = columns;
  if (occupied == 0) return;
  if (counts.bottom < 0) counts.top = band.row_begin + __builtin_ctzll(occupied);
  counts.bottom = band.row_begin + 63 - __builtin_clzll(occupied);
}

// A band of a strip in which every pixel lies on the same side of each threshold.
inline void tally_certain(const Plan& plan, const Band& band, bool over_mask, bool over_inner, bool over_outer,
                          int32_t valid, uint64_t* bits, Counts& counts) {
  const int64_t pixels = static_cast<int64_t>(band.row_end - band.row_begin) * valid;
  if (over_inner) counts.certain_inner += pixels;
  if (over_outer) counts.certain_outer += pixels;
  if (!over_mask) return;  // the bits are zero already
  const uint64_t fill = ~uint64_t{0} >> (kStripWidth - valid);
  counts.area += pixels;
  counts.columns |= fill;
  if (counts.bottom < 0) counts.top = band.row_begin;
  counts.bottom = band.row_end - 1;
  if (bits == nullptr) return;
  for (int32_t y = band.row_begin; y < band.row_end; ++y, bits += plan.words) *bits = fill;
}

// One strip over bands [begin,end).
inline void tally_strip(const Plan& plan, const float* source, const MaskThresholds& thresholds, int32_t begin,
                        int32_t end, int32_t strip, uint64_t* bits, const MaskScratch& scratch, Counts& counts) {
  StripRows rows;
  const Strip columns = plan.strips[strip];
  const int32_t rest = plan.width - strip * kStripWidth;
  const int32_t valid = rest < kStripWidth ? rest : kStripWidth;
  const int32_t code_words = scratch.code_words;
  const int32_t first_row = plan.bands[begin].row_begin;
  for (int32_t b = begin; b < end; ++b) {
    const Band& band = plan.bands[b];
    uint64_t* word =
        bits == nullptr ? nullptr : bits + static_cast<int64_t>(band.row_begin - first_row) * plan.words + strip;
    const uint64_t* codes = scratch.band + static_cast<int64_t>(b - begin) * 5 * code_words;
    const int32_t column = columns.source_first;
    if (any(codes, column, columns.source_last) || test(codes + code_words, columns.source_last)) {
      tally_rows(rows, plan, source, thresholds, band, strip, word, counts);
    } else {
      tally_certain(plan, band, test(codes + 2 * code_words, column), test(codes + 3 * code_words, column),
                    test(codes + 4 * code_words, column), valid, word, counts);
    }
  }
}

void tally_bands(const Plan& plan, const float* source, const MaskThresholds& thresholds, int32_t begin, int32_t end,
                 uint64_t* bits, const MaskScratch& scratch, MaskTally* tally) {
  const int32_t code_words = scratch.code_words;
  const int32_t first = plan.bands[begin].source_first, last = plan.bands[end - 1].source_last;
  for (int32_t row = first; row <= last; ++row) {
    code_row(source + row * plan.row_stride, plan, thresholds, code_words,
             scratch.codes + static_cast<int64_t>(row - first) * 4 * code_words);
  }
  for (int32_t b = begin; b < end; ++b) {
    const Band& band = plan.bands[b];
    code_band(scratch.codes + static_cast<int64_t>(band.source_first - first) * 4 * code_words,
              band.source_last - band.source_first + 1, code_words,
              scratch.band + static_cast<int64_t>(b - begin) * 5 * code_words);
  }
  if (bits != nullptr) {
    const int64_t rows = plan.bands[end - 1].row_end - plan.bands[begin].row_begin;
    __builtin_memset(bits, 0, static_cast<size_t>(rows * plan.words) * sizeof(uint64_t));
  }
  *tally = {0, 0, 0, 0, 0, -1, -1};
  Counts counts = {Lanes::zero(), Lanes::zero(), 0, 0, 0, 0, 0, -1};
  for (int32_t strip = 0; strip < plan.words; ++strip) {
    counts.columns = 0;
    counts.bottom = -1;
    tally_strip(plan, source, thresholds, begin, end, strip, bits, scratch, counts);
    if (counts.bottom < 0) continue;
    const bool is_first = tally->right < 0;
    if (is_first) tally->left = strip * kStripWidth + __builtin_ctzll(counts.columns);
    tally->right = strip * kStripWidth + 63 - __builtin_clzll(counts.columns);
    if (is_first || counts.top < tally->top) tally->top = counts.top;
    if (counts.bottom > tally->bottom) tally->bottom = counts.bottom;
  }
  tally->area = counts.area;
  tally->inner = counts.certain_inner + Lanes::total(counts.inner);
  tally->outer = counts.certain_outer + Lanes::total(counts.outer);
}

void resize_bands(const Plan& plan, const float* source, int32_t begin, int32_t end, float* output) {
  for (int32_t strip = 0; strip < plan.words; ++strip) {
    StripRows rows;
    const int32_t x = strip * kStripWidth;
    for (int32_t y = plan.bands[begin].row_begin; y < plan.bands[end - 1].row_end; ++y) {
      const Tap tap = plan.output_row[y];
      need_line(rows, plan, source, tap.first, x);
      need_line(rows, plan, source, tap.second, x);
      const float* first = rows.line[tap.first & 1];
      const float* second = rows.line[tap.second & 1];
      const Float first_weight = Lanes::set(tap.first_weight), second_weight = Lanes::set(tap.second_weight);
      float* pixels = output + static_cast<int64_t>(y) * plan.width + x;
      alignas(64) float padded[kStripWidth];
      float* target = plan.width - x >= kStripWidth ? pixels : padded;
#pragma GCC unroll 16
      for (int g = 0; g < kGroups; ++g) {
        const int i = g * Lanes::kCount;
        Lanes::store(target + i,
                     Lanes::blend(Lanes::load(first + i), first_weight, Lanes::load(second + i), second_weight));
      }
      if (target == padded) {
        for (int32_t i = 0; x + i < plan.width; ++i) pixels[i] = padded[i];
      }
    }
  }
}

}  // namespace
}  // namespace sam_fast
