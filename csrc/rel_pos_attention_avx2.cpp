#include "rel_pos_attention.h"
#include "rel_pos_attention_kernel.h"

namespace sam_fast {
const RelPosKernels kRelPosAvx2 = {pack_tables, pack_keys, attend};
}
