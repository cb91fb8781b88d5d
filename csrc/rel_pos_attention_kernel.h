// The inner loops of rel_pos_attention, compiled once per instruction set; no include guard, no std.
//
// A tile of queries meets tiles of keys, each some rows of the window, with an online softmax in between. The bias of a
// query and a key is one number per query and key row plus one per query and key column, both products of the unscaled
// query with a table. Scores carry a factor log2(e), so that the softmax is made of powers of two.
//
// In bfloat16 everything is packed in pairs along the depth of its product: of channels for scores, of keys for what is
// read. Weights of the softmax are rounded to it where the scores lie.

#include "vector_math.h"

namespace sam_fast {
namespace {

constexpr float kNoKey = -1e30f;  // the score of lanes beyond a row's keys

// A table [2n - 1, d] of n positions, reversed, transposed to [d, lanes] and packed: column j is row 2n - 2 - j, so
// that the biases of a query at position q for the keys 0, 1, .. are columns n - 1 - q, n - q, ..
template <typename T>
void pack_table(T* packed, const T* table, int64_t n, int64_t d) {
  const int64_t columns = 2 * n - 1, vectors = padded(columns) / kLanes;
  for (int64_t j = 0; j < vectors;) {
    const int64_t block = column_block(vectors - j);
    for (int64_t k = 0; k < d; k += kPerFactor<T>) {
      for (int64_t i = j * kLanes; i < (j + block) * kLanes; ++i) {
        for (int64_t e = 0; e < kPerFactor<T>; ++e)
          *packed++ = i < columns ? table[(columns - 1 - i) * d + k + e] : T{};
      }
    }
    j += block;
  }
}

template <typename T>
void pack_tables(const RelPosArguments<T>& arguments, float* tables) {
  if (arguments.rel_h == nullptr) return;
  const RelPosShape& a = arguments.shape;
  T* const packed = reinterpret_cast<T*>(tables);
  pack_table(packed, arguments.rel_h, a.rows, a.head_width);
  pack_table(packed + a.head_width * padded(2 * a.rows - 1), arguments.rel_w, a.columns, a.head_width);
}

// What eight keys become: eight columns of K^T, whose rows of factors are `block` lanes long.
template <typename T>
void pack_eight(float* columns, int64_t block, const T* const* keys, int64_t d) {
  constexpr int64_t n = kPerFactor<T>;
  const float* rows[kLanes];
  int64_t c = 0;
  for (; c + n * kLanes <= d; c += n * kLanes, columns += kLanes * block) {
    for (int i = 0; i < kLanes; ++i) rows[i] = reinterpret_cast<const float*>(keys[i] + c);
    transpose_rows(columns, block, rows);
  }
  for (; c < d; c += n, columns += block) {
    for (int i = 0; i < kLanes; ++i) {
      reinterpret_cast<LooseBits*>(columns)[i] = *reinterpret_cast<const LooseBits*>(keys[i] + c);
    }
  }
}

// Rows of V at lanes of the tile, in column blocks of d as a product takes them: [lanes, wide], or pairs of lanes.
inline void pack_values(float* v_tile, const float* const* rows, int64_t lane, int64_t lanes, int64_t d) {
  for (int64_t c = 0; c < d / kLanes;) {
    const int64_t wide = column_block(d / kLanes - c) * kLanes;
    float* out = v_tile + c * kLanes * lanes + lane * wide;
    for (int i = 0; i < kLanes; ++i) {
      for (int64_t f = 0; f < wide; f += kLanes) store(out + i * wide + f, load(rows[i] + c * kLanes + f));
    }
    c += wide / kLanes;
  }
}
inline void pack_values(uint16_t* v_tile, const uint16_t* const* rows, int64_t lane, int64_t lanes, int64_t d) {
  for (int64_t c = 0; c < d / kLanes;) {
    const int64_t wide = column_block(d / kLanes - c) * kLanes;
    uint16_t* out = v_tile + c * kLanes * lanes + lane * wide;
    for (int i = 0; i < kLanes; i += 2) {
      for (int64_t f = 0; f < wide; f += kLanes) {
        store_pairs(out + i * wide + 2 * f, load(rows[i] + c * kLanes + f), load(rows[i + 1] + c * kLanes + f));
      }
    }
    c += wide / kLanes;
  }
}

// Tile by tile, K^T [d, lanes] packed and V [lanes, d] packed; zeros in lanes beyond a row's keys.
template <typename T>
void pack_keys(const RelPosArguments<T>& arguments, Window window, int64_t head, float* keys) {
  const RelPosShape& a = arguments.shape;
  const KeyLayout layout = key_layout(a);
  const int64_t d = a.head_width, C = a.heads * d, lanes = layout.tile_rows * layout.row_lanes;
  constexpr int64_t kLine = 64 / sizeof(T);
  T nothing[kMostHeadWidth];
  for (int64_t c = 0; c < d; ++c) nothing[c] = T{};
  for (int64_t tile = 0; tile < layout.tiles; ++tile) {
    T* const k_tile = reinterpret_cast<T*>(keys) + 2 * tile * lanes * d;
    T* const v_tile = k_tile + lanes * d;
    const int64_t first = tile * layout.tile_rows;
    const int64_t rows = a.rows - first < layout.tile_rows ? a.rows - first : layout.tile_rows;
    const int64_t vectors = rows * layout.row_lanes / kLanes;
    for (int64_t j = 0; j < vectors;) {
      const int64_t block = column_block(vectors - j);
      for (int64_t i = 0; i < block; ++i) {
        const int64_t lane = (j + i) * kLanes, y = first + lane / layout.row_lanes, x = lane % layout.row_lanes;
        const T *k[kLanes], *v[kLanes];
        for (int64_t e = 0; e < kLanes; ++e) {
          const bool inside = window.top + y < a.height && window.left + x + e < a.width;
          const int64_t token = (window.image * a.height + window.top + y) * a.width + window.left + x + e;
          const T* row = inside ? arguments.qkv + token * 3 * C : arguments.qkv_bias;
          if (row == nullptr || x + e >= a.columns) {
            k[e] = v[e] = nothing;
            continue;
          }
          k[e] = row + C + head * d, v[e] = row + 2 * C + head * d;
          // The next head of this token is likely what comes next, and is on other pages for every token.
          for (int64_t c = d; c < 2 * d; c += kLine) {
            __builtin_prefetch(k[e] + c, 0, 2);
            __builtin_prefetch(v[e] + c, 0, 2);
            __builtin_prefetch(row + head * d + c, 0, 2);
          }
        }
        pack_eight(reinterpret_cast<float*>(k_tile + j * kLanes * d) + i * kLanes, block * kLanes, k, d);
        pack_values(v_tile, v, lane, vectors * kLanes, d);
      }
      j += block;
    }
  }
}

// Two to the power of a score at most 0, over the scores themselves, as a factor of the next product.
template <typename T>
inline Vec replace_by_power(float* row, int64_t at, float largest) {
  const Vec e = exp2_nonpositive<T>(load(row + at) - largest);
  store_narrow(reinterpret_cast<T*>(row) + at, e);
  return e;
}

// One query's part of the softmax of a tile: products q k^T to powers of two against its largest score so far.
template <typename T>
void online_softmax(float* scores, const KeyLayout& layout, int64_t rows, float scale, const float* bias_h,
                    const float* bias_w, float* output, float& largest, float& total, int64_t d) {
  Vec top = splat(-__builtin_inff());
  float* row = scores;
  for (int64_t y = 0; y < rows; ++y, row += layout.row_lanes) {
    const float of_row = bias_h == nullptr ? 0.0f : bias_h[y] * kLog2E;
    for (int64_t x = 0; x < layout.row_lanes; x += kLanes) {
      const Vec score = load(row + x) * scale + (load(bias_w + x) + of_row);
      store(row + x, score);
      top = larger(score, top);
    }
  }
  const float tile_largest = largest_lane(top);
  if (tile_largest > largest) {
    const Vec factor = exp2_nonpositive<float>(splat(largest - tile_largest));
    largest = tile_largest;
    total *= factor[0];
    for (int64_t c = 0; c < d; c += kLanes) store(output + c, load(output + c) * factor);
  }
  const int64_t lanes = rows * layout.row_lanes;
  Vec even{}, odd{};
  int64_t i = 0;
  for (; i + 2 * kLanes <= lanes; i += 2 * kLanes) {
    even += replace_by_power<T>(scores, i, largest);
    odd += replace_by_power<T>(scores, i + kLanes, largest);
  }
  if (i < lanes) even += replace_by_power<T>(scores, i, largest);
  total += sum(even + odd);
}

template <typename T>
void attend(const RelPosArguments<T>& arguments, Window window, int64_t head, const float* packed_tables,
            const float* packed_keys, int64_t begin, int64_t end, float* workspace) {
  typedef typename FactorOf<T>::Type Factor;
  const RelPosShape& a = arguments.shape;
  const KeyLayout layout = key_layout(a);
  const int64_t d = a.head_width, C = a.heads * d, lanes = layout.tile_rows * layout.row_lanes;
  const int64_t depth = d / kPerFactor<T>;
  const int64_t h_lanes = padded(2 * a.rows - 1), w_lanes = padded(2 * a.columns - 1) + kLanes;
  const int64_t width = a.width - window.left < a.columns ? a.width - window.left : a.columns;  // of real queries
  T* const queries = reinterpret_cast<T*>(workspace);                                           // [96, d]
  float* const output = workspace + kMostQueries * d;                                           // [96, d]
  float* const scores = output + kMostQueries * d;                                              // [96, lanes]
  float* const bias_w = scores + kMostQueries * lanes;                                          // [96, row_lanes]
  float* const all_h = bias_w + kMostQueries * layout.row_lanes;                                // [96, h_lanes]
  float* const all_w = all_h + kMostQueries * h_lanes;                                          // [96, w_lanes]
  float* const largest = all_w + kMostQueries * w_lanes;
  float* const total = largest + kMostQueries;
  const Factor* const tables = reinterpret_cast<const Factor*>(packed_tables);
  const Factor* const keys = reinterpret_cast<const Factor*>(packed_keys);
  const Matrix<Factor> left = {reinterpret_cast<const Factor*>(queries), depth, 1};
  const Matrix<Factor> weights = {reinterpret_cast<const Factor*>(scores), lanes, 1};
  const bool positions = arguments.rel_h != nullptr;

  for (int64_t start = begin; start < end; start += kMostQueries) {
    const int64_t count = end - start < kMostQueries ? end - start : kMostQueries;
    for (int64_t q = 0; q < count; ++q) {
      const int64_t y = window.top + (start + q) / width, x = window.left + (start + q) % width;
      const T* row = arguments.qkv + ((window.image * a.height + y) * a.width + x) * 3 * C + head * d;
      for (int64_t c = 0; c < d; c += kLanes) {
        store(queries + q * d + c, load(row + c));
        store(output + q * d + c, Vec{});
      }
      largest[q] = -__builtin_inff();
      total[q] = 0;
    }
    if (positions) {
      product<true>(all_h, h_lanes, left, tables, 0, count, h_lanes / kLanes, depth, false);
      product<true>(all_w, w_lanes, left, tables + depth * h_lanes, 0, count, w_lanes / kLanes - 1, depth, false);
    }
    for (int64_t q = 0; q < count; ++q) {
      const float* from = all_w + q * w_lanes + a.columns - 1 - (start + q) % width;
      float* to = bias_w + q * layout.row_lanes;
      for (int64_t x = 0; x < layout.row_lanes; ++x) {
        to[x] = x >= a.columns ? kNoKey : positions ? from[x] * kLog2E : 0.0f;
      }
    }
    for (int64_t tile = 0; tile < layout.tiles; ++tile) {
      const int64_t first = tile * layout.tile_rows;
      const int64_t rows = a.rows - first < layout.tile_rows ? a.rows - first : layout.tile_rows;
      const int64_t vectors = rows * layout.row_lanes / kLanes;
      const Factor* k_tile = keys + 2 * tile * lanes * depth;
      product<true>(scores, lanes, left, k_tile, 0, count, vectors, depth, false);
      for (int64_t q = 0; q < count; ++q) {
        const float* bias_h = all_h + q * h_lanes + a.rows - 1 - (start + q) / width + first;
        online_softmax<T>(scores + q * lanes, layout, rows, arguments.scale * kLog2E, positions ? bias_h : nullptr,
                          bias_w + q * layout.row_lanes, output + q * d, largest[q], total[q], d);
      }
      product<true>(output, d, weights, k_tile + lanes * depth, 0, count, d / kLanes, vectors * kLanes / kPerFactor<T>,
                    true);
    }
    for (int64_t q = 0; q < count; ++q) {
      const int64_t y = window.top + (start + q) / width, x = window.left + (start + q) % width;
      T* out = arguments.output + ((window.image * a.height + y) * a.width + x) * C + head * d;
      const float share = 1.0f / total[q];
      for (int64_t c = 0; c < d; c += kLanes) store_narrow(out + c, load(output + q * d + c) * share);
    }
  }
}

}  // namespace
}  // namespace sam_fast
