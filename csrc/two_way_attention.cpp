// Schedules sweeps: one prompt's pixels at a time where there are many prompts, parts of them where there are few.
// Parts of a prompt are read against a largest score of their own and brought together at the end.
#include "two_way_attention.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu_features.h"

namespace sam_fast {
namespace {

// What the parts of a prompt have read, [R, C]: each part's sums on the scale of the largest score of all.
void combine(float* read, const TwoWayPartial* parts, int64_t count, int64_t rows, int64_t channels) {
  const int64_t stride = two_way_stride(channels);
  for (int64_t r = 0; r < rows; ++r) {
    float largest = -std::numeric_limits<float>::infinity();
    for (int64_t i = 0; i < count; ++i) largest = std::max(largest, parts[i].largest[r]);
    float total = 0;
    float* out = read + r * channels;
    std::fill(out, out + channels, 0.0f);
    for (int64_t i = 0; i < count; ++i) {
      const float scale = std::exp(parts[i].largest[r] - largest);
      const float* part = parts[i].read + r * stride;
      total += scale * parts[i].total[r];
      for (int64_t c = 0; c < channels; ++c) out[c] += scale * part[c];
    }
    const float share = 1.0f / total;
    for (int64_t c = 0; c < channels; ++c) out[c] *= share;
  }
}

template <typename T>
void run(TwoWaySweep<T> sweep, const TwoWayArguments<T>& arguments, int threads) {
  const TwoWayShape& shape = arguments.shape;
  if (shape.prompts == 0 || shape.pixels == 0) return;
  const int64_t rows = 8 * arguments.readers, tiles = (shape.pixels + kTwoWayTile - 1) / kTwoWayTile;
  const int64_t wanted = threads == 1 ? 1 : (4 * threads + shape.prompts - 1) / shape.prompts;
  const int64_t part_pixels = kTwoWayTile * ((tiles + wanted - 1) / wanted);
  const int64_t parts = (shape.pixels + part_pixels - 1) / part_pixels, tasks = shape.prompts * parts;
  const int64_t partial_size = rows * (2 + two_way_stride(shape.channels));
  // Allocated here: an exception must not leave a parallel region.
  std::vector<float> partial_memory(tasks * partial_size);
  std::vector<float> workspaces(threads * two_way_workspace(arguments));
  std::vector<TwoWayPartial> partials(tasks);
  for (int64_t i = 0; i < tasks && partial_size > 0; ++i) {
    float* memory = partial_memory.data() + i * partial_size;
    partials[i] = {memory, memory + rows, memory + 2 * rows};
  }
#pragma omp parallel num_threads(threads)
  {
    float* workspace = workspaces.data() + omp_get_thread_num() * two_way_workspace(arguments);
#pragma omp for schedule(dynamic)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t begin = task % parts * part_pixels, end = std::min(begin + part_pixels, shape.pixels);
      sweep(arguments, task / parts, begin, end, workspace, partials[task]);
    }
    if (rows > 0) {
#pragma omp for schedule(static)
      for (int64_t prompt = 0; prompt < shape.prompts; ++prompt) {
        combine(arguments.read + prompt * rows * shape.channels, &partials[prompt * parts], parts, rows,
                shape.channels);
      }
    }
  }
}

}  // namespace

template <>
void two_way_attention(const TwoWayArguments<float>& arguments, int threads) {
  run(SAM_FAST_PICK(kTwoWaySweep), arguments, threads);
}

template <>
void two_way_attention(const TwoWayArguments<uint16_t>& arguments, int threads) {
  run(SAM_FAST_PICK_BF16(kTwoWaySweepBf16), arguments, threads);
}

}  // namespace sam_fast
