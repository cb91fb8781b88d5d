// Which instruction set the variant kernels use, decided once per process.
#pragma once

namespace sam_fast {

enum class CpuLevel { kBase = 0, kAvx2 = 1, kAvx512 = 2 };

// The best level that this CPU runs, lowered by the environment variable SAM_FAST_CPU (base, avx2 or avx512) when it
// is set. Throws std::runtime_error when the variable names a level that is unknown or that this CPU lacks.
CpuLevel cpu_level();

const char* cpu_level_name(CpuLevel level);

}  // namespace sam_fast
