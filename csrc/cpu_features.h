// Which instruction set the variant kernels use, decided once per process.
#pragma once

namespace sam_fast {

enum class CpuLevel { kBase = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };

// The best level that this CPU runs, lowered by the environment variable SAM_FAST_CPU (base, avx2, avx512 or
// avx512bf16) when it is set. Throws std::runtime_error when the variable names a level that is unknown or that this
// CPU lacks.
CpuLevel cpu_level();

const char* cpu_level_name(CpuLevel level);

// Of a kernel's variants <name>Base, <name>Avx2 and <name>Avx512 the one for this CPU; other processors have the base.
// Kernels whose products are of bfloat16 have <name>Avx512Bf16, too.
#if defined(__x86_64__)
#define SAM_FAST_PICK(name)                                                \
  (::sam_fast::cpu_level() >= ::sam_fast::CpuLevel::kAvx512 ? name##Avx512 \
   : ::sam_fast::cpu_level() == ::sam_fast::CpuLevel::kAvx2 ? name##Avx2   \
                                                            : name##Base)
#define SAM_FAST_PICK_BF16(name) \
  (::sam_fast::cpu_level() == ::sam_fast::CpuLevel::kAvx512Bf16 ? name##Avx512Bf16 : SAM_FAST_PICK(name))
#else
#define SAM_FAST_PICK(name) name##Base
#define SAM_FAST_PICK_BF16(name) name##Base
#endif

}  // namespace sam_fast
