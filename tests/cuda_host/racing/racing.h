// racing.h: CUDA C++ on the host with blocks that run at once, for ThreadSanitizer to find races.
//
// gpushim.h gives types, arithmetic, loads and stores; its blocks, warps and atomics make way for those here,
// which runtime.cpp runs. A block is a thread of the operating system and a thread of a block is a fibre, to
// ThreadSanitizer a thread of its own. What makes one access come before another:
//
//     __syncthreads     for all threads of a block
//     __syncwarp        for the lanes of its mask
//     racing::ticket    for those who draw one after another: the atomic of is_last_block with its fences
//     a launch          for all that comes before it, in it and after it
//
// All other atomics are relaxed; shuffles, votes and fences alone order nothing. Two accesses that nothing orders
// are a race where one of them writes and not both are atomic, whether or not they met. A volatile access counts
// as a relaxed atomic: threads that write one and the same value are to do it by volatile stores.
//
// Limits: memory is x86's, so no value suffers from a weaker order; launches follow each other, also those that a
// GPU may run beside; of eight bytes ThreadSanitizer remembers four accesses, so a race may take another round to
// show; a thread that waits for a value which another must write may wait for ever.
#pragma once
#include "gpushim.h"

namespace racing {

using gpushim::Site;

// The calling thread, and where it is.
dim3 thread();
dim3 block();
dim3 block_size();
dim3 grid();
int lane();

int barrier(bool predicate, const Site& site);
uint64_t meet(uint32_t mask, int operation, uint64_t offer, int from, const Site& site);
void maybe_yield();

// A kernel and its arguments.
struct Call {
    void (*run)(const Call&);
    void (*touch)();  // makes the calling thread's shared memory
    void* kernel;
    void** arguments;
};

// Returns null, or what went wrong.
const char* launch(const Call& call, const unsigned* grid, unsigned threads, uint64_t seed, unsigned workers,
                   unsigned yield_percent);

namespace {

thread_local char some_shared_memory;

template <class... A>
const char* run(void (*kernel)(A...), const unsigned* grid, unsigned threads, void** arguments, uint64_t seed,
                unsigned workers, unsigned yield_percent) {
    auto body = [](const Call& it) {
        gpushim::call((void (*)(A...))it.kernel, it.arguments, std::index_sequence_for<A...>{});
    };
    auto touch = [] { *(volatile char*)&some_shared_memory = 0; };
    Call call = {body, touch, (void*)kernel, arguments};
    return launch(call, grid, threads, seed, workers, yield_percent);
}

// --- barriers, warps ---
// Qualified: an operation is a type of gpushim's, which has a meet of its own.
inline void syncthreads(SHIM_SITE) { barrier(false, site); }
inline int syncthreads_count(int p, SHIM_SITE) { return barrier(p, site); }
inline int syncthreads_and(int p, SHIM_SITE) { return barrier(p, site) == int(block_size().x); }
inline int syncthreads_or(int p, SHIM_SITE) { return barrier(p, site) > 0; }
inline void syncwarp(unsigned mask = ~0u, SHIM_SITE) { racing::meet(mask, gpushim::SYNC, 0, 0, site); }
template <class T>
T shuffle(uint32_t mask, T value, int from, bool inside, const Site& site) {  // not inside: one's own
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = racing::meet(mask, gpushim::SHUFFLE, bits, inside ? from : lane(), site);
    memcpy(&value, &bits, sizeof value);
    return value;
}
template <class T>
T shfl(unsigned mask, T v, int from, int width = 32, SHIM_SITE) {
    return shuffle(mask, v, (lane() & -width) + (from & (width - 1)), true, site);
}
template <class T>
T shfl_down(unsigned mask, T v, unsigned by, int width = 32, SHIM_SITE) {
    int from = lane() + int(by);
    return shuffle(mask, v, from, from <= (lane() | (width - 1)), site);
}
template <class T>
T shfl_up(unsigned mask, T v, unsigned by, int width = 32, SHIM_SITE) {
    int from = lane() - int(by);
    return shuffle(mask, v, from, from >= (lane() & -width), site);
}
template <class T>
T shfl_xor(unsigned mask, T v, int with, int width = 32, SHIM_SITE) {
    int from = lane() ^ with;
    return shuffle(mask, v, from, from <= (lane() | (width - 1)), site);
}
inline unsigned ballot(unsigned mask, int p, SHIM_SITE) {
    return unsigned(racing::meet(mask, gpushim::VOTE, p != 0, 0, site));
}
inline int any(unsigned mask, int p, SHIM_SITE) { return ballot(mask, p, site) != 0; }
inline int all(unsigned mask, int p, SHIM_SITE) { return ballot(mask, !p, site) == 0; }

// --- atomics ---
template <class T, class F>
T update(T* p, F f, int order = __ATOMIC_RELAXED) {
    maybe_yield();
    T old;
    __atomic_load(p, &old, __ATOMIC_RELAXED);
    T now = f(old);
    while (!__atomic_compare_exchange(p, &old, &now, false, order, __ATOMIC_RELAXED)) now = f(old);
    maybe_yield();
    return old;
}
#define RACING_ATOMIC(name, answer)                         \
    template <class T>                                      \
    T name(T* p, std::type_identity_t<T> v) {               \
        return update(p, [=](T old) { return T(answer); }); \
    }
RACING_ATOMIC(add, old + v)
RACING_ATOMIC(sub, old - v)
RACING_ATOMIC(min, std::min(old, v))
RACING_ATOMIC(max, std::max(old, v))
RACING_ATOMIC(and_, old& v)
RACING_ATOMIC(or_, old | v)
RACING_ATOMIC(xor_, old ^ v)
RACING_ATOMIC(exchange, v)
template <class T>
T compare_and_swap(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return update(p, [=](T old) { return old == expected ? v : old; });
}
template <class T>
T ticket(T* p, std::type_identity_t<T> v) {
    return update(p, [=](T old) { return T(old + v); }, __ATOMIC_ACQ_REL);
}
}  // namespace
}  // namespace racing

