#include "cpu_features.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace sam_fast {
namespace {

CpuLevel detected_level() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
                    __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) return CpuLevel::kAvx512Bf16;
  if (avx512) return CpuLevel::kAvx512;
  if (avx2) return CpuLevel::kAvx2;
#endif
  return CpuLevel::kBase;
}

CpuLevel requested_level() {
  const CpuLevel best = detected_level();
  const char* wish = std::getenv("SAM_FAST_CPU");
  if (wish == nullptr || *wish == '\0') return best;
  for (CpuLevel level : {CpuLevel::kBase, CpuLevel::kAvx2, CpuLevel::kAvx512, CpuLevel::kAvx512Bf16}) {
    if (std::string(wish) != cpu_level_name(level)) continue;
    if (level <= best) return level;
    throw std::runtime_error(std::string("SAM_FAST_CPU=") + wish + ", but this CPU supports only " +
                             cpu_level_name(best));
  }
  throw std::runtime_error(std::string("SAM_FAST_CPU must be base, avx2, avx512 or avx512bf16, got ") + wish);
}

}  // namespace

CpuLevel cpu_level() {
  static const CpuLevel level = requested_level();
  return level;
}

const char* cpu_level_name(CpuLevel level) {
  switch (level) {
    case CpuLevel::kAvx512Bf16:
      return "avx512bf16";
    case CpuLevel::kAvx512:
      return "avx512";
    case CpuLevel::kAvx2:
      return "avx2";
    default:
      return "base";
  }
}

}  // namespace sam_fast
