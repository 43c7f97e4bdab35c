// What the kernels of every instruction set offer, and their arguments. Strides are in elements; the last dimension
// is contiguous.
#pragma once

#include <cstdint>

namespace ard {

struct bf16 {
    std::uint16_t bits;
};

enum class DType : int { f32, bf16 };
enum class Mask : int { causal, diagonal, window, anchor };

// Whether queries of block i see keys of block j.
inline bool sees(Mask mask, std::int64_t i, std::int64_t j) {
    if (i == j) return true;
    switch (mask) {
        case Mask::causal: return j < i;
        case Mask::diagonal: return false;
        case Mask::window: return j == i - 1;
        case Mask::anchor: return j == 0;
    }
    return false;
}

struct Tensor {
    void* data = nullptr;
    DType dtype = DType::f32;
    std::int64_t batch = 0, token = 0, head = 0;  // strides
};

struct Layout {
    std::int64_t blocks;
    const std::int64_t* starts;  // blocks + 1, the first 0
    std::int64_t total() const { return starts[blocks]; }
};

struct Attention {
    std::int64_t batch, heads, dim;
    Layout layout;
    Mask mask;
    float scale;
    std::int64_t block;  // the one that q holds, or -1: all
    Tensor q, k, v, out;
    float* lse;                  // (B, H, queries), natural logarithm
    Tensor dout, dq, dk, dv;     // of the backward
};

// Activations (B, T, D), contiguous; tables (B, S, D). What is not there has no data.
struct Adaln {
    std::int64_t batch, width;
    Layout layout;
    float eps;
    Tensor x, branch, gate, shift, scale, residual, y;
    float *mean, *rstd;  // (B, T)
    // Of the backward: x is the forward's residual, dx_in its gradient from elsewhere.
    Tensor dy, dx_in, dx, dbranch, dgate, dshift, dscale;
};

// One dtype, contiguous. dout: only of the backward, which writes the gradient of x to out.
struct Gelu {
    std::int64_t count;
    Tensor x, dout, out;
};

struct Kernels {
    const char* name;
    void (*attention_forward)(const Attention&, int threads);
    void (*attention_backward)(const Attention&, int threads);
    void (*adaln_forward)(const Adaln&, int threads);
    void (*adaln_backward)(const Adaln&, int threads);
    void (*gelu)(const Gelu&, int threads);
};

}  // namespace ard
