#include "two_way_attention.h"
#include "two_way_attention_kernel.h"

namespace sam_fast {
const TwoWaySweep<uint16_t> kTwoWaySweepBf16Avx512Bf16 = sweep;
}
