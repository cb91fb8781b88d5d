#include "postprocess_masks.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include "cpu_features.h"
#include "fresh_memory.h"
#include "postprocess_masks_plan.h"

namespace sam_fast {
namespace {

constexpr int64_t kPartBytes = 32 * 1024;  // packed bits of a part: stay in the first-level cache
constexpr int32_t kMaxSourceRows = 256;    // of a part, bounds the scratch memory
constexpr int64_t kTasksPerThread = 4;

struct Part {
  int32_t band_begin, band_end;
};

std::vector<Tap> make_taps(bool fused, int32_t count, int32_t in_size, int32_t out_size) {
  std::vector<Tap> taps(count);
  for (int32_t i = 0; i < count; ++i) {
    taps[i] = fused ? bilinear_tap<true>(i, in_size, out_size) : bilinear_tap<false>(i, in_size, out_size);
  }
  return taps;
}

bool is_small(int64_t height, int64_t width) { return height + width <= kSmallOutputSides; }

float blend_small(bool fused, const float* top, const float* bottom, Tap row, Tap column) {
  const float a = top[column.first], b = top[column.second], c = bottom[column.first], d = bottom[column.second];
  return fused ? bilinear_small<true>(a, b, c, d, row, column) : bilinear_small<false>(a, b, c, d, row, column);
}

float blend_separable(bool fused, const float* top, const float* bottom, Tap row, Tap column) {
  const auto mix = [fused](float a, float wa, float b, float wb) {
    return fused ? blend<true>(a, wa, b, wb) : blend<false>(a, wa, b, wb);
  };
  return mix(mix(top[column.first], column.first_weight, top[column.second], column.second_weight), row.first_weight,
             mix(bottom[column.first], column.first_weight, bottom[column.second], column.second_weight),
             row.second_weight);
}

// The tables behind a Plan.
class Tables {
 public:
  Tables(const MaskGeometry& g, const MaskKernels& kernel)
      : geometry_(g),
        fused_(kernel.fused),
        small_grid_(is_small(g.image_size, g.image_size)),
        grid_row_(make_taps(fused_, g.input_height, g.low_height, g.image_size)),
        grid_column_(make_taps(fused_, g.input_width, g.low_width, g.image_size)),
        output_row_(make_taps(fused_, g.height, g.input_height, g.height)),
        output_column_(make_taps(fused_, g.width, g.input_width, g.width)) {
    plan_.one_step = small_grid_;
    plan_.source_height = small_grid_ ? g.input_height : g.low_height;
    plan_.source_width = small_grid_ ? g.input_width : g.low_width;
    plan_.row_stride = plan_.source_width;
    plan_.mask_stride = plan_.row_stride * plan_.source_height;
    plan_.height = g.height;
    plan_.width = g.width;
    plan_.words = (g.width + 63) / 64;
    if (small_grid_) {
      for (int32_t i = 0; i < g.input_height; ++i) grid_row_[i] = {i, i, 1.0f, 0.0f};
      for (int32_t i = 0; i < g.input_width; ++i) grid_column_[i] = {i, i, 1.0f, 0.0f};
    }
    if (is_small(g.height, g.width)) return;  // computed pixel by pixel: see small_output
    make_columns(kernel.lanes);
    make_bands();
  }

  const Plan& plan() const { return plan_; }
  int32_t bands() const { return static_cast<int32_t>(bands_.size()); }
  bool small_grid() const { return small_grid_; }

  // The S x S grid of one mask, cropped: [input_height,input_width], by the rule for small outputs.
  void small_grid(const float* logits, float* grid) const {
    const std::vector<Tap> rows = make_taps(fused_, geometry_.input_height, geometry_.low_height, geometry_.image_size);
    const std::vector<Tap> columns =
        make_taps(fused_, geometry_.input_width, geometry_.low_width, geometry_.image_size);
    for (const Tap& row : rows) {
      const float* top = logits + static_cast<int64_t>(row.first) * geometry_.low_width;
      const float* bottom = logits + static_cast<int64_t>(row.second) * geometry_.low_width;
      for (const Tap& column : columns) *grid++ = blend_small(fused_, top, bottom, row, column);
    }
  }

