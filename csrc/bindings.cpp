// The Python face of the native operations on masks, on a CPU; and the module.
#include "bindings.h"

#include "connected_components.h"
#include "cpu_features.h"
#include "nms.h"
#include "packed_masks.h"
#include "postprocess_masks.h"
#include "rle.h"
#include "tensor.h"

namespace sam_fast {
namespace {

// The start of each mask's part of a flat array of `size` elements, checked to lie in it.
const int64_t* offsets_into(const TensorView& offsets, int64_t size) {
  const int64_t* data = offsets.cpu<int64_t>({-1});
  const int64_t n = offsets.size(0) - 1;
  bool ascending = n >= 0 && data[0] >= 0 && data[n] <= size;
  for (int64_t i = 0; ascending && i < n; ++i) ascending = data[i] <= data[i + 1];
  if (!ascending) throw std::invalid_argument("offsets must ascend and lie inside the flat array");
  return data;
}

void bind_packed_masks(py::module_& m) {
  m.def("pack_masks", [](py::handle bits_, py::handle masks_, int num_threads) {
    const TensorView bits = view(bits_, "bits"), masks = view(masks_, "masks");
    const bool* in = masks.cpu<bool>({-1, -1});
    const int64_t rows = masks.size(0), width = masks.size(1);
    uint8_t* out = bits.cpu<uint8_t>({rows, row_bytes(width)});
    py::gil_scoped_release unlocked;
    pack_masks(out, in, rows, width, num_threads);
  });
  m.def("unpack_masks", [](py::handle masks_, py::handle bits_, int num_threads) {
    const TensorView masks = view(masks_, "masks"), bits = view(bits_, "bits");
    bool* out = masks.cpu<bool>({-1, -1});
    const int64_t rows = masks.size(0), width = masks.size(1);
    const uint8_t* in = bits.cpu<uint8_t>({rows, row_bytes(width)});
    py::gil_scoped_release unlocked;
    unpack_masks(out, in, rows, width, num_threads);
  });
  m.def("unpack_masks_apart",
        [](const std::vector<std::pair<py::object, bool>>& masks, py::handle bits_, int64_t width, int num_threads) {
          const TensorView bits = view(bits_, "bits");
          const int64_t n = static_cast<int64_t>(masks.size()), height = bits.size(1);
          const uint8_t* in = bits.cpu<uint8_t>({n, height, row_bytes(width)});
          std::vector<MaskPlace> out;
          for (const auto& [mask, fresh] : masks) out.push_back({view(mask, "mask").cpu<bool>({height, width}), fresh});
          py::gil_scoped_release unlocked;
          unpack_masks_apart(out, in, height, width, num_threads);
        });
}

void bind_rle(py::module_& m) {
  m.def("rle_offsets", [](py::handle offsets_, py::handle bits_, int64_t width, int64_t canvas_height,
                          int64_t canvas_width, int64_t x0, int64_t y0, int num_threads) {
    const TensorView offsets = view(offsets_, "offsets"), bits = view(bits_, "bits");
    const uint8_t* in = bits.cpu<uint8_t>({-1, -1, row_bytes(width)});
    const Placement place = checked_placement(bits, width, canvas_height, canvas_width, x0, y0);
    const int64_t n = bits.size(0);
    int64_t* out = offsets.cpu<int64_t>({n + 1});
    py::gil_scoped_release unlocked;
    rle_offsets(out, in, n, place, num_threads);
  });
  m.def("rle_encode", [](py::handle counts_, py::handle offsets_, py::handle bits_, int64_t width,
                         int64_t canvas_height, int64_t canvas_width, int64_t x0, int64_t y0, int num_threads) {
    const TensorView counts = view(counts_, "counts"), offsets = view(offsets_, "offsets"), bits = view(bits_, "bits");
    const uint8_t* in = bits.cpu<uint8_t>({-1, -1, row_bytes(width)});
    const Placement place = checked_placement(bits, width, canvas_height, canvas_width, x0, y0);
    const int64_t n = bits.size(0);
    int64_t* out = counts.cpu<int64_t>({-1});
    const int64_t* starts = offsets_into(offsets, counts.size(0));
    if (offsets.size(0) != n + 1) throw std::invalid_argument("offsets must have one entry more than there are masks");
    py::gil_scoped_release unlocked;
    rle_encode(out, starts, in, n, place, num_threads);
  });
  m.def("rle_decode", [](py::handle bits_, py::handle counts_, py::handle offsets_, int64_t width, int num_threads) {
    const TensorView bits = view(bits_, "bits"), counts = view(counts_, "counts"), offsets = view(offsets_, "offsets");
    const int64_t* in = counts.cpu<int64_t>({-1});
    const int64_t* starts = offsets_into(offsets, counts.size(0));
    const int64_t n = offsets.size(0) - 1;
    uint8_t* out = bits.cpu<uint8_t>({n, -1, row_bytes(width)});
    const int64_t height = bits.size(1);
    py::gil_scoped_release unlocked;
    return rle_decode(out, in, starts, n, height, width, num_threads);
  });
  m.def("rle_compressed_offsets", [](py::handle string_offsets_, py::handle counts_, py::handle offsets_) {
    const TensorView string_offsets = view(string_offsets_, "string_offsets"), counts = view(counts_, "counts"),
                     offsets = view(offsets_, "offsets");
    const int64_t* in = counts.cpu<int64_t>({-1});
    const int64_t* starts = offsets_into(offsets, counts.size(0));
    const int64_t n = offsets.size(0) - 1;
    int64_t* out = string_offsets.cpu<int64_t>({n + 1});
    py::gil_scoped_release unlocked;
    rle_compressed_offsets(out, in, starts, n);
  });
  m.def("rle_compress",
        [](py::handle text_, py::handle string_offsets_, py::handle counts_, py::handle offsets_, int num_threads) {
          const TensorView text = view(text_, "text"), string_offsets = view(string_offsets_, "string_offsets"),
                           counts = view(counts_, "counts"), offsets = view(offsets_, "offsets");
          const int64_t* in = counts.cpu<int64_t>({-1});
          const int64_t* starts = offsets_into(offsets, counts.size(0));
          uint8_t* out = text.cpu<uint8_t>({-1});
          const int64_t* string_starts = offsets_into(string_offsets, text.size(0));
          const int64_t n = offsets.size(0) - 1;
          if (string_offsets.size(0) != n + 1) throw std::invalid_argument("string_offsets must be as long as offsets");
          py::gil_scoped_release unlocked;
          rle_compress(out, string_starts, in, starts, n, num_threads);
        });
  m.def("rle_decompress", [](py::handle counts_, py::handle text_) {
    const TensorView counts = view(counts_, "counts"), text = view(text_, "text");
    const uint8_t* in = text.cpu<uint8_t>({-1});
    const int64_t length = text.size(0);
    int64_t* out = counts.cpu<int64_t>({length});
    py::gil_scoped_release unlocked;
    return rle_decompress(out, in, length);
  });
}

void bind_nms(py::module_& m) {
  m.def("nms", [](py::handle kept_, py::handle boxes_, py::handle scores_, double iou_threshold) {
    const TensorView kept = view(kept_, "kept"), boxes = view(boxes_, "boxes"), scores = view(scores_, "scores");
    const float* in = boxes.cpu<float>({-1, 4});
    const int64_t n = boxes.size(0);
    if (n > std::numeric_limits<uint32_t>::max()) throw std::invalid_argument("nms takes at most 2**32 - 1 boxes");
    const float* in_scores = scores.cpu<float>({n});
    int64_t* out = kept.cpu<int64_t>({n});
    py::gil_scoped_release unlocked;
    return nms(out, in, in_scores, n, iou_threshold);
  });
}

void bind_postprocess_masks(py::module_& m) {
  m.def("postprocess_masks", [](py::handle area_, py::handle stability_, py::handle boxes_, py::object bits_,
                                py::handle logits_, Size input_size, Size original_size, int32_t image_size,
                                float mask_threshold, float inner_threshold, float outer_threshold, int num_threads) {
    const TensorView logits = view(logits_, "logits");
    const float* in = logits.cpu<float>({-1, -1, -1});
    const int64_t n = logits.size(0);
    const MaskGeometry geometry = mask_geometry(logits, input_size, original_size, image_size);
    int64_t* area = view(area_, "area").cpu<int64_t>({n});
    float* stability = view(stability_, "stability_score").cpu<float>({n});
    int64_t* boxes = view(boxes_, "boxes").cpu<int64_t>({n, 4});
    uint8_t* bits = nullptr;
    if (!bits_.is_none()) bits = view(bits_, "bits").cpu<uint8_t>({n, geometry.height, row_bytes(geometry.width)});
    const MaskThresholds thresholds = {mask_threshold, inner_threshold, outer_threshold};
    py::gil_scoped_release unlocked;
    postprocess_masks(area, stability, boxes, bits, in, n, geometry, thresholds, num_threads);
  });
  m.def("resize_logits", [](py::handle output_, py::handle logits_, Size input_size, Size original_size,
                            int32_t image_size, int num_threads) {
    const TensorView logits = view(logits_, "logits");
    const float* in = logits.cpu<float>({-1, -1, -1});
    const int64_t n = logits.size(0);
    const MaskGeometry geometry = mask_geometry(logits, input_size, original_size, image_size);
    float* output = view(output_, "output").cpu<float>({n, geometry.height, geometry.width});
    py::gil_scoped_release unlocked;
    resize_logits(output, in, n, geometry, num_threads);
  });
}

void bind_connected_components(py::module_& m) {
  m.def("connected_components", [](py::handle labels_, py::handle count_, py::handle bits_, int num_threads) {
    const TensorView labels = view(labels_, "labels"), count = view(count_, "count"), bits = view(bits_, "bits");
    int32_t* out = labels.cpu<int32_t>({-1, -1, -1});
    const int64_t n = labels.size(0), height = labels.size(1), width = labels.size(2);
    int64_t* out_count = count.cpu<int64_t>({n});
    const uint8_t* in = bits.cpu<uint8_t>({n, height, row_bytes(width)});
    check_pixel_count(height, width);
    py::gil_scoped_release unlocked;
    connected_components(out, out_count, in, n, height, width, num_threads);
  });
  m.def("remove_small_regions", [](py::handle out_, py::handle changed_, py::handle bits_, int64_t width,
                                   double area_threshold, bool holes, int num_threads) {
    const TensorView out = view(out_, "out"), changed = view(changed_, "changed"), bits = view(bits_, "bits");
    const uint8_t* in = bits.cpu<uint8_t>({-1, -1, row_bytes(width)});
    const int64_t n = bits.size(0), height = bits.size(1);
    uint8_t* cleaned = out.cpu<uint8_t>({n, height, row_bytes(width)});
    bool* flags = changed.cpu<bool>({n});
    check_pixel_count(height, width);
    py::gil_scoped_release unlocked;
    remove_small_regions(cleaned, flags, in, n, height, width, area_threshold, holes, num_threads);
  });
}

}  // namespace
}  // namespace sam_fast

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace sam_fast;
  m.doc() = "Native operations of sam_fast. Use sam_fast.ops.";
  m.attr("built_with_cuda") = bool(SAM_FAST_WITH_CUDA);
  m.def("cpu_level", [] { return std::string(cpu_level_name(cpu_level())); });
  bind_packed_masks(m);
  bind_postprocess_masks(m);
  bind_rle(m);
  bind_nms(m);
  bind_connected_components(m);
  bind_model(m);
#if SAM_FAST_WITH_CUDA
  bind_cuda(m);
#endif
}
