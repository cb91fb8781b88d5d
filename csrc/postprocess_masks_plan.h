// The tables of one call of postprocess_masks, shared by all masks, and the interface of its CPU variants. Plain
// structs of pointers: files compiled for AVX-512 include this.
#pragma once

#include <cstdint>

#include "arithmetic.h"
#include "postprocess_masks.h"

namespace sam_fast {

constexpr int32_t kStripWidth = 64;   // output columns that are computed together: one word of packed bits
constexpr int32_t kMaxBandRows = 64;  // one bit per row in a word

// Output rows that begin at the same source row, so that they are skipped or computed together.
struct Band {
  int32_t row_begin, row_end;         // output rows
  int32_t source_first, source_last;  // source rows that they read, inclusive
};

// Source columns that a strip reads, inclusive.
struct Strip {
  int32_t source_first, source_last;
};

// "Source" is the grid that is read: the logits, or with one_step the S x S grid itself, made beforehand.
// An output pixel reads two columns x0, x1 of the S x S grid, and each of those two columns of the source.
struct Plan {
  int32_t source_height, source_width;
  int64_t mask_stride, row_stride;  // of the source, in floats
  int32_t height, width, words;     // of the output; words = strips = ceil(width / 64)
  bool one_step;                    // source -> output directly
  // Per output column, padded to whole strips with columns that come out as NaN and so lie above no threshold.
  const int32_t* source_column[4];  // of x0: first, second; of x1: first, second
  const float* source_weight[4];
  const float* column_weight[2];  // of x0 and x1
  // Per group of `lanes` output columns: the source column to which source_column is relative, such that `lanes`
  // values can be loaded there and hold everything the group reads; -1: they do not, source_column is absolute.
  const int32_t* group_base;
  const Strip* strips;    // [words]
  const Tap* output_row;  // [height] into rows of the S x S grid
  const Tap* grid_row;    // [input_height] into source rows
  const Band* bands;
};

// What one part of a mask contributes.
struct MaskTally {
  int64_t area, inner, outer;
  int32_t left, top, right, bottom;  // right < left: empty
};

// Working memory of one thread.
struct MaskScratch {
  uint64_t* codes;     // [source rows of a part][4][code_words]
  uint64_t* band;      // [bands of a part][5][code_words]
  int32_t code_words;  // ceil(source_width / 64)
};

struct MaskKernels {
  int32_t lanes;
  bool fused;  // products are contracted into fused multiply-adds
  // Bands [begin,end) of one mask; rows of `bits` start at the first band's first row; null: not wanted.
  void (*tally)(const Plan& plan, const float* source, const MaskThresholds& thresholds, int32_t begin, int32_t end,
                uint64_t* bits, const MaskScratch& scratch, MaskTally* tally);
  // The same bands as floats; `output` is row 0 of the mask.
  void (*resize)(const Plan& plan, const float* source, int32_t begin, int32_t end, float* output);
};

extern const MaskKernels kMaskKernelsBase;
#if defined(__x86_64__)
extern const MaskKernels kMaskKernelsAvx2;
extern const MaskKernels kMaskKernelsAvx512;
#endif

}  // namespace sam_fast
