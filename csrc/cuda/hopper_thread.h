// What hopper_product.h sees of a Hopper GPU beside thread.h: barriers in shared memory, the engine that copies tiles
// there, and the asynchronous products of a warpgroup, on shared memory. The tests have another one
// (tests/cuda/hopper_emulator.h).
#pragma once

#include "cuda/thread.h"

namespace kdq::cuda {

constexpr int kWarpgroup = 4 * kWarp;

// Counts arrivals and bytes; each time that all of both have come, a phase is over.
struct Barrier {
  uint64_t state;
};

// A CUtensorMap: rows of bytes in global memory, and the box of them that one copy takes.
struct alignas(128) TensorMap {
  uint64_t opaque[16];
};

// ---- how tiles lie in shared memory ---------------------------------------------------------------------------------
// A tile has rows of 128 bytes, one behind the other, from a multiple of 1024 on. The 8 pieces of 16 bytes of a row are
// permuted by the row's number, which is what the copy engine and the tensor cores call the 128-byte swizzle: rows that
// follow each other have the same piece in different banks.

constexpr int kTileRowBytes = 128;

KDQ_HOST_DEVICE int swizzled(int row, int byte) {
  return row * kTileRowBytes + ((byte / 16) ^ (row % 8)) * 16 + byte % 16;
}

// What wgmma takes for an operand whose rows run along k. address: of its first row and byte, in shared memory; a
// multiple of 1024, plus the bytes (16, 32, ...) into the row. Bits: 0 to 13 the address; 16 to 29 the distance along
// k, which this swizzle fixes; 32 to 45 that between groups of 8 rows; 49 to 51 the row that the swizzle starts with,
// 0; 62 and 63 the swizzle. All in units of 16 bytes.
KDQ_HOST_DEVICE uint64_t wgmma_operand(uint32_t address) {
  constexpr uint64_t kAlongK = 1;
  constexpr uint64_t kEightRows = 8 * kTileRowBytes / 16;
  constexpr uint64_t kSwizzle128 = 1;
  return (address & 0x3FFFFU) >> 4 | kAlongK << 16 | kEightRows << 32 | kSwizzle128 << 62;
}

// ---- products -------------------------------------------------------------------------------------------------------

constexpr int kWgmmaRows = 64;
constexpr int kWgmmaCols = 256;
constexpr int kWgmmaBytes = 32;                                   // of k: 32 int8, or 256 bits
constexpr int kWgmmaSums = kWgmmaRows * kWgmmaCols / kWarpgroup;  // of a thread

// Where sum i of a thread of a warpgroup belongs.
KDQ_HOST_DEVICE int wgmma_row(int thread, int i) { return thread / kWarp * 16 + thread % kWarp / 4 + i / 2 % 2 * 8; }
KDQ_HOST_DEVICE int wgmma_col(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

#if defined(__CUDACC__)

#define KDQ_SUMS_16(d, i)                                                                                           \
  "+r"(d[(i)]), "+r"(d[(i) + 1]), "+r"(d[(i) + 2]), "+r"(d[(i) + 3]), "+r"(d[(i) + 4]), "+r"(d[(i) + 5]),           \
      "+r"(d[(i) + 6]), "+r"(d[(i) + 7]), "+r"(d[(i) + 8]), "+r"(d[(i) + 9]), "+r"(d[(i) + 10]), "+r"(d[(i) + 11]), \
      "+r"(d[(i) + 12]), "+r"(d[(i) + 13]), "+r"(d[(i) + 14]), "+r"(d[(i) + 15])

#define KDQ_SUMS(d)                                                                                  \
  KDQ_SUMS_16(d, 0), KDQ_SUMS_16(d, 16), KDQ_SUMS_16(d, 32), KDQ_SUMS_16(d, 48), KDQ_SUMS_16(d, 64), \
      KDQ_SUMS_16(d, 80), KDQ_SUMS_16(d, 96), KDQ_SUMS_16(d, 112)

// instruction {sums}, a, b, whether the sums so far count
#define KDQ_WGMMA(instruction, d, a, b, accumulate)                                                                  \
  asm volatile(                                                                                                      \
      "{\n"                                                                                                          \
      ".reg .pred p;\n"                                                                                              \
      "setp.ne.b32 p, %130, 0;\n" instruction                                                                        \
      " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
      "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
      "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82," \
      "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
      "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127}, "       \
      "%128, %129, p;\n"                                                                                             \
      "}"                                                                                                            \
      : KDQ_SUMS(d)                                                                                                  \
      : "l"(a), "l"(b), "r"(static_cast<int32_t>(accumulate)))

struct HopperThread : GpuThread {
  // Of the launch.
  KDQ_DEVICE int64_t blocks() const { return gridDim.x; }

  // Of something in shared memory.
  KDQ_DEVICE uint32_t shared_address(const void* p) const { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

  // All lanes of the warp arrive before any goes on.
  KDQ_DEVICE void sync_warp() const { __syncwarp(); }

  // The same for kThreads of the block, whole warps, that use this number; 0 is sync()'s.
  template <int kNumber, int kThreads>
  KDQ_DEVICE void sync_some() const {
    asm volatile("bar.sync %0, %1;" ::"n"(kNumber), "n"(kThreads) : "memory");
  }

  // Registers of each thread of this warpgroup, whose threads all call it.
  template <int kRegisters>
  KDQ_DEVICE void fewer_registers() const {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
  template <int kRegisters>
  KDQ_DEVICE void more_registers() const {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }

  // ---- barriers -----------------------------------------------------------------------------------------------------

  // arrivals: that end a phase. All barriers of the block are set up by one thread, which then calls
  // publish_barriers(), and all threads sync().
  KDQ_DEVICE void init(Barrier* barrier, uint32_t arrivals) const {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
  }
  KDQ_DEVICE void publish_barriers() const {
    asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
  }
  KDQ_DEVICE void arrive(Barrier* barrier) const {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
  }
  // Arrives, and has the phase wait for so many bytes too.
  KDQ_DEVICE void arrive_expecting(Barrier* barrier, uint32_t bytes) const {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
  }
  // Until the phase of that parity is over: 0 for the first, 1 for the next, ... A parity of 1 does not wait before the
  // first is over.
  KDQ_DEVICE void wait(Barrier* barrier, uint32_t parity) const {
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "again:\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
        "@!done bra again;\n"
        "}" ::"r"(shared_address(barrier)),
        "r"(parity)
        : "memory");
  }

  // ---- copies -------------------------------------------------------------------------------------------------------

  // The map's box from (row, byte) on, to a tile at `to`. What lies outside of the rows is 0. The barrier gets the
  // bytes of the whole box.
  KDQ_DEVICE void copy_tile(void* to, const TensorMap* map, int32_t byte, int32_t row, Barrier* barrier) const {
    asm volatile(
        "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
        "[%4];" ::"r"(shared_address(to)),
        "l"(map), "r"(byte), "r"(row), "r"(shared_address(barrier))
        : "memory");
  }

  // ---- products, by all threads of a warpgroup
  // ------------------------------------------------------------------------

  // Before the first product, and after other accesses to its sums.
  KDQ_DEVICE void wgmma_fence() const { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
  // Makes the products since the last call a group.
  KDQ_DEVICE void wgmma_commit() const { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
  // Until all groups but the last one are done: then their operands may be overwritten.
  KDQ_DEVICE void wgmma_wait_for_previous() const { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
  // Until all are done: then the sums, d, may be read too. (d is an operand so that the compiler reads it no sooner.)
  KDQ_DEVICE void wgmma_finish(int32_t (&d)[kWgmmaSums]) const {
    asm volatile("wgmma.wait_group.sync.aligned 0;" : KDQ_SUMS(d)::"memory");
  }

  // d [64, 256] = a [64, 32] @ b [256, 32] transposed, on int8, plus d if accumulate. a, b: wgmma_operand().
  KDQ_DEVICE void wgmma_int8(int32_t (&d)[kWgmmaSums], uint64_t a, uint64_t b, bool accumulate) const {
    KDQ_WGMMA("wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8", d, a, b, accumulate);
  }
  // The same on rows of 256 bits: how many are set in both.
  KDQ_DEVICE void wgmma_and(int32_t (&d)[kWgmmaSums], uint64_t a, uint64_t b, bool accumulate) const {
    KDQ_WGMMA("wgmma.mma_async.sync.aligned.m64n256k256.s32.b1.b1.and.popc", d, a, b, accumulate);
  }
};

#undef KDQ_WGMMA
#undef KDQ_SUMS
#undef KDQ_SUMS_16

#endif

}  // namespace kdq::cuda
