#include "device.h"
#include "launch.cuh"

namespace sam_fast {
namespace {

__global__ void probe_kernel() {}

}  // namespace

DeviceGuard::DeviceGuard(int device) : before_(0), changed_(false) {
  check_cuda(cudaGetDevice(&before_), "asking for the current CUDA device failed");
  if (device == before_) return;
  check_cuda(cudaSetDevice(device), "changing the current CUDA device failed");
  changed_ = true;
}

DeviceGuard::~DeviceGuard() {
  if (changed_) cudaSetDevice(before_);
}

std::string cuda_unavailable_reason() {
  int devices = 0;
  cudaError_t error = cudaGetDeviceCount(&devices);
  if (error == cudaSuccess && devices == 0) error = cudaErrorNoDevice;
  cudaFuncAttributes attributes;
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe_kernel);
  if (error == cudaSuccess) return "";
  cudaGetLastError();  // forget it: the next launch must not report it
  return cudaGetErrorString(error);
}

}  // namespace sam_fast
