// What a kernel's body sees of the machine: its place in the launch, barriers, exchanges within a warp, memory, tensor
// cores. A body is a template on this type, so that the tests can run the very same body on the CPU with another one
// (tests/cuda/emulator.h).
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define KDQ_DEVICE __device__ __forceinline__
#define KDQ_HOST_DEVICE __host__ __device__ __forceinline__
#define KDQ_DEVICE_CALL __device__ __noinline__
#else
#define KDQ_DEVICE inline
#define KDQ_HOST_DEVICE inline
#define KDQ_DEVICE_CALL inline
#endif

namespace kdq::cuda {

constexpr int kWarp = 32;

#if defined(__CUDACC__)

struct GpuThread {
  KDQ_DEVICE int64_t block() const { return blockIdx.x; }
  KDQ_DEVICE int index() const { return static_cast<int>(threadIdx.x); }

  // All threads of the block arrive before any goes on.
  KDQ_DEVICE void sync() const { __syncthreads(); }

  // The value of lane (own ^ mask). All lanes of the warp must call it.
  template <class V>
  KDQ_DEVICE V shuffle_xor(V value, int mask) const {
    return __shfl_xor_sync(0xFFFFFFFFU, value, mask);
  }

  // Global memory, as wide as V is, whose alignment p must have.
  template <class V>
  KDQ_DEVICE V load(const V* p) const {
    return *p;
  }
  template <class V>
  KDQ_DEVICE void store(V* p, const V& value) const {
    *p = value;
  }

  KDQ_DEVICE int popcount(uint32_t word) const { return __popc(word); }

  // The sum of four int8.
  KDQ_DEVICE int32_t byte_sum(uint32_t word) const { return __dp4a(static_cast<int32_t>(word), 0x01010101, 0); }

  // c [16, 8] += a [16, 32] @ b [32, 8] on int8, the fragments of a warp as PTX lays out mma.m16n8k32.
  KDQ_DEVICE void mma_int8(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  // c [16, 8] += how many bits are set in both a row of a [16, 256] and a column of b [256, 8], as mma.m16n8k256. (On
  // sm_90a the form with xor is two of these.)
  KDQ_DEVICE void mma_and(int32_t (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm volatile(
        "mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
        "{%0,%1,%2,%3};"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }

  // c [16, 8] += a [16, 16] @ b [16, 8] on pairs of bfloat16 or float16, as mma.m16n8k16. The sums are cut to float32.
  KDQ_DEVICE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  KDQ_DEVICE void mma_f16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) const {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
};

#endif

}  // namespace kdq::cuda
