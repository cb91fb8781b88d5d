#include "two_way_attention.h"
#include "two_way_attention_kernel.h"

namespace sam_fast {
const TwoWaySweep<float> kTwoWaySweepAvx2 = sweep;
const TwoWaySweep<uint16_t> kTwoWaySweepBf16Avx2 = sweep;
}  // namespace sam_fast
