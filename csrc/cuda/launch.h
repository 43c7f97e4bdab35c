// The CUDA kernels' entry points, for code that knows nothing of CUDA.
#pragma once

#include <string>

#include "../cpu/kernels.h"

namespace ard {
namespace cuda {

// The adaLN family on device pointers. The residual stream has one type, the rest another (tables, branch, y). `partial`
// holds (batch * blocks, 8, 3, width) floats where there are no clusters. Null, or what went wrong.
const char* adaln(const Adaln& a, float* partial, bool backwards, bool clusters, void* stream);

// Why the driver cannot run this code, or empty.
std::string why_not();

}  // namespace cuda
}  // namespace ard
