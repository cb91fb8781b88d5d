#include "upscale_masks.h"
#include "upscale_masks_kernel.h"

namespace sam_fast {
const UpscaleKernel<float> kUpscaleAvx512 = upscale;
const UpscaleKernel<uint16_t> kUpscaleBf16Avx512 = upscale;
}  // namespace sam_fast
