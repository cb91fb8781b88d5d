// Schedules the upscaling: parts of images, a few tiles each.
#include "upscale_masks.h"

#include <omp.h>

#include <algorithm>
#include <vector>

#include "cpu_features.h"

namespace sam_fast {
namespace {

constexpr int64_t kTilesPerTask = 16;

}  // namespace

void upscale_masks(const UpscaleArguments& arguments, int threads) {
  const int64_t tokens = arguments.height * arguments.width, step = kTilesPerTask * kUpscaleTile;
  if (arguments.images == 0 || tokens == 0 || arguments.masks == 0) return;
  const UpscaleKernel kernel = SAM_FAST_PICK(kUpscale);
  const int64_t parts = (tokens + step - 1) / step;
  std::vector<float> workspaces(threads * upscale_workspace(arguments));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < arguments.images * parts; ++task) {
    const int64_t begin = task % parts * step, end = std::min(begin + step, tokens);
    kernel(arguments, task / parts, begin, end,
           workspaces.data() + omp_get_thread_num() * upscale_workspace(arguments));
  }
}

}  // namespace sam_fast
