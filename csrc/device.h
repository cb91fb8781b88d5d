// What the launchers for a GPU need to know of it. Empty of CUDA headers, for files that a C++ compiler reads.
#pragma once

#include <string>

namespace sam_fast {

// Makes `device` the current CUDA device of this thread, and the one before it current again in the end.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_;
  bool changed_;
};

// Why kernels of this build cannot run on the current device (no device, a driver that is too old, a GPU that they were
// not compiled for), or an empty string.
std::string cuda_unavailable_reason();

}  // namespace sam_fast
