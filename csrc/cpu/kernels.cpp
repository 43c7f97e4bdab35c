// The kernels of one instruction set: compiled once for each, with ARD_ISA naming it.
#include "kernels.h"

#include "adaln.h"
#include "attention.h"
#include "gelu.h"

#define ARD_NAME_(x) #x
#define ARD_NAME(x) ARD_NAME_(x)

namespace ard {
namespace ARD_ISA {
extern const Kernels kernels;
const Kernels kernels{ARD_NAME(ARD_ISA), attention_forward, attention_backward, adaln_forward, adaln_backward, gelu};
}  // namespace ARD_ISA
}  // namespace ard
