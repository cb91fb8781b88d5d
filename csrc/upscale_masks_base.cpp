#include "upscale_masks.h"
#include "upscale_masks_kernel.h"

namespace sam_fast {
const UpscaleKernel kUpscaleBase = upscale;
}
