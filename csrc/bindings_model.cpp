// The Python face of the native operations inside the model, on a CPU.
#include "bindings.h"
#include "gelu.h"
#include "int8_rows.h"
#include "perceptron.h"
#include "rel_pos_attention.h"
#include "two_way_attention.h"
#include "upscale_masks.h"

namespace sam_fast {
namespace {

void check_lanes(int64_t channels, const char* name) {
  if (channels <= 0 || channels % 8) throw std::invalid_argument(std::string(name) + " must be a multiple of 8");
}

// What pixels take, of N prompts and C channels; see bind_two_way_attention.
TwoWayWrite two_way_write(int64_t N, int64_t P, int64_t C, int64_t tokens, const py::object& offered,
                          const py::object& bias, const py::object& norm_weight, const py::object& norm_bias, float eps,
                          const py::object& absorbed_keys, const py::object& constant, const py::object& queries_,
                          const py::object& keys) {
  TwoWayWrite write{};
  write.tokens = tokens;
  if (!queries_.is_none()) {
    const TensorView queries = view(queries_, "queries");
    write.queries = queries.cpu<float>({P, -1, 8});
    write.width = queries.size(1);
    write.keys = view(keys, "keys").cpu<float>({N, tokens, write.width, 8});
  } else {
    write.absorbed = view(absorbed_keys, "absorbed_keys").cpu<float>({N, C, 8 * tokens});
    write.constant = view(constant, "constant").cpu<float>({N, 8 * tokens});
  }
  write.offered = view(offered, "offered").cpu<float>({N, 8 * tokens, C});
  write.bias = view(bias, "bias").cpu<float>({C});
  write.norm_weight = view(norm_weight, "norm_weight").cpu<float>({C});
  write.norm_bias = view(norm_bias, "norm_bias").cpu<float>({C});
  write.eps = eps;
  return write;
}

// Number is float or Bfloat16, and T what the operation takes of it: the same, or its bits.
template <typename Number, typename T>
void two_way_attention_of(const TensorView& image, const py::object& written, const py::object& read,
                          const py::object& pe, int64_t prompts, int64_t readers, const TwoWayWrite* write,
                          const py::object& absorbed_queries, int num_threads) {
  const int64_t P = image.size(1), C = image.size(2);
  TwoWayArguments<T> a{};
  a.shape = {prompts, P, C};
  a.image = reinterpret_cast<const T*>(image.cpu<Number>({-1, P, C}));
  a.shared = image.size(0) == 1;
  a.pe = view(pe, "pe").cpu<float>({P, C});
  a.write = write;
  if (write != nullptr) a.written = reinterpret_cast<T*>(view(written, "written").cpu<Number>({prompts, P, C}));
  if (readers > 0) {
    a.readers = readers;
    a.absorbed = view(absorbed_queries, "absorbed_queries").cpu<float>({prompts, C, 8 * readers});
    a.read = view(read, "read").cpu<float>({prompts, 8 * readers, C});
  }
  py::gil_scoped_release unlocked;
  two_way_attention(a, num_threads);
}

void bind_two_way_attention(py::module_& m) {
  // Without tokens there is no write, and without readers no read: what belongs to them is None then. Otherwise queries
  // and keys are None, or absorbed_keys and constant.
  m.def("two_way_attention",
        [](py::object written, py::object read, py::handle image_, py::object pe, int64_t prompts, int64_t tokens,
           int64_t readers, py::object offered, py::object bias, py::object norm_weight, py::object norm_bias,
           float eps, py::object absorbed_keys, py::object constant, py::object queries, py::object keys,
           py::object absorbed_queries, int num_threads) {
          const TensorView image = view(image_, "image");
          if (image.ndim() != 3) throw std::invalid_argument("image must have three dimensions");
          const int64_t P = image.size(1), C = image.size(2);
          check_lanes(C, "channels");
          if (prompts < 0 || tokens < 0 || readers < 0) throw std::invalid_argument("sizes must not be negative");
          if (image.size(0) != 1 && image.size(0) != prompts) {
            throw std::invalid_argument("image must be one, or one each");
          }
          TwoWayWrite write{};
          if (tokens > 0) {
            write = two_way_write(prompts, P, C, tokens, offered, bias, norm_weight, norm_bias, eps, absorbed_keys,
                                  constant, queries, keys);
          }
          const auto run =
              image.holds<Bfloat16>() ? two_way_attention_of<Bfloat16, uint16_t> : two_way_attention_of<float, float>;
          run(image, written, read, pe, prompts, readers, tokens > 0 ? &write : nullptr, absorbed_queries, num_threads);
        });
}

// Number and T as above.
template <typename Number, typename T>
void rel_pos_attention_of(const TensorView& output, const TensorView& qkv, const py::object& qkv_bias,
                          const py::object& rel_h, const py::object& rel_w, int64_t rows, int64_t columns, float scale,
                          int num_threads) {
  RelPosArguments<T> arguments{};
  RelPosShape& a = arguments.shape;
  arguments.qkv = reinterpret_cast<const T*>(qkv.cpu<Number>({-1, -1, -1, 3, -1, -1}));
  a.images = qkv.size(0), a.height = qkv.size(1), a.width = qkv.size(2);
  a.heads = qkv.size(4), a.head_width = qkv.size(5);
  check_lanes(a.head_width, "the width of a head");
  if (a.head_width > kMostHeadWidth) throw std::invalid_argument("a head is too wide");
  if (rows < 1 || columns < 1) throw std::invalid_argument("a window must have tokens");
  a.rows = rows, a.columns = columns;
  const auto data = [](const py::object& object, const char* name, const std::vector<int64_t>& shape) {
    return reinterpret_cast<const T*>(view(object, name).template cpu<Number>(shape));
  };
  if (!qkv_bias.is_none()) arguments.qkv_bias = data(qkv_bias, "qkv_bias", {3 * a.heads * a.head_width});
  if (!rel_h.is_none()) {
    arguments.rel_h = data(rel_h, "rel_h", {2 * rows - 1, a.head_width});
    arguments.rel_w = data(rel_w, "rel_w", {2 * columns - 1, a.head_width});
  }
  arguments.scale = scale;
  arguments.output = reinterpret_cast<T*>(output.cpu<Number>({a.images, a.height, a.width, a.heads * a.head_width}));
  py::gil_scoped_release unlocked;
  rel_pos_attention(arguments, num_threads);
}

void bind_rel_pos_attention(py::module_& m) {
  m.def("rel_pos_attention", [](py::handle output_, py::handle qkv_, py::object qkv_bias, py::object rel_h,
                                py::object rel_w, int64_t rows, int64_t columns, float scale, int num_threads) {
    const TensorView output = view(output_, "output"), qkv = view(qkv_, "qkv");
    const auto run =
        qkv.holds<Bfloat16>() ? rel_pos_attention_of<Bfloat16, uint16_t> : rel_pos_attention_of<float, float>;
    run(output, qkv, qkv_bias, rel_h, rel_w, rows, columns, scale, num_threads);
  });
}

// Number and T as above; null without an object.
template <typename Number, typename T>
T* optional(const py::object& object, const char* name, const std::vector<int64_t>& shape) {
  return object.is_none() ? nullptr : reinterpret_cast<T*>(view(object, name).template cpu<Number>(shape));
}

template <typename Number, typename T>
void quantise_rows_of(const TensorView& x, const TensorView& integers, py::handle scales, const py::object& factors,
                      const py::object& bias, bool gelu, int32_t most, int num_threads) {
  QuantiseArguments<T> a{};
  a.x = reinterpret_cast<const T*>(x.cpu<Number>({-1, -1}));
  a.rows = x.size(0), a.width = x.size(1);
  check_lanes(a.width, "the width of a row");
  if (most < 1 || most > 127) throw std::invalid_argument("most must be from 1 to 127");
  a.factors = optional<float, float>(factors, "factors", {a.rows});
  a.bias = optional<float, float>(bias, "bias", {a.width});
  a.gelu = gelu, a.most = most;
  a.integers = integers.cpu<uint8_t>({a.rows, a.width});
  a.scales = view(scales, "scales").cpu<float>({a.rows});
  py::gil_scoped_release unlocked;
  quantise_rows(a, num_threads);
}

template <typename Number, typename T>
void scale_rows_of(const TensorView& out, const TensorView& x, py::handle factors, const py::object& bias, bool add,
                   int num_threads) {
  ScaleArguments<T> a{};
  a.x = x.cpu<float>({-1, -1});
  a.rows = x.size(0), a.width = x.size(1);
  check_lanes(a.width, "the width of a row");
  a.factors = view(factors, "factors").cpu<float>({a.rows});
  a.bias = optional<float, float>(bias, "bias", {a.width});
  a.add = add;
  a.out = reinterpret_cast<T*>(out.cpu<Number>({a.rows, a.width}));
  py::gil_scoped_release unlocked;
  scale_rows(a, num_threads);
}

void bind_int8_rows(py::module_& m) {
  m.def("quantise_rows", [](py::handle integers_, py::handle scales, py::handle x_, py::object factors, py::object bias,
                            bool gelu, int32_t most, int num_threads) {
    const TensorView x = view(x_, "x"), integers = view(integers_, "integers");
    const auto run = x.holds<Bfloat16>() ? quantise_rows_of<Bfloat16, uint16_t> : quantise_rows_of<float, float>;
    run(x, integers, scales, factors, bias, gelu, most, num_threads);
  });
  m.def("scale_rows",
        [](py::handle out_, py::handle x_, py::handle factors, py::object bias, bool add, int num_threads) {
          const TensorView out = view(out_, "out"), x = view(x_, "x");
          const auto run = out.holds<Bfloat16>() ? scale_rows_of<Bfloat16, uint16_t> : scale_rows_of<float, float>;
          run(out, x, factors, bias, add, num_threads);
        });
}

void bind_gelu(py::module_& m) {
  m.def("gelu", [](py::handle x_, int num_threads) {
    const TensorView x = view(x_, "x");
    float* values = x.cpu<float>({-1});
    const int64_t n = x.size(0);
    py::gil_scoped_release unlocked;
    gelu(values, n, num_threads);
  });
}

void bind_perceptron(py::module_& m) {
  m.def("perceptron", [](py::handle output_, py::handle x_, const std::vector<py::object>& weights,
                         const std::vector<py::object>& biases, py::object residual_, py::object norm_weight_,
                         py::object norm_bias_, float eps, int num_threads) {
    if (weights.empty() || weights.size() != biases.size()) throw std::invalid_argument("layers have weight and bias");
    const TensorView x = view(x_, "x");
    PerceptronArguments a{};
    a.x = x.cpu<float>({-1, -1});
    a.rows = x.size(0);
    int64_t width = x.size(1);
    std::vector<PerceptronLayer> layers;
    for (size_t i = 0; i < weights.size(); ++i) {
      check_lanes(width, "the width of a layer's input");
      const TensorView weight = view(weights[i], "weight");
      const float* data = weight.cpu<float>({-1, width});
      layers.push_back({width, weight.size(0), data, view(biases[i], "bias").cpu<float>({weight.size(0)})});
      width = weight.size(0);
    }
    a.layers = layers.data(), a.count = static_cast<int64_t>(layers.size());
    if (!residual_.is_none()) a.residual = view(residual_, "residual").cpu<float>({a.rows, width});
    if (!norm_weight_.is_none()) {
      check_lanes(width, "the width of a LayerNorm");
      a.norm_weight = view(norm_weight_, "norm_weight").cpu<float>({width});
      a.norm_bias = view(norm_bias_, "norm_bias").cpu<float>({width});
    }
    a.eps = eps;
    a.output = view(output_, "output").cpu<float>({a.rows, width});
    py::gil_scoped_release unlocked;
    perceptron(a, num_threads);
  });
}

// Number and T as of two_way_attention_of.
template <typename Number, typename T>
void upscale_masks_of(const TensorView& image, py::handle logits, py::handle first_weight, py::handle first_bias,
                      py::handle norm_weight, py::handle norm_bias, float eps, py::handle second_weight,
                      py::handle second_bias, const TensorView& classifiers, int num_threads) {
  UpscaleArguments<T> arguments{};
  UpscaleShape& a = arguments.shape;
  arguments.image = reinterpret_cast<const T*>(image.cpu<Number>({-1, -1, -1, -1}));
  a.images = image.size(0), a.height = image.size(1), a.width = image.size(2), a.channels = image.size(3);
  if (a.channels <= 0 || a.channels % (32 / static_cast<int64_t>(sizeof(T)))) {
    throw std::invalid_argument("channels must be a multiple of 8, in bfloat16 of 16");
  }
  arguments.classifiers = classifiers.cpu<float>({a.images, -1, -1});
  a.masks = classifiers.size(1), a.second_channels = classifiers.size(2);
  const TensorView bias = view(first_bias, "first_bias");
  arguments.first_bias = bias.cpu<float>({-1});
  a.first_channels = bias.size(0);
  if (sizeof(T) == 2 && a.first_channels % 2) throw std::invalid_argument("in bfloat16 channels must be even");
  const auto narrow = [](py::handle object, const char* name, const std::vector<int64_t>& shape) {
    return reinterpret_cast<const T*>(view(object, name).template cpu<Number>(shape));
  };
  arguments.first_weight = narrow(first_weight, "first_weight", {4 * a.first_channels, a.channels});
  arguments.norm_weight = view(norm_weight, "norm_weight").cpu<float>({a.first_channels});
  arguments.norm_bias = view(norm_bias, "norm_bias").cpu<float>({a.first_channels});
  arguments.eps = eps;
  arguments.second_weight = narrow(second_weight, "second_weight", {4 * a.second_channels, a.first_channels});
  arguments.second_bias = view(second_bias, "second_bias").cpu<float>({a.second_channels});
  arguments.logits = view(logits, "logits").cpu<float>({a.images, a.masks, 4 * a.height, 4 * a.width});
  py::gil_scoped_release unlocked;
  upscale_masks(arguments, num_threads);
}

void bind_upscale_masks(py::module_& m) {
  m.def("upscale_masks", [](py::handle logits, py::handle image_, py::handle first_weight, py::handle first_bias,
                            py::handle norm_weight, py::handle norm_bias, float eps, py::handle second_weight,
                            py::handle second_bias, py::handle classifiers_, int num_threads) {
    const TensorView image = view(image_, "image"), classifiers = view(classifiers_, "classifiers");
    const auto run = image.holds<Bfloat16>() ? upscale_masks_of<Bfloat16, uint16_t> : upscale_masks_of<float, float>;
    run(image, logits, first_weight, first_bias, norm_weight, norm_bias, eps, second_weight, second_bias, classifiers,
        num_threads);
  });
}

}  // namespace

void bind_model(py::module_& m) {
  bind_two_way_attention(m);
  bind_upscale_masks(m);
  bind_gelu(m);
  bind_int8_rows(m);
  bind_perceptron(m);
  bind_rel_pos_attention(m);
}

}  // namespace sam_fast
