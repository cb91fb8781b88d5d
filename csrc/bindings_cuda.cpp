// The Python face of the native operations on a GPU. A launcher gets the tensors' memory and a stream (an integer: the
// address that torch.cuda.Stream.cuda_stream is), and returns before the GPU is done.
#include "bindings.h"
#include "connected_components.h"
#include "device.h"
#include "nms.h"

namespace sam_fast {
namespace {

void* stream_of(std::uintptr_t stream) { return reinterpret_cast<void*>(stream); }

// Packed masks, whose rows kernels read word by word.
uint8_t* cuda_bits(const TensorView& bits, const std::vector<int64_t>& shape) {
  uint8_t* data = bits.cuda<uint8_t>(shape);
  if (reinterpret_cast<std::uintptr_t>(data) % 8 != 0) {
    throw std::invalid_argument("packed masks must start at a multiple of 8 bytes");
  }
  return data;
}

// Calls visit(pointer to the elements) for a tensor of one of the types that logits have.
template <typename Visit>
void with_logits(const TensorView& logits, Visit visit) {
  if (logits.holds<Half>()) {
    visit(logits.cuda<Half>({-1, -1, -1}));
  } else if (logits.holds<Bfloat16>()) {
    visit(logits.cuda<Bfloat16>({-1, -1, -1}));
  } else {
    visit(logits.cuda<float>({-1, -1, -1}));
  }
}

void bind_packed_masks(py::module_& m) {
  m.def("pack_masks_cuda", [](py::handle bits_, py::handle masks_, std::uintptr_t stream) {
    const TensorView bits = view(bits_, "bits"), masks = view(masks_, "masks");
    const DeviceGuard guard(TensorView::cuda_device({&masks, &bits}));
    const bool* in = masks.cuda<bool>({-1, -1});
    const int64_t rows = masks.size(0), width = masks.size(1);
    pack_masks_cuda(cuda_bits(bits, {rows, row_bytes(width)}), in, rows, width, stream_of(stream));
  });
  m.def("unpack_masks_cuda", [](py::handle masks_, py::handle bits_, std::uintptr_t stream) {
    const TensorView masks = view(masks_, "masks"), bits = view(bits_, "bits");
    const DeviceGuard guard(TensorView::cuda_device({&bits, &masks}));
    bool* out = masks.cuda<bool>({-1, -1});
    const int64_t rows = masks.size(0), width = masks.size(1);
    unpack_masks_cuda(out, cuda_bits(bits, {rows, row_bytes(width)}), rows, width, stream_of(stream));
  });
}

void bind_postprocess_masks(py::module_& m) {
  m.def("postprocess_masks_cuda", [](py::handle area_, py::handle stability_, py::handle boxes_, py::object bits_,
                                     py::handle workspace_, py::handle logits_, Size input_size, Size original_size,
                                     int32_t image_size, float mask_threshold, float inner_threshold,
                                     float outer_threshold, std::uintptr_t stream) {
    const TensorView area = view(area_, "area"), stability = view(stability_, "stability_score"),
                     boxes = view(boxes_, "boxes"), workspace = view(workspace_, "workspace"),
                     logits = view(logits_, "logits");
    const TensorView bits = bits_.is_none() ? area : view(bits_, "bits");
    const DeviceGuard guard(TensorView::cuda_device({&logits, &area, &stability, &boxes, &bits, &workspace}));
    with_logits(logits, [&](const auto* in) {
      const int64_t n = logits.size(0);
      const MaskGeometry geometry = mask_geometry(logits, input_size, original_size, image_size);
      uint8_t* out_bits = bits_.is_none() ? nullptr : cuda_bits(bits, {n, geometry.height, row_bytes(geometry.width)});
      postprocess_masks_cuda(area.cuda<int64_t>({n}), stability.cuda<float>({n}), boxes.cuda<int64_t>({n, 4}), out_bits,
                             workspace.cuda<int64_t>({n, kMaskWorkspace}), in, n, geometry,
                             MaskThresholds{mask_threshold, inner_threshold, outer_threshold}, stream_of(stream));
    });
  });
  m.def("resize_logits_cuda", [](py::handle output_, py::handle logits_, Size input_size, Size original_size,
                                 int32_t image_size, std::uintptr_t stream) {
    const TensorView output = view(output_, "output"), logits = view(logits_, "logits");
    const DeviceGuard guard(TensorView::cuda_device({&logits, &output}));
    with_logits(logits, [&](const auto* in) {
      const int64_t n = logits.size(0);
      const MaskGeometry geometry = mask_geometry(logits, input_size, original_size, image_size);
      resize_logits_cuda(output.cuda<float>({n, geometry.height, geometry.width}), in, n, geometry, stream_of(stream));
    });
  });
}

void bind_nms(py::module_& m) {
  m.def("nms_keys_cuda", [](py::handle keys_, py::handle scores_, std::uintptr_t stream) {
    const TensorView keys = view(keys_, "keys"), scores = view(scores_, "scores");
    const DeviceGuard guard(TensorView::cuda_device({&scores, &keys}));
    const int64_t n = scores.numel();
    if (n > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("nms takes at most 2**31 - 1 boxes");
    nms_keys_cuda(keys.cuda<int64_t>({n}), scores.cuda<float>({n}), n, stream_of(stream));
  });
  m.def("nms_workspace", &nms_workspace);
  m.def("nms_cuda", [](py::handle kept_, py::handle count_, py::handle workspace_, py::handle keys_, py::handle boxes_,
                       double iou_threshold, std::uintptr_t stream) {
    const TensorView kept = view(kept_, "kept"), count = view(count_, "count"),
                     workspace = view(workspace_, "workspace"), keys = view(keys_, "keys"),
                     boxes = view(boxes_, "boxes");
    const DeviceGuard guard(TensorView::cuda_device({&boxes, &kept, &count, &workspace, &keys}));
    const float* in = boxes.cuda<float>({-1, 4});
    const int64_t n = boxes.size(0);
    if (n > std::numeric_limits<int32_t>::max()) throw std::invalid_argument("nms takes at most 2**31 - 1 boxes");
    nms_cuda(kept.cuda<int64_t>({n}), count.cuda<int64_t>({1}), workspace.cuda<int64_t>({nms_workspace(n)}),
             keys.cuda<int64_t>({n}), in, n, iou_threshold, stream_of(stream));
  });
}

int64_t* offsets_of(const TensorView& offsets, int64_t n) {
  if (offsets.numel() != n + 1) throw std::invalid_argument("offsets must have one entry more than there are masks");
  return offsets.cuda<int64_t>({n + 1});
}

// Values of offsets are trusted: they are on the GPU, and the Python operation made or checked them.
void bind_rle(py::module_& m) {
  m.def("rle_offsets_cuda", [](py::handle offsets_, py::handle columns_, py::handle bits_, int64_t width,
                               int64_t canvas_height, int64_t canvas_width, int64_t x0, int64_t y0,
                               std::uintptr_t stream) {
    const TensorView offsets = view(offsets_, "offsets"), columns = view(columns_, "columns"),
                     bits = view(bits_, "bits");
    const DeviceGuard guard(TensorView::cuda_device({&bits, &offsets, &columns}));
    const uint8_t* in = cuda_bits(bits, {-1, -1, row_bytes(width)});
    const Placement place = checked_placement(bits, width, canvas_height, canvas_width, x0, y0);
    const int64_t n = bits.size(0);
    rle_offsets_cuda(offsets_of(offsets, n), columns.cuda<int64_t>({n, width + 1}), in, n, place, stream_of(stream));
  });
  m.def("rle_ends_cuda",
        [](py::handle ends_, py::handle offsets_, py::handle columns_, py::handle bits_, int64_t width,
           int64_t canvas_height, int64_t canvas_width, int64_t x0, int64_t y0, std::uintptr_t stream) {
          const TensorView ends = view(ends_, "ends"), offsets = view(offsets_, "offsets"),
                           columns = view(columns_, "columns"), bits = view(bits_, "bits");
          const DeviceGuard guard(TensorView::cuda_device({&bits, &ends, &offsets, &columns}));
          const uint8_t* in = cuda_bits(bits, {-1, -1, row_bytes(width)});
          const Placement place = checked_placement(bits, width, canvas_height, canvas_width, x0, y0);
          const int64_t n = bits.size(0);
          rle_ends_cuda(ends.cuda<int64_t>({-1}), offsets_of(offsets, n), columns.cuda<int64_t>({n, width + 1}), in, n,
                        place, stream_of(stream));
        });
  m.def("rle_counts_cuda", [](py::handle counts_, py::handle ends_, py::handle offsets_, std::uintptr_t stream) {
    const TensorView counts = view(counts_, "counts"), ends = view(ends_, "ends"), offsets = view(offsets_, "offsets");
    const DeviceGuard guard(TensorView::cuda_device({&ends, &counts, &offsets}));
    const int64_t* in = ends.cuda<int64_t>({-1});
    rle_counts_cuda(counts.cuda<int64_t>({ends.size(0)}), in, offsets.cuda<int64_t>({-1}), offsets.size(0) - 1,
                    stream_of(stream));
  });
  m.def("rle_strings_cuda", [](py::handle text_, py::handle string_offsets_, py::handle counts_, py::handle offsets_,
                               std::uintptr_t stream) {
    const TensorView text = view(text_, "text"), string_offsets = view(string_offsets_, "string_offsets"),
                     counts = view(counts_, "counts"), offsets = view(offsets_, "offsets");
    const DeviceGuard guard(TensorView::cuda_device({&counts, &text, &string_offsets, &offsets}));
    const int64_t* in = counts.cuda<int64_t>({-1});
    const int64_t n = offsets.numel() - 1;
    if (n < 0) throw std::invalid_argument("offsets must hold at least one entry");
    rle_strings_cuda(text.cuda<uint8_t>({-1}), text.size(0), offsets_of(string_offsets, n), in, offsets_of(offsets, n),
                     n, stream_of(stream));
  });
  m.def("rle_decode_cuda", [](py::handle bits_, py::handle sums_, py::handle offsets_, int64_t width,
                              std::uintptr_t stream) {
    const TensorView bits = view(bits_, "bits"), sums = view(sums_, "sums"), offsets = view(offsets_, "offsets");
    const DeviceGuard guard(TensorView::cuda_device({&sums, &bits, &offsets}));
    uint8_t* out = cuda_bits(bits, {-1, -1, row_bytes(width)});
    const int64_t n = bits.size(0);
    rle_decode_cuda(out, sums.cuda<int64_t>({-1}), offsets_of(offsets, n), n, bits.size(1), width, stream_of(stream));
  });
}

void bind_connected_components(py::module_& m) {
  m.def("connected_components_cuda", [](py::handle labels_, py::handle count_, py::handle blocks_, py::handle rows_,
                                        py::handle bits_, std::uintptr_t stream) {
    const TensorView labels = view(labels_, "labels"), count = view(count_, "count"), blocks = view(blocks_, "blocks"),
                     rows = view(rows_, "rows"), bits = view(bits_, "bits");
    const DeviceGuard guard(TensorView::cuda_device({&bits, &labels, &count, &blocks, &rows}));
    int32_t* out = labels.cuda<int32_t>({-1, -1, -1});
    const int64_t n = labels.size(0), height = labels.size(1), width = labels.size(2);
    const int64_t down = (height + 1) / 2, across = (width + 1) / 2;
    check_pixel_count(height, width);
    connected_components_cuda(out, count.cuda<int64_t>({n}), blocks.cuda<int32_t>({2, n, down * across}),
                              rows.cuda<int64_t>({n, down}), cuda_bits(bits, {n, height, row_bytes(width)}), n, height,
                              width, stream_of(stream));
  });
  m.attr("judgement_workspace") = kJudgement;
  m.def("remove_small_regions_cuda", [](py::handle out_, py::handle changed_, py::handle blocks_,
                                        py::handle judgements_, py::handle bits_, int64_t width, double area_threshold,
                                        bool holes, std::uintptr_t stream) {
    const TensorView out = view(out_, "out"), changed = view(changed_, "changed"), blocks = view(blocks_, "blocks"),
                     judgements = view(judgements_, "judgements"), bits = view(bits_, "bits");
    const DeviceGuard guard(TensorView::cuda_device({&bits, &out, &changed, &blocks, &judgements}));
    const uint8_t* in = cuda_bits(bits, {-1, -1, row_bytes(width)});
    const int64_t n = bits.size(0), height = bits.size(1);
    const int64_t down = (height + 1) / 2, across = (width + 1) / 2;
    check_pixel_count(height, width);
    remove_small_regions_cuda(cuda_bits(out, {n, height, row_bytes(width)}), changed.cuda<bool>({n}),
                              blocks.cuda<int32_t>({2, n, down * across}), judgements.cuda<int64_t>({n, kJudgement}),
                              in, n, height, width, area_threshold, holes, stream_of(stream));
  });
}

}  // namespace

void bind_cuda(py::module_& m) {
  m.def("cuda_unavailable_reason", &cuda_unavailable_reason);
  m.attr("mask_workspace") = kMaskWorkspace;
  bind_packed_masks(m);
  bind_postprocess_masks(m);
  bind_nms(m);
  bind_rle(m);
  bind_connected_components(m);
}

}  // namespace sam_fast
