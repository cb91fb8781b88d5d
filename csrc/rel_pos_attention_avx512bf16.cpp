#include "rel_pos_attention.h"
#include "rel_pos_attention_kernel.h"

namespace sam_fast {
const RelPosKernels<uint16_t> kRelPosBf16Avx512Bf16 = {pack_tables, pack_keys, attend};
}
