#include "gelu.h"
#include "gelu_kernel.h"

namespace sam_fast {
const GeluKernel kGeluAvx2 = activate;
}
