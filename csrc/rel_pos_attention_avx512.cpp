#include "rel_pos_attention.h"
#include "rel_pos_attention_kernel.h"

namespace sam_fast {
const RelPosKernels<float> kRelPosAvx512 = {pack_tables, pack_keys, attend};
const RelPosKernels<uint16_t> kRelPosBf16Avx512 = {pack_tables, pack_keys, attend};
}  // namespace sam_fast
