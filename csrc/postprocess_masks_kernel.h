// The inner loops of postprocess_masks, compiled once per instruction set over its `Lanes`; no include guard, no std.
//
// A strip of 64 output columns runs down the rows of a part of one mask:
//   source row r  -> samples: the row at the strip's grid columns x0 and x1   (once per source row)
//   grid row y    -> line: both at grid row y, blended to output columns      (once per grid row)
//   output row    -> two lines blended, compared with three thresholds, one word of bits
// This is the order in which two calls of interpolate round, with every intermediate value in the first-level cache.
//
// Certain strips: bilinear values are convex combinations of their samples, so where all samples that a strip reads in
// a band lie on one side of each threshold, the word is known. "Side" keeps a margin above the rounding error
// (relative 1e-5 against about 1e-6), and samples that are NaN, infinite or huge lie on no side.

namespace sam_fast {
namespace {

constexpr int kGroups = kStripWidth / Lanes::kCount;
constexpr float kRelativeMargin = 1e-5f;
constexpr float kAbsoluteMargin = 1e-30f;  // products of weights and smaller samples may underflow
constexpr float kHuge = 1e37f;             // larger samples may overflow when blended

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

inline void need_samples(StripRows& rows, const Plan& plan, const float* source, int32_t row, int32_t x) {
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
  const float(*first)[kStripWidth] = rows.sample[tap.first & 1];
  const float(*second)[kStripWidth] = rows.sample[tap.second & 1];
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
    const float margin = __builtin_fabsf(threshold[k]) * kRelativeMargin + kAbsoluteMargin;
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

struct Counts {
  Lanes::Int inner, outer;  // of computed words, per lane
  int64_t certain_inner, certain_outer;
};

inline void tally_rows(StripRows& rows, const Plan& plan, const float* source, const MaskThresholds& thresholds,
                       const Band& band, int32_t strip, uint64_t* bits, Counts& counts) {
  const Float mask = Lanes::set(thresholds.mask);
  const Float inner = Lanes::set(thresholds.inner), outer = Lanes::set(thresholds.outer);
  Lanes::Int inner_count = counts.inner, outer_count = counts.outer;
  for (int32_t y = band.row_begin; y < band.row_end; ++y, bits += plan.words) {
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
    *bits = Lanes::word(over);
  }
  counts.inner = inner_count;
  counts.outer = outer_count;
}

// Writes the words of one strip over bands [begin,end).
inline void tally_strip(const Plan& plan, const float* source, const MaskThresholds& thresholds, int32_t begin,
                        int32_t end, int32_t strip, uint64_t* bits, const MaskScratch& scratch, Counts& counts) {
  StripRows rows;
  const Strip columns = plan.strips[strip];
  const int32_t rest = plan.width - strip * kStripWidth;
  const int32_t valid = rest < kStripWidth ? rest : kStripWidth;
  const int32_t code_words = scratch.code_words;
  uint64_t* word = bits + strip;
  for (int32_t b = begin; b < end; ++b) {
    const Band& band = plan.bands[b];
    const int32_t band_rows = band.row_end - band.row_begin;
    const uint64_t* codes = scratch.band + static_cast<int64_t>(b - begin) * 5 * code_words;
    const bool certain = !any(codes, columns.source_first, columns.source_last) &&
                         !test(codes + code_words, columns.source_last);
    if (certain) {
      const uint64_t fill = test(codes + 2 * code_words, columns.source_first) ? ~uint64_t{0} >> (64 - valid) : 0;
      for (int32_t y = 0; y < band_rows; ++y) word[static_cast<int64_t>(y) * plan.words] = fill;
      const int64_t pixels = static_cast<int64_t>(band_rows) * valid;
      if (test(codes + 3 * code_words, columns.source_first)) counts.certain_inner += pixels;
      if (test(codes + 4 * code_words, columns.source_first)) counts.certain_outer += pixels;
    } else {
      tally_rows(rows, plan, source, thresholds, band, strip, word, counts);
    }
    word += static_cast<int64_t>(band_rows) * plan.words;
  }
}

// Area and box from the finished bits.
inline void summarize(const uint64_t* bits, int32_t words, int32_t first_row, int32_t rows, uint64_t* columns,
                      MaskTally* tally) {
  int64_t area = 0;
  tally->top = tally->bottom = -1;
  for (int32_t word = 0; word < words; ++word) columns[word] = 0;
  for (int32_t y = 0; y < rows; ++y, bits += words) {
    uint64_t some = 0;
    for (int32_t word = 0; word < words; ++word) {
      some |= bits[word];
      columns[word] |= bits[word];
      area += Lanes::popcount(bits[word]);
    }
    if (some == 0) continue;
    if (tally->top < 0) tally->top = first_row + y;
    tally->bottom = first_row + y;
  }
  tally->area = area;
  tally->left = 0;
  tally->right = -1;
  if (area == 0) return;
  int32_t word = 0;
  while (columns[word] == 0) ++word;
  tally->left = word * 64 + __builtin_ctzll(columns[word]);
  word = words - 1;
  while (columns[word] == 0) --word;
  tally->right = word * 64 + 63 - __builtin_clzll(columns[word]);
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
  Counts counts = {Lanes::zero(), Lanes::zero(), 0, 0};
  for (int32_t strip = 0; strip < plan.words; ++strip) {
    tally_strip(plan, source, thresholds, begin, end, strip, bits, scratch, counts);
  }
  const int32_t first_row = plan.bands[begin].row_begin;
  summarize(bits, plan.words, first_row, plan.bands[end - 1].row_end - first_row, scratch.columns, tally);
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
