// CUDA's threads on the host, for tests: a block's threads, and those of a cluster's blocks, are fibers that take turns.
// A kernel that waits in some threads only never ends here either; that is reported.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace ard {
namespace cuda {

using Stream = void*;

namespace host {

struct Barrier {
    int arrived = 0, generation = 0;
};

struct Block {
    int index, rank;
    std::vector<float> memory;
    Barrier barrier;
    std::map<std::pair<int, unsigned>, Barrier> warps;  // by warp and mask of its lanes
    std::vector<float> lanes;                           // what each thread shows the others
    int ended = 0;
};

struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    Block* block;
    int thread;
    bool done = false;
};

struct Cluster {
    std::vector<std::unique_ptr<Block>> blocks;
    std::vector<std::unique_ptr<Fiber>> fibers;
    Barrier barrier;
    ucontext_t scheduler;
    Fiber* running = nullptr;
    std::function<void()> body;
    int threads = 0;
    bool moved = false;  // whether anything happened since a warp's threads were asked
};

inline Cluster*& cluster() {
    static thread_local Cluster* current = nullptr;
    return current;
}

inline Fiber& fiber() { return *cluster()->running; }

inline void wait(Barrier& barrier, int size) {
    const int before = barrier.generation;
    cluster()->moved = true;
    if (++barrier.arrived == size) {
        barrier.arrived = 0;
        barrier.generation++;
        return;
    }
    while (barrier.generation == before) swapcontext(&fiber().context, &cluster()->scheduler);
    cluster()->moved = true;
}

inline void enter() {
    cluster()->body();
    fiber().done = true;
    cluster()->moved = true;
    swapcontext(&fiber().context, &cluster()->scheduler);
}

// Lets a thread go on until it waits or ends. With its last thread a block's memory is gone.
inline void resume(Cluster& all, Fiber& fiber) {
    all.running = &fiber;
    swapcontext(&all.scheduler, &fiber.context);
    std::vector<float>& memory = fiber.block->memory;
    if (fiber.done && ++fiber.block->ended == all.threads) std::fill(memory.begin(), memory.end(), __builtin_nanf(""));
}

inline void run(Cluster& all) {
    cluster() = &all;
    for (auto& fiber : all.fibers) {
        getcontext(&fiber->context);
        fiber->context.uc_stack.ss_sp = fiber->stack.data();
        fiber->context.uc_stack.ss_size = fiber->stack.size();
        makecontext(&fiber->context, enter, 0);
    }
    // A warp goes as far as it can before the next one does: what it overwrites too early, others miss.
    for (bool busy = true; busy;) {
        bool moved = busy = false;
        for (std::size_t first = 0; first < all.fibers.size(); first += 32) {
            do {
                all.moved = false;
                for (std::size_t i = first; i < all.fibers.size() && i < first + 32; i++) {
                    if (all.fibers[i]->done) continue;
                    busy = true;
                    resume(all, *all.fibers[i]);
                }
                moved = moved || all.moved;
            } while (all.moved);
        }
        if (busy && !moved) throw std::runtime_error("threads wait for others that do not come");
    }
    cluster() = nullptr;
}

}  // namespace host

inline std::string driver_reason() { return ""; }

inline int thread_index() { return host::fiber().thread; }
inline int threads() { return host::cluster()->threads; }
inline int block_index() { return host::fiber().block->index; }
inline void wait_for_block() { host::wait(host::fiber().block->barrier, threads()); }
inline float* shared() { return host::fiber().block->memory.data(); }
inline int rank_in_cluster() { return host::fiber().block->rank; }
inline const float* shared_of(int rank) { return host::cluster()->blocks[rank]->memory.data(); }
inline void wait_for_cluster() {
    host::wait(host::cluster()->barrier, threads() * static_cast<int>(host::cluster()->blocks.size()));
}

inline float from_lane(unsigned mask, float x, int distance) {
    host::Block& block = *host::fiber().block;
    const int thread = thread_index();
    host::Barrier& barrier = block.warps[{thread / 32, mask}];
    block.lanes[thread] = x;
    host::wait(barrier, __builtin_popcount(mask));
    const float y = block.lanes[thread ^ distance];
    host::wait(barrier, __builtin_popcount(mask));
    return y;
}

template <class Arguments>
const char* launch(
    void (*kernel)(Arguments), const Arguments& arguments, int blocks, int threads, int shared_bytes, int cluster, Stream) {
    for (int first = 0; first < blocks; first += cluster) {
        host::Cluster all;
        all.threads = threads;
        all.body = [&] { kernel(arguments); };
        for (int rank = 0; rank < cluster; rank++) {
            all.blocks.emplace_back(new host::Block{first + rank, rank, {}, {}, {}, {}});
            all.blocks.back()->memory.assign(shared_bytes / sizeof(float), __builtin_nanf(""));
            all.blocks.back()->lanes.assign(threads, 0.0f);
            for (int thread = 0; thread < threads; thread++) {
                all.fibers.emplace_back(new host::Fiber);
                all.fibers.back()->stack.resize(64 << 10);
                all.fibers.back()->block = all.blocks.back().get();
                all.fibers.back()->thread = thread;
            }
        }
        host::run(all);
    }
    return nullptr;
}

}  // namespace cuda
}  // namespace ard
