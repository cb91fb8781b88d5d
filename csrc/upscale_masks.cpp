// Schedules the upscaling: parts of images, a few tiles each.
#include "upscale_masks.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int64_t kTilesPerTask = 16;

template <typename T>
void run(UpscaleKernel<T> kernel, const UpscaleArguments<T>& arguments, int threads) {
  const UpscaleShape& shape = arguments.shape;
  const int64_t tokens = shape.height * shape.width, step = kTilesPerTask * kUpscaleTile;
  if (shape.images == 0 || tokens == 0 || shape.masks == 0) return;
  const int64_t parts = (tokens + step - 1) / step;
  std::vector<float> workspaces(threads * upscale_workspace(shape));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < shape.images * parts; ++task) {
    const int64_t begin = task % parts * step, end = std::min(begin + step, tokens);
    kernel(arguments, task / parts, begin, end, workspaces.data() + omp_get_thread_num() * upscale_workspace(shape));
  }
}

}  // namespace

template <>
void upscale_masks(const UpscaleArguments<float>& arguments, int threads) {
  run(SAM_FAST_PICK(kUpscale), arguments, threads);
}

template <>
void upscale_masks(const UpscaleArguments<uint16_t>& arguments, int threads) {
  run(SAM_FAST_PICK_BF16(kUpscaleBf16), arguments, threads);
}

}  // namespace sam_fast