  // A whole output of at most kSmallOutputSides: [height,width].
  void small_output(const float* source, float* output) const {
    for (const Tap& row : output_row_) {
      for (const Tap& column : output_column_) {
        float grid[2][2];
        for (int i = 0; i < 2; ++i) {
          const Tap grid_row = grid_row_[i == 0 ? row.first : row.second];
          const float* top = source + grid_row.first * plan_.row_stride;
          const float* bottom = source + grid_row.second * plan_.row_stride;
          for (int j = 0; j < 2; ++j) {
            const Tap grid_column = grid_column_[j == 0 ? column.first : column.second];
            grid[i][j] =
                plan_.one_step ? top[grid_column.first] : blend_separable(fused_, top, bottom, grid_row, grid_column);
          }
        }
        const Tap across = {0, 1, column.first_weight, column.second_weight};
        *output++ = blend_small(fused_, grid[0], grid[1], row, across);
      }
    }
  }

  // Bands in parts of about kPartBytes of bits, smaller where there are too few tasks for the threads.
  std::vector<Part> parts(int64_t masks, int threads) const {
    int64_t rows = std::max<int64_t>(1, kPartBytes / (plan_.words * 8));
    const int64_t wanted = (threads * kTasksPerThread + masks - 1) / std::max<int64_t>(masks, 1);
    rows = std::min(rows, std::max<int64_t>(8, plan_.height / wanted));
    std::vector<Part> parts;
    int32_t begin = 0;
    for (int32_t end = 1; end <= bands(); ++end) {
      const bool full = end == bands() || bands_[end].row_end - bands_[begin].row_begin > rows ||
                        bands_[end].source_last - bands_[begin].source_first >= kMaxSourceRows;
      if (!full) continue;
      parts.push_back({begin, end});
      begin = end;
    }
    return parts;
  }

 private:
  void make_columns(int32_t lanes) {
    const int32_t padded = plan_.words * kStripWidth;
    column_.assign(4 * static_cast<size_t>(padded), 0);
    weight_.assign(6 * static_cast<size_t>(padded), 0.0f);
    for (int32_t x = 0; x < padded; ++x) {
      const Tap out = output_column_[std::min(x, plan_.width - 1)];
      for (int side = 0; side < 2; ++side) {
        const Tap grid = grid_column_[side == 0 ? out.first : out.second];
        column_[(2 * side) * padded + x] = grid.first;
        column_[(2 * side + 1) * padded + x] = grid.second;
        weight_[(2 * side) * padded + x] = grid.first_weight;
        weight_[(2 * side + 1) * padded + x] = grid.second_weight;
      }
      const bool inside = x < plan_.width;
      weight_[4 * padded + x] = inside ? out.first_weight : std::numeric_limits<float>::quiet_NaN();
      weight_[5 * padded + x] = inside ? out.second_weight : std::numeric_limits<float>::quiet_NaN();
    }
    // Columns grow along x and from tap to tap, so the ends of a range of x are those of what it reads.
    strips_.resize(plan_.words);
    for (int32_t strip = 0; strip < plan_.words; ++strip) {
      strips_[strip] = {column_[strip * kStripWidth], column_[3 * padded + strip * kStripWidth + kStripWidth - 1]};
    }
    bases_.resize(padded / lanes);
    for (int32_t group = 0; group < padded / lanes; ++group) {
      const int32_t x = group * lanes;
      const int32_t base = std::min(column_[x], plan_.source_width - lanes);
      const bool loadable = base >= 0 && column_[3 * padded + x + lanes - 1] - base < lanes;
      bases_[group] = loadable ? base : -1;
      if (!loadable) continue;
      for (int tap = 0; tap < 4; ++tap) {
        for (int32_t i = 0; i < lanes; ++i) column_[tap * padded + x + i] -= base;
      }
    }
    for (int tap = 0; tap < 4; ++tap) {
      plan_.source_column[tap] = column_.data() + tap * padded;
      plan_.source_weight[tap] = weight_.data() + tap * padded;
    }
    plan_.column_weight[0] = weight_.data() + 4 * padded;
    plan_.column_weight[1] = weight_.data() + 5 * padded;
    plan_.group_base = bases_.data();
    plan_.strips = strips_.data();
  }

