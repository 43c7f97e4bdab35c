// Units of work on the threads that PyTorch uses.
#pragma once

#include <cstdint>

namespace ard {

// Calls body(context, unit) for every unit in [0, units), on up to `threads` threads, whichever is free. What a call
// throws ends the work and reaches the caller.
void parallel(int threads, std::int64_t units, void (*body)(void*, std::int64_t), void* context);

template <class Body>
void parallel(int threads, std::int64_t units, const Body& body) {
    parallel(
        threads, units, [](void* context, std::int64_t unit) { (*static_cast<const Body*>(context))(unit); },
        const_cast<void*>(static_cast<const void*>(&body)));
}

// This thread's memory of so many bytes, aligned to 64; what was in it before is undefined. One at a time: a second
// call may move the first.
void* scratch(std::int64_t bytes);

// Whether work runs on several threads: the process has an OpenMP library, and is not forked.
bool threaded();

}  // namespace ard
