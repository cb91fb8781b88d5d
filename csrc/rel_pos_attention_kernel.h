// The inner loops of rel_pos_attention, compiled once per instruction set; no include guard, no std.
//
// A tile of queries meets tiles of keys, each some rows of the window, with an online softmax in between. The bias of a
// query and a key is one number per query and key row plus one per query and key column, both products of the unscaled
// query with a table: scores begin as their sum, and q k^T is added.

#include "vector_math.h"

namespace sam_fast {
namespace {

constexpr float kNoKey = -1e30f;  // the score of lanes beyond a row's keys

// A table [2n - 1, d] of n positions, reversed, transposed to [d, lanes] and packed: column j is row 2n - 2 - j, so
// that the biases of a query at position q for the keys 0, 1, .. are columns n - 1 - q, n - q, ..
void pack_table(float* packed, const float* table, int64_t n, int64_t d) {
  const int64_t columns = 2 * n - 1, vectors = padded(columns) / kLanes;
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    for (int64_t k = 0; k < d; ++k) {
      for (int64_t i = j * kLanes; i < (j + block) * kLanes; ++i) {
        *packed++ = i < columns ? table[(columns - 1 - i) * d + k] : 0.0f;
      }
    }
    j += block;
  }
}

void pack_tables(const RelPosArguments& a, float* tables) {
  if (a.rel_h == nullptr) return;
  pack_table(tables, a.rel_h, a.rows, a.head_width);
  pack_table(tables + a.head_width * padded(2 * a.rows - 1), a.rel_w, a.columns, a.head_width);
}

// Tile by tile, K^T [d, lanes] packed and V [lanes, d] packed; zeros in lanes beyond a row's keys.
void pack_keys(const RelPosArguments& a, Window window, int64_t head, float* keys) {
  const KeyLayout layout = key_layout(a);
  const int64_t d = a.head_width, C = a.heads * d, lanes = layout.tile_rows * layout.row_lanes;
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    float* const k_tile = keys + 2 * tile * lanes * d;
    float* const v_tile = k_tile + lanes * d;
    for (int64_t i = 0; i < 2 * lanes * d; ++i) k_tile[i] = 0;
    const int64_t first = tile * layout.tile_rows;
    const int64_t rows = a.rows - first < layout.tile_rows ? a.rows - first : layout.tile_rows;
    const int64_t vectors = rows * layout.row_lanes / kLanes;
    // Column blocks of K^T: where lane l of the tile begins, and how wide its block is.
    for (int64_t j = 0; j < vectors;) {
      const int64_t block = column_block(vectors - j) * kLanes;
      for (int64_t i = 0; i < block; ++i) {
        const int64_t lane = j * kLanes + i, y = first + lane / layout.row_lanes, x = lane % layout.row_lanes;
        if (x >= a.columns) continue;
        const bool inside = window.top + y < a.height && window.left + x < a.width;
        const int64_t token = (window.image * a.height + window.top + y) * a.width + window.left + x;
        const float* row = inside ? a.qkv + token * 3 * C : a.qkv_bias;
        if (row == nullptr) continue;
        const float* k = row + C + head * d;
        const float* v = row + 2 * C + head * d;
        float* column = k_tile + j * kLanes * d + i;
        for (int64_t e = 0; e < d; ++e) column[e * block] = k[e];
        for (int64_t e = 0; e < d / kLanes;) {
          const int64_t wide = column_block(d / kLanes - e);
          float* out = v_tile + e * kLanes * vectors * kLanes + lane * wide * kLanes;
          for (int64_t f = 0; f < wide; ++f) store(out + f * kLanes, load(v + (e + f) * kLanes));
          e += wide;
        }
      }
      j += block / kLanes;
    }
  }
}

// One tile's part of the softmax: scores to exponentials against each query's largest score so far.
void online_softmax(float* scores, int64_t stride, float* output, float* largest, float* total, int64_t queries,
                    int64_t vectors, int64_t d) {
  for (int64_t q = 0; q < queries; ++q) {
    float* row = scores + q * stride;
    Vec top[2] = {load(row), load(row)};
    for (int64_t j = 1; j < vectors; ++j) top[j & 1] = larger(load(row + j * kLanes), top[j & 1]);
    const float tile_largest = largest_lane(larger(top[0], top[1]));
    if (tile_largest > largest[q]) {
      const Vec scale = exp_nonpositive(splat(largest[q] - tile_largest));
      largest[q] = tile_largest;
      total[q] *= scale[0];
      for (int64_t c = 0; c < d; c += kLanes) store(output + q * d + c, load(output + q * d + c) * scale);
    }
    Vec sums[2] = {};
    for (int64_t j = 0; j < vectors; ++j) {
      const Vec e = exp_nonpositive(load(row + j * kLanes) - largest[q]);
      store(row + j * kLanes, e);
      sums[j & 1] += e;
    }
    total[q] += sum(sums[0] + sums[1]);
  }
}

