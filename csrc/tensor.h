// A borrowed, checked view of a Python tensor, obtained through DLPack's C exchange API (DLPack 1.2). No torch header
// is needed, so the built module is tied to no torch version. A view is valid while the Python object lives.
#pragma once

#include <Python.h>

#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <vector>

#include "arithmetic.h"

// DLPack's number of the device whose tensors the CUDA launchers take. The tests that emulate a GPU set it to the
// CPU's.
#if !defined(SAM_FAST_CUDA_DEVICE_TYPE)
#define SAM_FAST_CUDA_DEVICE_TYPE 2
#endif

namespace sam_fast {

// The part of DLPack's binary interface that is used here (https://dmlc.github.io/dlpack/latest/c_api.html).
namespace dlpack {

struct Version {
  uint32_t major, minor;
};
struct Device {
  int32_t type;  // 1 = CPU, 2 = CUDA
  int32_t id;
};
struct DataType {
  uint8_t code;  // 0 = int, 1 = uint, 2 = float, 4 = bfloat, 6 = bool
  uint8_t bits;
  uint16_t lanes;
};
struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
};
struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  int (*allocate)(Tensor*, void**, void*, void (*)(void*, const char*, const char*));
  int (*managed_from_object)(void*, void**);
  int (*managed_to_object)(void*, void**);
  int (*tensor_from_object)(void*, Tensor*);
  int (*current_stream)(int32_t, int32_t, void**);
};

}  // namespace dlpack

enum class DeviceType : int32_t { kCpu = 1, kCuda = SAM_FAST_CUDA_DEVICE_TYPE };

template <typename T>
constexpr dlpack::DataType dtype_of();
template <>
constexpr dlpack::DataType dtype_of<float>() {
  return {2, 32, 1};
}
template <>
constexpr dlpack::DataType dtype_of<Half>() {
  return {2, 16, 1};
}
template <>
constexpr dlpack::DataType dtype_of<Bfloat16>() {
  return {4, 16, 1};
}
template <>
constexpr dlpack::DataType dtype_of<uint8_t>() {
  return {1, 8, 1};
}
template <>
constexpr dlpack::DataType dtype_of<bool>() {
  return {6, 8, 1};
}
template <>
constexpr dlpack::DataType dtype_of<int32_t>() {
  return {0, 32, 1};
}
template <>
constexpr dlpack::DataType dtype_of<int64_t>() {
  return {0, 64, 1};
}

class TensorView {
 public:
  // Borrows `object`, which must be a contiguous torch.Tensor; `name` appears in error messages. Needs the GIL.
  TensorView(PyObject* object, const char* name) : name_(name) {
    const dlpack::ExchangeApi* api = exchange_api(object);
    if (api == nullptr || api->tensor_from_object == nullptr) {
      fail(std::string("must be a torch.Tensor, got ") + Py_TYPE(object)->tp_name);
    }
    if (api->tensor_from_object(object, &tensor_) != 0) {
      PyErr_Clear();
      fail("could not be read through DLPack");
    }
    int64_t expected = 1;
    for (int i = tensor_.ndim - 1; i >= 0; --i) {
      if (tensor_.shape[i] != 1 && tensor_.strides != nullptr && tensor_.strides[i] != expected && numel() > 0) {
        fail("must be contiguous");
      }
      expected *= tensor_.shape[i];
    }
  }

  int ndim() const { return tensor_.ndim; }
  int64_t size(int dim) const { return tensor_.shape[dim]; }
  int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < tensor_.ndim; ++i) n *= tensor_.shape[i];
    return n;
  }
  DeviceType device() const { return static_cast<DeviceType>(tensor_.device.type); }

  // The CPU data as T, after checking device, element type and (where an entry is not negative) shape.
  template <typename T>
  T* cpu(const std::vector<int64_t>& shape) const {
    if (device() != DeviceType::kCpu) fail("must be on the CPU");
    return data<T>(shape);
  }

  // The same for data on a CUDA device.
  template <typename T>
  T* cuda(const std::vector<int64_t>& shape) const {
    if (device() != DeviceType::kCuda) fail("must be on a CUDA device");
    return data<T>(shape);
  }

  template <typename T>
  bool holds() const {
    const dlpack::DataType want = dtype_of<T>();
    return tensor_.dtype.code == want.code && tensor_.dtype.bits == want.bits && tensor_.dtype.lanes == 1;
  }

  // The index of the one CUDA device on which all of the tensors are.
  static int cuda_device(std::initializer_list<const TensorView*> tensors) {
    const TensorView& first = **tensors.begin();
    if (first.device() != DeviceType::kCuda) first.fail("must be on a CUDA device");
    for (const TensorView* other : tensors) {
      if (other->device() == first.device() && other->tensor_.device.id == first.tensor_.device.id) continue;
      other->fail("is on " + other->place() + ", but " + first.name_ + " is on " + first.place());
    }
    return first.tensor_.device.id;
  }

 private:
  template <typename T>
  T* data(const std::vector<int64_t>& shape) const {
    if (!holds<T>()) fail("has the wrong element type");
    if (static_cast<size_t>(tensor_.ndim) != shape.size()) fail("has the wrong number of dimensions");
    for (int i = 0; i < tensor_.ndim; ++i) {
      if (shape[i] >= 0 && tensor_.shape[i] != shape[i]) fail("has the wrong size in dimension " + std::to_string(i));
    }
    return reinterpret_cast<T*>(static_cast<char*>(tensor_.data) + tensor_.byte_offset);
  }

  std::string place() const {
    return device() == DeviceType::kCpu ? "the CPU" : "device " + std::to_string(tensor_.device.id);
  }

  static const dlpack::ExchangeApi* exchange_api(PyObject* object) {
    PyObject* capsule =
        PyObject_GetAttrString(reinterpret_cast<PyObject*>(Py_TYPE(object)), "__dlpack_c_exchange_api__");
    if (capsule == nullptr) {
      PyErr_Clear();
      return nullptr;
    }
    auto* api = static_cast<dlpack::ExchangeApi*>(PyCapsule_GetPointer(capsule, "dlpack_exchange_api"));
    Py_DECREF(capsule);
    if (api == nullptr) PyErr_Clear();
    while (api != nullptr && api->version.major != 1) api = api->previous;
    return api;
  }

  [[noreturn]] void fail(const std::string& what) const {
    throw std::invalid_argument(std::string(name_) + " " + what);
  }

  const char* name_;
  dlpack::Tensor tensor_{};
};

}  // namespace sam_fast
