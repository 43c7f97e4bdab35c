#include "parallel.h"

#include <dlfcn.h>
#include <pthread.h>

#include <atomic>
#include <cstdlib>
#include <exception>
#include <new>

namespace ard {
namespace {

// PyTorch carries an OpenMP library of its own, under a name of its own: linking another would start a second pool
// of threads beside it. Its entry points are looked up among what the process has loaded instead. GCC's, LLVM's and
// Intel's libraries all have this one.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel gomp() {
    static const auto found = reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

// Threads do not survive a fork, and OpenMP would wait for them: a forked process, such as a data loader's worker,
// works alone.
std::atomic<bool> forked{false};
const int registered = pthread_atfork(nullptr, nullptr, [] { forked = true; });

struct Region {
    void (*body)(void*, std::int64_t);
    void* context;
    std::int64_t units;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // the first one, for the caller: OpenMP cannot be unwound

    void work() noexcept {
        try {
            for (std::int64_t unit; (unit = next.fetch_add(1)) < units;) body(context, unit);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
            next = units;
        }
    }
};

struct Memory {
    void* start = nullptr;
    std::int64_t bytes = 0;
    ~Memory() { std::free(start); }
};

}  // namespace

bool threaded() { return gomp() != nullptr && !forked; }

void parallel(int threads, std::int64_t units, void (*body)(void*, std::int64_t), void* context) {
    Region region{body, context, units};
    if (units < 2 || threads < 2 || !threaded())
        region.work();
    else  // on all of PyTorch's threads, though some find no unit: a smaller team ends the others, and all they keep
        gomp()([](void* r) { static_cast<Region*>(r)->work(); }, &region, static_cast<unsigned>(threads), 0);
    if (region.error) std::rethrow_exception(region.error);
}

void* scratch(std::int64_t bytes) {
    thread_local Memory memory;
    if (memory.bytes < bytes) {
        std::free(memory.start);
        memory.bytes = 0;
        memory.start = std::aligned_alloc(64, (bytes + 63) / 64 * 64);
        if (memory.start == nullptr) throw std::bad_alloc();
        memory.bytes = bytes;
    }
    return memory.start;
}

}  // namespace ard
