// The Python face of the native operations, and the only file that knows pybind11. Arguments were validated by the
// Python operation (sam_fast/ops); what is checked here again is what memory safety rests on.
#include <pybind11/pybind11.h>

#include "cpu_features.h"
#include "tensor.h"

namespace py = pybind11;

namespace sam_fast {
namespace {

TensorView view(const py::handle& object, const char* name) { return TensorView(object.ptr(), name); }

}  // namespace
}  // namespace sam_fast

PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  using namespace sam_fast;
  m.doc() = "Native operations of sam_fast. Use sam_fast.ops.";
  m.attr("built_with_cuda") = bool(SAM_FAST_WITH_CUDA);
  m.def("cpu_level", [] { return std::string(cpu_level_name(cpu_level())); });
}
