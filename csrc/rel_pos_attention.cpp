// Schedules attention. Small windows are tasks of their own, keys packed by the task; where the window is the image,
// the keys of a head are packed once and the queries are what is shared out.
#include "rel_pos_attention.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int kHeadsTogether = 4;  // of a window, by one thread: what is fetched ahead for the next head is near it

int64_t real_queries(const RelPosShape& a, Window window) {
  return std::min(a.rows, a.height - window.top) * std::min(a.columns, a.width - window.left);
}

template <typename T>
void run(const RelPosKernels<T>& kernel, const RelPosArguments<T>& arguments, int threads) {
  const RelPosShape& a = arguments.shape;
  if (a.images == 0 || a.height == 0 || a.width == 0) return;
  std::vector<float> tables(arguments.rel_h == nullptr ? 0 : packed_tables_size<T>(a));
  kernel.pack_tables(arguments, tables.data());
  const int64_t down = (a.height + a.rows - 1) / a.rows, across = (a.width + a.columns - 1) / a.columns;
  const int64_t windows = a.images * down * across, size = packed_keys_size<T>(a);
  const auto window_at = [&](int64_t i) {
    return Window{i / (down * across), i / across % down * a.rows, i % across * a.columns};
  };
  std::vector<float> workspaces(threads * rel_pos_workspace(a));
  if (windows * a.heads >= 8 * threads) {
    std::vector<float> keys(threads * size);
#pragma omp parallel for num_threads(threads) schedule(dynamic, kHeadsTogether)
    for (int64_t task = 0; task < windows * a.heads; ++task) {
      const int thread = omp_get_thread_num();
      const Window window = window_at(task / a.heads);
      float* own_keys = keys.data() + thread * size;
      kernel.pack_keys(arguments, window, task % a.heads, own_keys);
      kernel.attend(arguments, window, task % a.heads, tables.data(), own_keys, 0, real_queries(a, window),
                    workspaces.data() + thread * rel_pos_workspace(a));
    }
    return;
  }
  std::vector<float> keys(a.heads * size);
  for (int64_t i = 0; i < windows; ++i) {
    const Window window = window_at(i);
    const int64_t queries = real_queries(a, window), tiles = (queries + kMostQueries - 1) / kMostQueries;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
      for (int64_t head = 0; head < a.heads; ++head)
        kernel.pack_keys(arguments, window, head, keys.data() + head * size);
#pragma omp for schedule(dynamic)
      for (int64_t task = 0; task < a.heads * tiles; ++task) {
        const int64_t head = task / tiles, begin = task % tiles * kMostQueries;
        kernel.attend(arguments, window, head, tables.data(), keys.data() + head * size, begin,
                      std::min(begin + kMostQueries, queries),
                      workspaces.data() + omp_get_thread_num() * rel_pos_workspace(a));
      }
    }
  }
}

}  // namespace

template <>
void rel_pos_attention(const RelPosArguments<float>& arguments, int threads) {
  run(SAM_FAST_PICK(kRelPos), arguments, threads);
}

template <>
void rel_pos_attention(const RelPosArguments<uint16_t>& arguments, int threads) {
  run(SAM_FAST_PICK_BF16(kRelPosBf16), arguments, threads);
}

}  // namespace sam_fast
