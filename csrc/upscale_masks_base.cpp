#include "upscale_masks.h"
#include "upscale_masks_kernel.h"

namespace sam_fast {
const UpscaleKernel<float> kUpscaleBase = upscale;
const UpscaleKernel<uint16_t> kUpscaleBf16Base = upscale;
}  // namespace sam_fast
