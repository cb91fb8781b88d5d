#include "gelu.h"
#include "gelu_kernel.h"

namespace sam_fast {
const GeluKernel kGeluAvx512 = activate;
}
