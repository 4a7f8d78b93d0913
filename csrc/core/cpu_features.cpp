// CPU and OS feature detection.
//
// CPUID says what the silicon has; XCR0 says which registers the operating system saves on a context switch. An
// extension counts only when both agree: AVX-512 on an OS that does not save ZMM registers would corrupt results.
#include "core/cpu_features.h"

#include <cstdint>
#include <cstring>

#include "kdq/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace kdq {
namespace {

#if defined(__x86_64__)

bool bit(uint32_t word, int index) { return ((word >> index) & 1U) != 0; }

uint64_t read_xcr0() {
  uint32_t low = 0;
  uint32_t high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

CpuFeatures detect() {
  CpuFeatures features;
  uint32_t eax = 0;
  uint32_t ebx = 0;
  uint32_t ecx = 0;
  uint32_t edx = 0;
  if (__get_cpuid(1, &eax, &ebx, &ecx, &edx) == 0) return features;
  const bool osxsave = bit(ecx, 27);
  if (!osxsave) return features;
  const uint64_t xcr0 = read_xcr0();
  const bool os_saves_ymm = (xcr0 & 0x6U) == 0x6U;    // XMM and YMM state
  const bool os_saves_zmm = (xcr0 & 0xE6U) == 0xE6U;  // + opmask, upper ZMM halves, ZMM16-31
  features.fma = os_saves_ymm && bit(ecx, 12);
  features.f16c = os_saves_ymm && bit(ecx, 29);
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return features;
  features.avx2 = os_saves_ymm && bit(ebx, 5);
  features.avx512f = os_saves_zmm && bit(ebx, 16);
  features.avx512dq = os_saves_zmm && bit(ebx, 17);
  features.avx512bw = os_saves_zmm && bit(ebx, 30);
  features.avx512vl = os_saves_zmm && bit(ebx, 31);
  features.avx512vnni = os_saves_zmm && bit(ecx, 11);
  features.avx512vpopcntdq = os_saves_zmm && bit(ecx, 14);
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) == 0) return features;
  features.avxvnni = os_saves_ymm && bit(eax, 4);
  features.avx512bf16 = os_saves_zmm && bit(eax, 5);
  return features;
}

#else

CpuFeatures detect() { return {}; }

#endif

}  // namespace

const CpuFeatures& cpu_features() {
  static const CpuFeatures features = detect();
  return features;
}

std::string cpu_features_string() {
  const CpuFeatures& f = cpu_features();
  const struct {
    bool present;
    const char* name;
  } all[] = {
      {f.avx2, "avx2"},
      {f.fma, "fma"},
      {f.f16c, "f16c"},
      {f.avxvnni, "avx_vnni"},
      {f.avx512f, "avx512f"},
      {f.avx512bw, "avx512bw"},
      {f.avx512vl, "avx512vl"},
      {f.avx512dq, "avx512dq"},
      {f.avx512vnni, "avx512_vnni"},
      {f.avx512vpopcntdq, "avx512_vpopcntdq"},
      {f.avx512bf16, "avx512_bf16"},
  };
  std::string text;
  for (const auto& feature : all) {
    if (!feature.present) continue;
    if (!text.empty()) text += ' ';
    text += feature.name;
  }
  return text;
}

std::string cpu_name() {
#if defined(__x86_64__)
  uint32_t words[12] = {};
  if (__get_cpuid_max(0x80000000U, nullptr) < 0x80000004U) return "unknown";
  for (uint32_t leaf = 0; leaf < 3; ++leaf) {
    uint32_t* out = words + 4 * leaf;
    __get_cpuid(0x80000002U + leaf, &out[0], &out[1], &out[2], &out[3]);
  }
  char name[sizeof(words) + 1] = {};
  std::memcpy(name, words, sizeof(words));
  std::string text = name;
  const size_t first = text.find_first_not_of(' ');
  const size_t last = text.find_last_not_of(' ');
  return first == std::string::npos ? "unknown" : text.substr(first, last - first + 1);
#else
  return "unknown";
#endif
}

}  // namespace kdq
