// gpushim.h: CUDA C++ on the host, for tests of logic.
//
// Every thread of a block is a fibre; blocks run one after another on the calling thread. A fibre runs until it
// reaches a barrier, a warp operation or a random yield inside an atomic. Shared memory is poisoned before each
// block. Threads and blocks take turns in one of three orders. What the shim finds wrong ends the launch with a
// message: a barrier that some threads never reach, a warp operation whose mask does not match, no end in sight.
//
// It says nothing about speed, bank conflicts, occupancy or weak memory order.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define SHIM_PORTABLE 1
#endif
#if !defined(__x86_64__)
#define SHIM_PORTABLE 1
#endif

#define HOST_SHIM 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
// One section holds all static shared memory, so that it can be poisoned as a whole.
#define __shared__ __attribute__((section("gpushared"))) static
extern "C" __attribute__((weak)) char __start_gpushared[], __stop_gpushared[];

// --- vector types ---
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
struct int2 {
    int x, y;
};
struct alignas(8) uint2 {
    unsigned x, y;
};
struct alignas(16) float4 {
    float x, y, z, w;
};
struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) int4 {
    int x, y, z, w;
};
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace gpushim {

enum State : uint8_t { READY, AT_BARRIER, IN_WARP, DONE };
enum Order { FORWARD, REVERSE, RANDOM };
constexpr unsigned WARP_SIZE = 32;
constexpr size_t STACK = 64 * 1024;

struct Fibre {
    void* stack_pointer = nullptr;
    ucontext_t context;
    dim3 thread;
    unsigned number;
    State state;
    uint32_t mask;   // of the warp operation it waits for
    bool predicate;  // of the barrier it waits at
};

// Everything about the block in flight.
struct Machine {
    std::vector<Fibre> fibres;
    Fibre* current = nullptr;
    void* stack_pointer = nullptr;
    ucontext_t context;
    dim3 block, block_size, grid;
    uint64_t random = 1;
    unsigned yield_percent = 0;
    Order order = FORWARD;
    void (*body)(void*) = nullptr;
    void* argument = nullptr;
    std::vector<uint64_t> slots;  // what each thread offers to a warp operation
    const char* error = nullptr;
    int count = 0, all = 0, any = 0;  // results of the last barrier
    unsigned ready = 0, done = 0, at_barrier = 0, in_warp = 0;
    char* stacks = nullptr;
    size_t n_stacks = 0;
};
inline Machine machine;
inline uint64_t most_rounds = 1u << 22;

inline uint32_t draw() {
    uint64_t& s = machine.random;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return uint32_t(s >> 32);
}

// --- fibres ---
inline void entry() {
    machine.body(machine.argument);
    machine.current->state = DONE;
    machine.done++;
    extern void to_scheduler();
    to_scheduler();
    abort();
}

#ifndef SHIM_PORTABLE
extern "C" void gpushim_switch(void** save, void* to);
asm(".weak gpushim_switch\n"
    "gpushim_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
inline void to_scheduler() { gpushim_switch(&machine.current->stack_pointer, machine.stack_pointer); }
inline void to_fibre(Fibre& f) {
    machine.current = &f;
    gpushim_switch(&machine.stack_pointer, f.stack_pointer);
}
inline void prepare(Fibre& f, char* stack) {
    void** top = (void**)(stack + STACK - 64);
    *--top = nullptr;
    *--top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    f.stack_pointer = top;
}
#else
inline void to_scheduler() { swapcontext(&machine.current->context, &machine.context); }
inline void to_fibre(Fibre& f) {
    machine.current = &f;
    swapcontext(&machine.context, &f.context);
}
inline void prepare(Fibre& f, char* stack) {
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack;
    f.context.uc_stack.ss_size = STACK;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
}
#endif

inline void park(State state) {
    machine.current->state = state;
    machine.at_barrier += state == AT_BARRIER;
    machine.in_warp += state == IN_WARP;
    to_scheduler();
}
inline void maybe_yield() {
    if (machine.yield_percent && draw() % 100 < machine.yield_percent) park(READY);
}

// --- warp operations: two meetings, so that nobody overwrites what another has yet to read ---
inline void meet(uint32_t mask) {
    machine.current->mask = mask;
    park(IN_WARP);
}
template <class T>
T exchange(uint32_t mask, T value, int from) {  // from: absolute lane; outside the warp means one's own
    unsigned number = machine.current->number, base = number & ~(WARP_SIZE - 1), lane = number & (WARP_SIZE - 1);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    machine.slots[number] = bits;
    meet(mask);
    bool exists = from >= 0 && from < int(WARP_SIZE) && base + from < machine.slots.size();
    bits = machine.slots[base + (exists ? from : lane)];
    if (exists && !(mask >> from & 1)) machine.error = "a shuffle reads a lane outside its mask";
    meet(mask);
    T result;
    memcpy(&result, &bits, sizeof result);
    return result;
}
inline uint32_t vote(uint32_t mask, int predicate) {
    unsigned number = machine.current->number, base = number & ~(WARP_SIZE - 1);
    machine.slots[number] = predicate != 0;
    meet(mask);
    uint32_t votes = 0;
    for (unsigned i = 0; i < WARP_SIZE && base + i < machine.slots.size(); i++)
        if (mask >> i & 1) votes |= uint32_t(machine.slots[base + i]) << i;
    meet(mask);
    return votes;
}

// Open a barrier that all have reached, and every warp operation whose threads are all there.
inline bool release() {
    unsigned n = unsigned(machine.fibres.size());
    if (machine.at_barrier && machine.at_barrier + machine.done == n) {
        if (machine.done) machine.error = "__syncthreads is reached by some threads after others have returned";
        machine.count = 0;
        for (auto& f : machine.fibres) machine.count += f.state == AT_BARRIER && f.predicate;
        machine.all = machine.count == int(machine.at_barrier);
        machine.any = machine.count > 0;
        for (auto& f : machine.fibres)
            if (f.state == AT_BARRIER) f.state = READY;
        machine.at_barrier = 0;
        return true;
    }
    bool opened = false;
    if (machine.in_warp == 0) return false;
    for (unsigned w = 0; w < n; w += WARP_SIZE) {
        unsigned lanes = std::min(WARP_SIZE, n - w);
        for (unsigned l = 0; l < lanes; l++) {
            if (machine.fibres[w + l].state != IN_WARP) continue;
            uint32_t mask = machine.fibres[w + l].mask;
            bool complete = true;
            for (unsigned k = 0; k < lanes && complete; k++)
                if (mask >> k & 1) complete = machine.fibres[w + k].state == IN_WARP && machine.fibres[w + k].mask == mask;
            if (!complete) continue;
            for (unsigned k = 0; k < lanes; k++)
                if (mask >> k & 1) {
                    machine.fibres[w + k].state = READY;
                    machine.in_warp--;
                }
            opened = true;
        }
    }
    return opened;
}

inline void shuffle_order(std::vector<unsigned>& order) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
}

inline const char* run_block(std::vector<unsigned>& turns) {
    unsigned n = unsigned(machine.fibres.size());
    machine.done = machine.at_barrier = machine.in_warp = 0;
    for (uint64_t round = 0; machine.done < n; round++) {
        if (round > most_rounds) return "no end in sight: does a thread wait for a value that another must write?";
        if (machine.order == RANDOM) shuffle_order(turns);
        bool ran = false;
        for (unsigned i : turns) {
            Fibre& f = machine.fibres[i];
            if (f.state != READY) continue;
            ran = true;
            to_fibre(f);
        }
        if (machine.done < n && !release() && !ran) return "deadlock: a divergent __syncthreads or warp mask";
    }
    return nullptr;
}

inline const char* launch(dim3 grid, dim3 size, void (*body)(void*), void* argument, uint64_t seed, unsigned yield_percent,
                          int order) {
    unsigned n = size.x * size.y * size.z;
    if (n > 1024) return "more than 1024 threads in a block";
    machine.error = nullptr;
    machine.body = body;
    machine.argument = argument;
    machine.grid = grid;
    machine.block_size = size;
    machine.random = seed * 2654435761u + 88172645463325252ull;
    machine.yield_percent = yield_percent;
    machine.order = Order(order);
    machine.fibres.resize(n);
    machine.slots.assign(n, 0);
    if (machine.n_stacks < n) {
        machine.stacks = (char*)realloc(machine.stacks, n * STACK);
        machine.n_stacks = n;
    }
    std::vector<unsigned> turns(n), blocks(grid.x * grid.y * grid.z);
    for (unsigned i = 0; i < n; i++) turns[i] = i;
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    if (order == REVERSE) {
        std::reverse(turns.begin(), turns.end());
        std::reverse(blocks.begin(), blocks.end());
    }
    if (order == RANDOM) shuffle_order(blocks);
    for (unsigned b : blocks) {
        machine.block = {b % grid.x, b / grid.x % grid.y, b / grid.x / grid.y};
        if (__start_gpushared) memset(__start_gpushared, 0xFF, size_t(__stop_gpushared - __start_gpushared));  // NaN
        for (unsigned i = 0; i < n; i++) {
            Fibre& f = machine.fibres[i];
            f.number = i;
            f.thread = {i % size.x, i / size.x % size.y, i / size.x / size.y};
            f.state = READY;
            f.predicate = false;
            prepare(f, machine.stacks + i * STACK);
        }
        if (const char* error = run_block(turns)) return error;
    }
    return machine.error;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <class... A>
const char* run(void (*kernel)(A...), unsigned grid, unsigned block, void** arguments, uint64_t seed, unsigned yield_percent,
                int order) {
    struct Call {
        void (*kernel)(A...);
        void** arguments;
    } it{kernel, arguments};
    auto body = [](void* p) {
        auto* c = (Call*)p;
        call(c->kernel, c->arguments, std::index_sequence_for<A...>{});
    };
    return launch({grid, 1, 1}, {block, 1, 1}, body, &it, seed, yield_percent, order);
}

template <class T, class F>
T update(T* p, F f) {  // a yield on either side: others may come between, but not inside
    maybe_yield();
    T old = *p;
    *p = f(old);
    maybe_yield();
    return old;
}
inline int barrier(bool predicate) {
    machine.current->predicate = predicate;
    park(AT_BARRIER);
    return 0;
}
}  // namespace gpushim

#define SHIM_EXPORT(k)                                                                                              \
    extern "C" const char* k##__launch(unsigned grid, unsigned block, void** arguments, uint64_t seed, unsigned yield_percent, \
                                       int order) {                                                                 \
        return gpushim::run(k, grid, block, arguments, seed, yield_percent, order);                                 \
    }
