// The image encoder's attention: windows or the whole image, with decomposed relative positions. Queries, keys and
// values are read where the projection left them, padding of the last windows is never stored, and neither scores nor
// biases are ever whole. rel_pos_attention.cpp schedules, rel_pos_attention_kernel.h computes.
#pragma once

#include <cstdint>

namespace sam_fast {

// B images of H x W tokens, `heads` heads of width d, C = heads d; a window is `rows` x `columns` tokens.
struct RelPosShape {
  int64_t images, height, width, heads, head_width;
  int64_t rows, columns;
};

// T is float, or uint16_t for the bits of bfloat16: then factors of all products are bfloat16, and sums and the softmax
// float32.
template <typename T>
struct RelPosArguments {
  RelPosShape shape;
  const T* qkv;       // [B, H, W, 3, heads, d]
  const T* qkv_bias;  // [3, heads, d], what a token of padding has; or null for zeros
  const T* rel_h;     // [2 rows - 1, d], or null without relative positions
  const T* rel_w;     // [2 columns - 1, d]
  float scale;        // of q . k, not of q . rel
  T* output;          // [B, H, W, heads, d]
};

template <typename T>
void rel_pos_attention(const RelPosArguments<T>& arguments, int threads);

constexpr int64_t kMostHeadWidth = 512;
constexpr int64_t kMostQueries = 96;  // of a tile
constexpr int64_t kKeyLanes = 224;    // keys of a tile, at least one row of them

static inline int64_t padded(int64_t lanes) { return (lanes + 7) / 8 * 8; }

// Keys lie in rows of the window, each filled up to whole vectors; a tile is some rows.
struct KeyLayout {
  int64_t row_lanes, tile_rows, tiles;
};
static inline KeyLayout key_layout(const RelPosShape& a) {
  const int64_t lanes = padded(a.columns);
  int64_t rows = kKeyLanes / lanes;
  rows = rows < 1 ? 1 : rows > a.rows ? a.rows : rows;
  return {lanes, rows, (a.rows + rows - 1) / rows};
}

// Floats, or pairs of narrower numbers, of the packed keys and values of one window and head.
template <typename T>
static inline int64_t packed_keys_size(const RelPosShape& a) {
  const KeyLayout layout = key_layout(a);
  const int64_t numbers = 2 * layout.tiles * layout.tile_rows * layout.row_lanes * a.head_width;
  return numbers * static_cast<int64_t>(sizeof(T)) / 4;
}

// The same of the packed tables, which all windows and heads share.
template <typename T>
static inline int64_t packed_tables_size(const RelPosShape& a) {
  const int64_t numbers = a.head_width * (padded(2 * a.rows - 1) + padded(2 * a.columns - 1));
  return numbers * static_cast<int64_t>(sizeof(T)) / 4;
}

// In floats.
static inline int64_t rel_pos_workspace(const RelPosShape& a) {
  const KeyLayout layout = key_layout(a);
  return kMostQueries * (2 * a.head_width + layout.tile_rows * layout.row_lanes + layout.row_lanes +
                         padded(2 * a.rows - 1) + padded(2 * a.columns - 1) + 8 + 2);
}

struct Window {
  int64_t image, top, left;
};

template <typename T>
struct RelPosKernels {
  void (*pack_tables)(const RelPosArguments<T>&, float* tables);
  void (*pack_keys)(const RelPosArguments<T>&, Window, int64_t head, float* keys);
  // Queries [begin, end) of those of the window that lie in the image, in reading order.
  void (*attend)(const RelPosArguments<T>&, Window, int64_t head, const float* tables, const float* keys, int64_t begin,
                 int64_t end, float* workspace);
};
extern const RelPosKernels<float> kRelPosBase, kRelPosAvx2, kRelPosAvx512;
extern const RelPosKernels<uint16_t> kRelPosBf16Base, kRelPosBf16Avx2, kRelPosBf16Avx512, kRelPosBf16Avx512Bf16;

}  // namespace sam_fast