  void make_bands() {
    for (int32_t y = 0; y < plan_.height; ++y) {
      const int32_t first = grid_row_[output_row_[y].first].first;
      const int32_t last = grid_row_[output_row_[y].second].second;
      const bool grows =
          !bands_.empty() && bands_.back().source_first == first && y - bands_.back().row_begin < kMaxBandRows;
      if (!grows) bands_.push_back({y, y, first, last});
      bands_.back().row_end = y + 1;
      bands_.back().source_last = last;
    }
    plan_.output_row = output_row_.data();
    plan_.grid_row = grid_row_.data();
    plan_.bands = bands_.data();
  }

  MaskGeometry geometry_;
  bool fused_, small_grid_;
  std::vector<Tap> grid_row_, grid_column_, output_row_, output_column_;
  std::vector<int32_t> column_, bases_;
  std::vector<float> weight_;
  std::vector<Strip> strips_;
  std::vector<Band> bands_;
  Plan plan_{};
};

// The source of all masks: the logits, or the small grids made from them (kept in `grids`).
const float* make_source(const Tables& tables, const float* logits, int64_t n, const MaskGeometry& g,
                         std::vector<float>& grids, int threads) {
  if (!tables.small_grid()) return logits;
  const int64_t stride = tables.plan().mask_stride;
  grids.resize(n * stride);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < n; ++i) {
    tables.small_grid(logits + i * g.low_height * g.low_width, grids.data() + i * stride);
  }
  return grids.data();
}

MaskTally tally_pixels(const float* pixels, const Plan& plan, const MaskThresholds& thresholds, uint8_t* bits) {
  MaskTally tally = {0, 0, 0, plan.width, plan.height, -1, -1};
  if (bits != nullptr) std::fill(bits, bits + static_cast<int64_t>(plan.height) * plan.words * 8, uint8_t{0});
  for (int32_t y = 0; y < plan.height; ++y) {
    for (int32_t x = 0; x < plan.width; ++x) {
      const float value = *pixels++;
      tally.inner += value > thresholds.inner;
      tally.outer += value > thresholds.outer;
      if (!(value > thresholds.mask)) continue;
      ++tally.area;
      tally.left = std::min(tally.left, x);
      tally.right = std::max(tally.right, x);
      tally.top = std::min(tally.top, y);
      tally.bottom = y;
      if (bits != nullptr) bits[static_cast<int64_t>(y) * plan.words * 8 + x / 8] |= uint8_t(1u << (x % 8));
    }
  }
  return tally;
}

// Sums the tallies of a mask's parts and writes its results.
void finish(const MaskTally* tallies, size_t count, int64_t* area, float* stability, int64_t* box) {
  MaskTally all = {0, 0, 0, 0, 0, -1, -1};
  for (size_t i = 0; i < count; ++i) {
    const MaskTally& part = tallies[i];
    const bool was_empty = all.area == 0;
    all.area += part.area;
    all.inner += part.inner;
    all.outer += part.outer;
    if (part.area == 0) continue;
    all.left = was_empty ? part.left : std::min(all.left, part.left);
    all.top = was_empty ? part.top : all.top;
    all.right = std::max(all.right, part.right);
    all.bottom = part.bottom;
  }
  *area = all.area;
  *stability = static_cast<float>(all.inner) / static_cast<float>(all.outer);
  const bool empty = all.area == 0;
  box[0] = empty ? 0 : all.left;
  box[1] = empty ? 0 : all.top;
  box[2] = empty ? 0 : all.right;
  box[3] = empty ? 0 : all.bottom;
}

// One thread's working memory, for any part.
class ScratchMemory {
 public:
  ScratchMemory(const Plan& plan, const std::vector<Part>& parts) {
    int64_t source_rows = 0, bands = 0;
    for (const Part& part : parts) {
      const Band &first = plan.bands[part.band_begin], &last = plan.bands[part.band_end - 1];
      source_rows = std::max<int64_t>(source_rows, last.source_last - first.source_first + 1);
      bands = std::max<int64_t>(bands, part.band_end - part.band_begin);
    }
    const int64_t code_words = (plan.source_width + 63) / 64;
    memory_.reset(new uint64_t[(4 * source_rows + 5 * bands) * code_words]);
    view.codes = memory_.get();
    view.band = view.codes + 4 * source_rows * code_words;
    view.code_words = static_cast<int32_t>(code_words);
  }