#define threadIdx (gpushim::machine.current->thread)
#define blockIdx (gpushim::machine.block)
#define blockDim (gpushim::machine.block_size)
#define gridDim (gpushim::machine.grid)

// --- barriers, warps ---
inline void __syncthreads() { gpushim::barrier(false); }
inline int __syncthreads_count(int p) { return gpushim::barrier(p), gpushim::machine.count; }
inline int __syncthreads_and(int p) { return gpushim::barrier(p), gpushim::machine.all; }
inline int __syncthreads_or(int p) { return gpushim::barrier(p), gpushim::machine.any; }
inline void __syncwarp(unsigned mask = ~0u) { gpushim::meet(mask); }
inline void __threadfence() { gpushim::maybe_yield(); }
inline void __threadfence_block() { gpushim::maybe_yield(); }
inline void __threadfence_system() { gpushim::maybe_yield(); }
inline int shim_lane() { return int(gpushim::machine.current->number & 31u); }
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int = 32) { return gpushim::exchange(mask, v, from & 31); }
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int = 32) { return gpushim::exchange(mask, v, shim_lane() + int(by)); }
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int = 32) { return gpushim::exchange(mask, v, shim_lane() - int(by)); }
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with, int = 32) { return gpushim::exchange(mask, v, shim_lane() ^ with); }
inline unsigned __ballot_sync(unsigned mask, int p) { return gpushim::vote(mask, p); }
inline int __any_sync(unsigned mask, int p) { return gpushim::vote(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return gpushim::vote(mask, p) == mask; }

// --- atomics ---
template <class T>
T atomicMin(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T o) { return std::min(o, v); }); }
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T o) { return std::max(o, v); }); }
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T o) { return T(o + v); }); }
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T o) { return T(o | v); }); }
template <class T>
T atomicAnd(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T o) { return T(o & v); }); }
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) { return gpushim::update(p, [=](T) { return v; }); }
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> c, std::type_identity_t<T> v) {
    return gpushim::update(p, [=](T o) { return o == c ? v : o; });
}

// --- arithmetic ---
template <class T>
T __ldg(const T* p) { return *p; }
template <class T>
T __ldcg(const T* p) { return *p; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned((uint64_t(a) * b) >> 32); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) >> (by & 31));
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned by) {
    return unsigned((uint64_t(high) << 32 | low) << (by & 31) >> 32);
}
inline int __float_as_int(float f) { return __builtin_bit_cast(int, f); }
inline unsigned __float_as_uint(float f) { return __builtin_bit_cast(unsigned, f); }
inline float __int_as_float(int i) { return __builtin_bit_cast(float, i); }
inline float __uint_as_float(unsigned i) { return __builtin_bit_cast(float, i); }
using std::fabs;
using std::floor;
using std::fma;
using std::fmax;
using std::fmin;
using std::sqrt;
