#include "rel_pos_attention.h"
#include "rel_pos_attention_kernel.h"

namespace sam_fast {
const RelPosKernels<float> kRelPosBase = {pack_tables, pack_keys, attend};
const RelPosKernels<uint16_t> kRelPosBf16Base = {pack_tables, pack_keys, attend};
}  // namespace sam_fast
