// What the CUDA kernels use of CUDA. Without nvcc the same kernels run on the host, for tests: every thread is a fiber
// that goes on until it must wait for others.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>

#include "../cpu/kernels.h"

#ifdef __CUDACC__
#include <cooperative_groups.h>
#include <cuda_runtime.h>
#define ARD_GLOBAL __global__
#define ARD_DEVICE __device__ __forceinline__
#define ARD_BOUNDS(threads, blocks) __launch_bounds__(threads, blocks)
#else
#include "host.h"
#define ARD_GLOBAL
#define ARD_DEVICE inline
#define ARD_BOUNDS(threads, blocks)
#endif

namespace ard {
namespace cuda {

#ifdef __CUDACC__
ARD_DEVICE int thread_index() { return threadIdx.x; }
ARD_DEVICE int threads() { return blockDim.x; }
ARD_DEVICE int block_index() { return blockIdx.x; }
ARD_DEVICE void wait_for_block() { __syncthreads(); }
ARD_DEVICE float from_lane(unsigned mask, float x, int distance) { return __shfl_xor_sync(mask, x, distance); }
ARD_DEVICE float* shared() {
    extern __shared__ float4 memory[];
    return reinterpret_cast<float*>(memory);
}
#if __CUDA_ARCH__ >= 900
ARD_DEVICE int rank_in_cluster() { return cooperative_groups::this_cluster().block_rank(); }
ARD_DEVICE void wait_for_cluster() { cooperative_groups::this_cluster().sync(); }
ARD_DEVICE const float* shared_of(int rank) { return cooperative_groups::this_cluster().map_shared_rank(shared(), rank); }
#else  // not called
ARD_DEVICE int rank_in_cluster() { return 0; }
ARD_DEVICE void wait_for_cluster() {}
ARD_DEVICE const float* shared_of(int) { return shared(); }
#endif

using Stream = cudaStream_t;

// Why the driver cannot run code that was compiled with this CUDA, or empty.
inline std::string driver_reason() {
    int driver = 0, made = 0;
    const bool known = cudaDriverGetVersion(&driver) == cudaSuccess && cudaRuntimeGetVersion(&made) == cudaSuccess;
    const auto named = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
    if (known && driver / 1000 >= made / 1000) return "";
    return "compiled with CUDA " + named(made) + ", the driver's is " + named(driver);
}

// The kernel's launch; null, or what went wrong.
template <class Arguments>
const char* launch(
    void (*kernel)(Arguments), const Arguments& arguments, int blocks, int threads, int shared_bytes, int cluster,
    Stream stream) {
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(blocks), config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared_bytes, config.stream = stream;
    cudaLaunchAttribute attribute = {};
    if (cluster > 1) {
        attribute.id = cudaLaunchAttributeClusterDimension;
        attribute.val.clusterDim.x = cluster, attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
        config.attrs = &attribute, config.numAttrs = 1;
    }
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments);
    return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}
#endif

template <class To, class From>
ARD_DEVICE To as(From x) {
    static_assert(sizeof(To) == sizeof(From), "");
    To y;
    memcpy(&y, &x, sizeof y);
    return y;
}

ARD_DEVICE float wide(float x) { return x; }
ARD_DEVICE float wide(bf16 x) { return as<float>(static_cast<std::uint32_t>(x.bits) << 16); }

template <class T>
ARD_DEVICE T narrow(float x);
template <>
ARD_DEVICE float narrow<float>(float x) {
    return x;
}
template <>
ARD_DEVICE bf16 narrow<bf16>(float x) {
#ifdef __CUDA_ARCH__
    std::uint16_t y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return bf16{y};
#else
    const std::uint32_t u = as<std::uint32_t>(x);
    if (x != x) return bf16{static_cast<std::uint16_t>(u >> 16 | 0x40)};
    return bf16{static_cast<std::uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16)};
#endif
}

constexpr int VECTOR = 8;  // columns that a thread reads and writes at once: 16 bytes of bfloat16

// They are as they were in memory, so that they take half the registers where they are bfloat16.
template <class T>
struct alignas(16) Vector {
    T at[VECTOR];
    ARD_DEVICE float operator[](int i) const { return wide(at[i]); }
};

struct alignas(16) Sixteen {
    std::uint32_t words[4];
};

template <class T>
struct Raw {
    Sixteen at[sizeof(Vector<T>) / 16];
};

template <class T>
ARD_DEVICE Vector<T> read(const T* p) {
    Raw<T> raw;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof raw / 16); i++) raw.at[i] = reinterpret_cast<const Sixteen*>(p)[i];
    return as<Vector<T>>(raw);
}

template <class T>
ARD_DEVICE void write(T* p, const Vector<T>& x) {
    const Raw<T> raw = as<Raw<T>>(x);
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof raw / 16); i++) reinterpret_cast<Sixteen*>(p)[i] = raw.at[i];
}

}  // namespace cuda
}  // namespace ard
