#include "upscale_masks.h"
#include "upscale_masks_kernel.h"

namespace sam_fast {
const UpscaleKernel<uint16_t> kUpscaleBf16Avx512Bf16 = upscale;
}
