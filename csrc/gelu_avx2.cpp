#include "gelu.h"
#include "gelu_kernel.h"
#include "vector_math.h"

namespace sam_fast {
const GeluKernel kGeluAvx2 = activate;
}
