#include "two_way_attention.h"
#include "two_way_attention_kernel.h"

namespace sam_fast {
const TwoWaySweep<float> kTwoWaySweepBase = sweep;
const TwoWaySweep<uint16_t> kTwoWaySweepBf16Base = sweep;
}  // namespace sam_fast
