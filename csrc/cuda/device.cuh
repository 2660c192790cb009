// What the kernels need of the device, for nvcc. tests/native/simt.h defines the same names for g++, so that the
// kernels run on the CPU in the tests; nothing else in the kernels differs between the two.
#pragma once

#include <cstdint>

namespace triplet::gpu {

// an array in shared memory; the emulation checks bounds, races and reads before writes behind the same calls
template <typename T, int kSize>
struct Shared {
  struct alignas(sizeof(T) * 4 < 16 ? sizeof(T) * 4 : 16) Four {
    T at[4];
  };
  alignas(16) T at[kSize];
  __device__ T get(int i) const { return at[i]; }
  __device__ void set(int i, T value) { at[i] = value; }
  __device__ void get_four(int i, T (&out)[4]) const {  // i a multiple of 4: one 128-bit load of floats
    const Four four = *reinterpret_cast<const Four*>(at + i);
#pragma unroll
    for (int c = 0; c < 4; ++c) out[c] = four.at[c];
  }
  // Elements i..i+3, 16 bytes, on their way from global memory until this thread's `wait_for_copies`.
  __device__ void copy_four(int i, const T* from) {
    static_assert(sizeof(T) == 4);
#if __CUDA_ARCH__ >= 800
    const unsigned to = unsigned(__cvta_generic_to_shared(at + i));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
#endif
  }
};

__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

__device__ inline float half_to_float(uint16_t bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}

__device__ inline uint16_t float_to_half(float value) {
  uint16_t bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}

// 1 / x of a normal number up to 2^126, to a unit in the last place
__device__ inline float reciprocal(float x) {
  float inverse;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(x));
  return inverse;
}
__device__ inline double reciprocal(double x) { return 1 / x; }

// acc (16, 8) += a (16, 16) b (16, 8)^T of bfloat16 or float16 in a warp's registers (PTX ISA, mma.m16n8k16)
template <bool kBfloat16>
__device__ inline void mma_16x8x16(float (&acc)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  if constexpr (kBfloat16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
#else
  __trap();  // never launched there: the launcher asks the device first
#endif
}

}  // namespace triplet::gpu
