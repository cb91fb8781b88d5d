#include "rel_pos_attention.h"
#include "rel_pos_attention_kernel.h"

namespace sam_fast {
const RelPosKernels kRelPosAvx512 = {pack_tables, pack_keys, attend};
}
