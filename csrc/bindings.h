// What the Python faces of the operations share: bindings.cpp (masks), bindings_model.cpp (the model) and
// bindings_cuda.cpp (GPU), which alone know pybind11. Arguments were validated by the Python operation (sam_fast/ops);
// what is checked here again is what memory safety rests on.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <utility>

#include "packed_masks.h"
#include "postprocess_masks.h"
#include "rle.h"
#include "tensor.h"

namespace py = pybind11;

namespace sam_fast {

// Adds the operations inside the model.
void bind_model(py::module_& m);

// Adds the operations on a GPU; in builds with CUDA.
void bind_cuda(py::module_& m);

inline TensorView view(const py::handle& object, const char* name) { return TensorView(object.ptr(), name); }

inline Placement checked_placement(const TensorView& bits, int64_t width, int64_t canvas_height, int64_t canvas_width,
                                   int64_t x0, int64_t y0) {
  const Placement place{bits.size(1), width, canvas_height, canvas_width, x0, y0};
  if (width < 0 || x0 < 0 || y0 < 0 || x0 + width > canvas_width || y0 + place.height > canvas_height) {
    throw std::invalid_argument("the mask must lie inside the canvas");
  }
  return place;
}

// (height, width)
using Size = std::pair<int32_t, int32_t>;

inline MaskGeometry mask_geometry(const TensorView& logits, Size input_size, Size original_size, int32_t image_size) {
  const MaskGeometry geometry = {static_cast<int32_t>(logits.size(1)),
                                 static_cast<int32_t>(logits.size(2)),
                                 image_size,
                                 input_size.first,
                                 input_size.second,
                                 original_size.first,
                                 original_size.second};
  const bool positive = geometry.low_height > 0 && geometry.low_width > 0 && geometry.input_height > 0 &&
                        geometry.input_width > 0 && geometry.height > 0 && geometry.width > 0;
  if (!positive || geometry.input_height > image_size || geometry.input_width > image_size) {
    throw std::invalid_argument("mask sizes must be positive and input_size within image_size");
  }
  return geometry;
}

inline void check_pixel_count(int64_t height, int64_t width) {
  if (height > 0 && width > std::numeric_limits<int32_t>::max() / height) {
    throw std::invalid_argument("a mask must have fewer than 2**31 pixels");
  }
}

}  // namespace sam_fast
