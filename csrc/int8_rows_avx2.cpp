#include "int8_rows.h"
#include "int8_rows_kernel.h"

namespace sam_fast {
const Int8RowsKernels kInt8RowsAvx2 = {quantise, quantise, scale, scale};
}