  MaskScratch view;

 private:
  std::unique_ptr<uint64_t[]> memory_;
};

}  // namespace

void postprocess_masks(int64_t* area, float* stability, int64_t* boxes, uint8_t* bits, const float* logits, int64_t n,
                       const MaskGeometry& geometry, const MaskThresholds& thresholds, int threads) {
  if (n == 0) return;
  const MaskKernels& kernel = SAM_FAST_PICK(kMaskKernels);
  const Tables tables(geometry, kernel);
  const Plan& plan = tables.plan();
  std::vector<float> grids;
  const float* source = make_source(tables, logits, n, geometry, grids, threads);
  const int64_t mask_bytes = static_cast<int64_t>(plan.height) * plan.words * 8;
  if (is_small(plan.height, plan.width)) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) {
      float pixels[kSmallOutputSides * kSmallOutputSides / 4];
      tables.small_output(source + i * plan.mask_stride, pixels);
      const MaskTally tally = tally_pixels(pixels, plan, thresholds, bits == nullptr ? nullptr : bits + i * mask_bytes);
      finish(&tally, 1, area + i, stability + i, boxes + 4 * i);
    }
    return;
  }
  const std::vector<Part> parts = tables.parts(n, threads);
  const int64_t count = static_cast<int64_t>(parts.size());
  std::vector<MaskTally> tallies(n * count);
  std::vector<ScratchMemory> scratch;  // allocated here: an exception must not leave a parallel region
  for (int i = 0; i < threads; ++i) scratch.emplace_back(plan, parts);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < n * count; ++task) {
    const int64_t mask = task / count;
    const Part part = parts[task % count];
    uint64_t* rows = nullptr;
    if (bits != nullptr) {
      rows = reinterpret_cast<uint64_t*>(bits + mask * mask_bytes) +
             static_cast<int64_t>(plan.bands[part.band_begin].row_begin) * plan.words;
    }
    kernel.tally(plan, source + mask * plan.mask_stride, thresholds, part.band_begin, part.band_end, rows,
                 scratch[omp_get_thread_num()].view, &tallies[task]);
  }
  for (int64_t i = 0; i < n; ++i) finish(&tallies[i * count], count, area + i, stability + i, boxes + 4 * i);
}

void resize_logits(float* output, const float* logits, int64_t n, const MaskGeometry& geometry, int threads) {
  if (n == 0) return;
  const MaskKernels& kernel = SAM_FAST_PICK(kMaskKernels);
  const Tables tables(geometry, kernel);
  const Plan& plan = tables.plan();
  std::vector<float> grids;
  const float* source = make_source(tables, logits, n, geometry, grids, threads);
  const int64_t pixels = static_cast<int64_t>(plan.height) * plan.width;
  if (is_small(plan.height, plan.width)) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < n; ++i) tables.small_output(source + i * plan.mask_stride, output + i * pixels);
    return;
  }
  const std::vector<Part> parts = tables.parts(n, threads);
  const int64_t count = static_cast<int64_t>(parts.size());
  const bool fresh = n * pixels * 4 >= kFreshBytes;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < n * count; ++task) {
    const Part part = parts[task % count];
    float* const mask = output + task / count * pixels;
    if (fresh) {
      const int64_t begin = plan.bands[part.band_begin].row_begin, end = plan.bands[part.band_end - 1].row_end;
      take_pages(mask + begin * plan.width, (end - begin) * plan.width * 4);
    }
    kernel.resize(plan, source + task / count * plan.mask_stride, part.band_begin, part.band_end, mask);
  }
}

}  // namespace sam_fast
