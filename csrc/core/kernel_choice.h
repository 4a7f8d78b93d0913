// How a kernel family picks the table of function pointers to run: the highest level at or below the ISA in force
// whose extra CPU features are there. Each family keeps one array of these, lowest first, in core/<family>.cpp.
#pragma once

#include "kdq/isa.h"

namespace kdq {

// Extensions that a table may need beyond its level.
enum class CpuExtra : int { kNone = 0, kVpopcntdq = 1, kAvxVnni = 2, kBf16 = 3 };

bool cpu_has(CpuExtra extra);

template <class Table>
struct KernelChoice {
  Isa isa;
  CpuExtra extra;
  const Table* table;
};

template <class Table, int kCount>
Status choose_kernels(const KernelChoice<Table> (&choices)[kCount], const Table** table) {
  Isa isa = Isa::kReference;
  Status status = current_isa(&isa);
  if (!status.ok()) return status;
  for (const KernelChoice<Table>& choice : choices) {
    if (choice.isa <= isa && cpu_has(choice.extra)) *table = choice.table;
  }
  return status;
}

}  // namespace kdq