void attend(const RelPosArguments& a, Window window, int64_t head, const float* tables, const float* keys,
            int64_t begin, int64_t end, float* workspace) {
  const KeyLayout layout = key_layout(a);
  const int64_t d = a.head_width, C = a.heads * d, lanes = layout.tile_rows * layout.row_lanes;
  const int64_t h_lanes = padded(2 * a.rows - 1), w_lanes = padded(2 * a.columns - 1) + kLanes;
  const int64_t width = a.width - window.left < a.columns ? a.width - window.left : a.columns;  // of real queries
  float* const queries = workspace;                                                             // [96, d]
  float* const output = queries + kMostQueries * d;                                             // [96, d]
  float* const scores = output + kMostQueries * d;                                              // [96, lanes]
  float* const bias_w = scores + kMostQueries * lanes;                                          // [96, row_lanes]
  float* const all_h = bias_w + kMostQueries * layout.row_lanes;                                // [96, h_lanes]
  float* const all_w = all_h + kMostQueries * h_lanes;                                          // [96, w_lanes]
  float* const largest = all_w + kMostQueries * w_lanes;
  float* const total = largest + kMostQueries;

  for (int64_t start = begin; start < end; start += kMostQueries) {
    const int64_t count = end - start < kMostQueries ? end - start : kMostQueries;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t y = window.top + (start + q) / width, x = window.left + (start + q) % width;
      const float* row = a.qkv + ((window.image * a.height + y) * a.width + x) * 3 * C + head * d;
      for (int64_t c = 0; c < d; c += kLanes) {
        store(queries + q * d + c, load(row + c));
        store(output + q * d + c, Vec{});
      }
      largest[q] = -__builtin_inff();
      total[q] = 0;
    }
    if (a.rel_h != nullptr) {
      product<true>(all_h, h_lanes, {queries, d, 1}, tables, 0, count, h_lanes / kLanes, d, false);
      product<true>(all_w, w_lanes, {queries, d, 1}, tables + d * h_lanes, 0, count, w_lanes / kLanes - 1, d, false);
    }
    for (int64_t q = 0; q < count; ++q) {
      const float* from = all_w + q * w_lanes + a.columns - 1 - (start + q) % width;
      float* to = bias_w + q * layout.row_lanes;
      for (int64_t x = 0; x < layout.row_lanes; ++x) {
        to[x] = x >= a.columns ? kNoKey : a.rel_h != nullptr ? from[x] : 0.0f;
      }
      for (int64_t c = 0; c < d; c += kLanes) store(queries + q * d + c, load(queries + q * d + c) * a.scale);
    }
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      const int64_t first = tile * layout.tile_rows;
      const int64_t rows = a.rows - first < layout.tile_rows ? a.rows - first : layout.tile_rows;
      const int64_t vectors = rows * layout.row_lanes / kLanes;
      for (int64_t q = 0; q < count; ++q) {
        const float* bias_h = all_h + q * h_lanes + a.rows - 1 - (start + q) / width + first;
        const float* row_bias = bias_w + q * layout.row_lanes;
        float* row = scores + q * lanes;
        for (int64_t y = 0; y < rows; ++y, row += layout.row_lanes) {
          const float of_row = a.rel_h != nullptr ? bias_h[y] : 0.0f;
          for (int64_t x = 0; x < layout.row_lanes; x += kLanes) store(row + x, load(row_bias + x) + of_row);
        }
      }
      const float* k_tile = keys + 2 * tile * lanes * d;
      product<true>(scores, lanes, {queries, d, 1}, k_tile, 0, count, vectors, d, true);
      online_softmax(scores, lanes, output, largest, total, count, vectors, d);
      product<true>(output, d, {scores, lanes, 1}, k_tile + lanes * d, 0, count, d / kLanes, vectors * kLanes, true);
    }
    for (int64_t q = 0; q < count; ++q) {
      const int64_t y = window.top + (start + q) / width, x = window.left + (start + q) % width;
      float* out = a.output + ((window.image * a.height + y) * a.width + x) * C + head * d;
      const float share = 1.0f / total[q];
      for (int64_t c = 0; c < d; c += kLanes) store(out + c, load(output + q * d + c) * share);
    }
  }
}

}  // namespace
}  // namespace sam_fast
