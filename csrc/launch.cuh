// What the CUDA launchers share. They allocate nothing, wait for nothing and run on the stream that they are given;
// what the CUDA runtime refuses is thrown.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>

// The most blocks of a grid. Tests set it to a few, so that blocks have more than one thing to do.
#if !defined(SAM_FAST_MOST_BLOCKS)
#define SAM_FAST_MOST_BLOCKS std::numeric_limits<int32_t>::max()
#endif

namespace sam_fast {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// Launches `blocks` blocks, or as many as a grid may have: kernels step through their work by gridDim.x.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, void* stream, Arguments... arguments) {
  if (blocks <= 0) return;
  const int64_t most = SAM_FAST_MOST_BLOCKS;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks < most ? blocks : most));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  check_cuda(cudaLaunchKernelEx(&config, kernel, arguments...), "launching a kernel of sam_fast failed");
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

namespace {

__device__ inline int lane_index() { return static_cast<int>(threadIdx.x % kWarp); }

// The sum of `value` over the threads before this one, and in `total` over all; every thread of the block calls it.
template <int kThreads>
__device__ int64_t scan_block(int64_t value, int64_t* total) {
  __shared__ int64_t sums[kThreads / kWarp];
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / kWarp;
  int64_t sum = value;
  for (int step = 1; step < kWarp; step *= 2) {
    const int64_t before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  __syncthreads();  // the sums of the call before were read
  if (lane == kWarp - 1) sums[warp] = sum;
  __syncthreads();
  int64_t earlier = 0, all = 0;
  for (int i = 0; i < kThreads / kWarp; ++i) {
    if (i == warp) earlier = all;
    all += sums[i];
  }
  *total = all;
  return earlier + sum - value;
}

}  // namespace
}  // namespace sam_fast
