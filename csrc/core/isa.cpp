// The instruction set in force: three gates (built, CPU and OS have it, enabled), one process-wide choice.
#include "kdq/isa.h"

#include <atomic>
#include <cstdlib>

#include "core/cpu_features.h"
#include "core/kernel_choice.h"

namespace kdq {
namespace {

constexpr int kUnset = -1;

// The level forced by set_isa() or chosen at first use; kUnset before that.
std::atomic<int> g_isa{kUnset};

constexpr Isa kAllIsas[] = {Isa::kReference, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Vnni};

bool is_built(Isa isa) {
#if defined(KDQ_HAVE_X86)
  (void)isa;
  return true;
#else
  return isa == Isa::kReference;
#endif
}

bool cpu_runs(Isa isa) {
  const CpuFeatures& f = cpu_features();
  const bool avx2 = f.avx2 && f.fma && f.f16c;
  const bool avx512 = avx2 && f.avx512f && f.avx512bw && f.avx512vl && f.avx512dq;
  switch (isa) {
    case Isa::kReference:
      return true;
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Vnni:
      return avx512 && f.avx512vnni;
  }
  return false;
}

std::string join_names(const std::vector<Isa>& isas) {
  std::string text;
  for (Isa isa : isas) {
    if (!text.empty()) text += ", ";
    text += isa_name(isa);
  }
  return text;
}

// source: what named the level, for the message ("set_isa" or "KDQ_ISA").
Status resolve(const std::string& name, const char* source, Isa* isa) {
  if (name == "auto") {
    *isa = available_isas().back();
    return {};
  }
  for (Isa candidate : kAllIsas) {
    if (name != isa_name(candidate)) continue;
    if (!is_built(candidate)) {
      return Status::unsupported(std::string(source) + ": '" + name + "' is not built into this library; it has " +
                                 join_names(available_isas()));
    }
    if (!cpu_runs(candidate)) {
      return Status::unsupported(std::string(source) + ": this CPU (" + cpu_name() +
                                 ") or its operating system cannot run '" + name + "'; it can run " +
                                 join_names(available_isas()));
    }
    *isa = candidate;
    return {};
  }
  return Status::invalid(std::string(source) + ": unknown instruction set '" + name +
                         "'; expected auto, reference, avx2, avx512 or avx512vnni");
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kReference:
      return "reference";
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Vnni:
      return "avx512vnni";
  }
  return "unknown";
}

std::vector<Isa> available_isas() {
  std::vector<Isa> isas;
  for (Isa isa : kAllIsas) {
    if (is_built(isa) && cpu_runs(isa)) isas.push_back(isa);
  }
  return isas;
}

Status current_isa(Isa* isa) {
  const int chosen = g_isa.load(std::memory_order_relaxed);
  if (chosen != kUnset) {
    *isa = static_cast<Isa>(chosen);
    return {};
  }
  const char* requested = std::getenv("KDQ_ISA");
  Status status = resolve(requested == nullptr ? "auto" : requested, "KDQ_ISA", isa);
  if (!status.ok()) return status;
  int expected = kUnset;  // a set_isa() from another thread wins
  if (!g_isa.compare_exchange_strong(expected, static_cast<int>(*isa))) *isa = static_cast<Isa>(expected);
  return status;
}

Status set_isa(const std::string& name) {
  Isa isa = Isa::kReference;
  Status status = resolve(name, "set_isa", &isa);
  if (status.ok()) g_isa.store(static_cast<int>(isa), std::memory_order_relaxed);
  return status;
}

bool cpu_has(CpuExtra extra) {
  switch (extra) {
    case CpuExtra::kNone:
      return true;
    case CpuExtra::kVpopcntdq:
      return cpu_features().avx512vpopcntdq;
    case CpuExtra::kAvxVnni:
      return cpu_features().avxvnni;
    case CpuExtra::kBf16:
      return cpu_features().avx512bf16;
  }
  return false;
}

}  // namespace kdq