// --- names: these instead of gpushim.h's ---
#undef SHIM_EXPORT
#undef __shared__
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#define SHIM_EXPORT(k)                                                                                        \
    extern "C" const char* k##__race(const unsigned* grid, unsigned threads, void** arguments, uint64_t seed, \
                                     unsigned workers, unsigned yield_percent) {                              \
        return racing::run(k, grid, threads, arguments, seed, workers, yield_percent);                        \
    }                                                                                                         \
    extern "C" int k##__count() { return gpushim::count_of(k); }                                              \
    extern "C" void k##__sizes(int* sizes) { gpushim::sizes_of(k, sizes); }
#define __shared__ static thread_local
#define threadIdx (racing::thread())
#define blockIdx (racing::block())
#define blockDim (racing::block_size())
#define gridDim (racing::grid())
#define __syncthreads racing::syncthreads
#define __syncthreads_count racing::syncthreads_count
#define __syncthreads_and racing::syncthreads_and
#define __syncthreads_or racing::syncthreads_or
#define __syncwarp racing::syncwarp
#define __threadfence racing::maybe_yield
#define __threadfence_block racing::maybe_yield
#define __threadfence_system racing::maybe_yield
#define __shfl_sync racing::shfl
#define __shfl_down_sync racing::shfl_down
#define __shfl_up_sync racing::shfl_up
#define __shfl_xor_sync racing::shfl_xor
#define __ballot_sync racing::ballot
#define __any_sync racing::any
#define __all_sync racing::all
#define atomicAdd racing::add
#define atomicSub racing::sub
#define atomicMin racing::min
#define atomicMax racing::max
#define atomicAnd racing::and_
#define atomicOr racing::or_
#define atomicXor racing::xor_
#define atomicExch racing::exchange
#define atomicCAS racing::compare_and_swap
