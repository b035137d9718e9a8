// gpushim.h: CUDA C++ on the host, for tests of logic.
//
// Every thread of a block is a fibre; blocks run one after another on the calling thread. A fibre runs until
// it must wait at a barrier or in a warp operation, or yields by chance in an atomic or a fence; then the
// next in turn that can go on does. When all have had their turn a round ends, and the scheduler opens the
// barrier they reached. The last lane to reach a warp operation does it for all lanes. Shared memory is
// poisoned before each block.
//
// A launch ends with a message when threads wait for what cannot come, when they meet at different barriers,
// when a shuffle reads a lane that does not take part, and when the processor time is up.
//
// It says nothing about speed, bank conflicts, occupancy or weak memory order.
#pragma once
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/time.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <source_location>
#include <type_traits>
#include <utility>
#include <vector>

#if !defined(__x86_64__) || defined(SHIM_UCONTEXT)
#include <ucontext.h>
#define SHIM_PORTABLE 1
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

#define HOST_SHIM 1
#define __global__
#define __device__
#define __host__
#define __constant__ static
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
// One section holds all static shared memory, so that it can be poisoned as a whole.
#define __shared__ __attribute__((section("gpushared"))) static
extern "C" __attribute__((weak, visibility("hidden"))) char __start_gpushared[], __stop_gpushared[];

// --- vector types ---
struct dim3 {
    unsigned x = 1, y = 1, z = 1;
};
#define SHIM_VECTOR2(name, type)             \
    struct alignas(2 * sizeof(type)) name {  \
        type x, y;                           \
    };                                       \
    inline name make_##name(type x, type y) { return {x, y}; }
#define SHIM_VECTOR4(name, type)                                           \
    struct alignas(std::min<size_t>(4 * sizeof(type), 16)) name {          \
        type x, y, z, w;                                                   \
    };                                                                     \
    inline name make_##name(type x, type y, type z, type w) { return {x, y, z, w}; }
SHIM_VECTOR2(int2, int)
SHIM_VECTOR2(uint2, unsigned)
SHIM_VECTOR2(float2, float)
SHIM_VECTOR2(double2, double)
SHIM_VECTOR4(uchar4, unsigned char)
SHIM_VECTOR4(short4, short)
SHIM_VECTOR4(ushort4, unsigned short)
SHIM_VECTOR4(int4, int)
SHIM_VECTOR4(uint4, unsigned)
SHIM_VECTOR4(float4, float)

namespace gpushim {
namespace {

using Site = std::source_location;
enum State : uint8_t { READY, AT_BARRIER, IN_WARP, DONE };
enum Order { FORWARD, REVERSE, RANDOM, WARPS };  // WARPS: each warp runs as far ahead as it can
enum Operation : uint8_t { SYNC, SHUFFLE, VOTE };
constexpr unsigned WARP_LANES = 32, MOST_THREADS = 1024;
constexpr size_t LINE = 64, PAGE = 4096;
#ifdef __SANITIZE_ADDRESS__
constexpr size_t STACK = 256 * 1024;
#else
constexpr size_t STACK = 64 * 1024;
#endif

struct Fibre {
    void* stack_pointer;
    dim3 thread;
    unsigned number;
    // what it brings to a warp operation, and takes away
    uint32_t mask;
    Operation operation;
    int from;  // lane to read
    uint64_t offer, result;
    Site site;
#ifdef SHIM_PORTABLE
    ucontext_t context;
#endif
};

// Everything about the block in flight.
struct Machine {
    Fibre fibres[MOST_THREADS];
    State states[MOST_THREADS];
    unsigned turns[MOST_THREADS];  // order of a round
    uint32_t lanes_waiting[MOST_THREADS / WARP_LANES];
    unsigned threads, position, done, at_barrier;
    Fibre* current = nullptr;  // null while the scheduler runs
    Fibre scheduler;
    dim3 block, block_size, grid;
    int predicates;                       // at the barrier so far
    int barrier_count;                    // at the last one
    Site barrier_site;
    unsigned yield_percent;
    Order order;
    unsigned turns_end;  // whose turns these are: all threads', or those up to the end of a warp
    uint64_t random;
    void (*body)(void*);
    void* argument;
    char* stacks = nullptr;
    char error[400];
    // watchdog
    pthread_t caller;
    volatile bool expired;
    volatile uint64_t rounds;
    uint64_t rounds_when_expired;
};
Machine machine;

uint32_t draw() {
    uint64_t& s = machine.random;
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return uint32_t(s >> 32);
}

// --- fibres ---
#ifndef SHIM_PORTABLE
extern "C" __attribute__((visibility("hidden"))) void gpushim_switch(void** save, void* to);
asm(".pushsection .text\n"
    ".hidden gpushim_switch\n"
    "gpushim_switch:\n"
    " push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    " mov %rsp,(%rdi)\n mov %rsi,%rsp\n"
    " pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n"
    ".popsection\n");
void change(Fibre& here, Fibre& there) { gpushim_switch(&here.stack_pointer, there.stack_pointer); }
#else
void change(Fibre& here, Fibre& there) { swapcontext(&here.context, &there.context); }
#endif

// Give way to the next in turn that is ready, else to the scheduler.
__attribute__((noinline)) void give_way() {
    Fibre& self = *machine.current;
    unsigned at = machine.position + 1;
    while (at < machine.turns_end && machine.states[machine.turns[at]] != READY) at++;
    machine.position = at;
    Fibre* next = at < machine.turns_end ? &machine.fibres[machine.turns[at]] : nullptr;
    machine.current = next;
    change(self, next ? *next : machine.scheduler);
}

// End the launch; the fibres are left where they are.
__attribute__((noinline, format(printf, 1, 2))) void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(machine.error, sizeof machine.error, format, values);
    va_end(values);
    Fibre& self = *machine.current;
    machine.current = nullptr;
    change(self, machine.scheduler);
}

void entry() {
    machine.body(machine.argument);
    machine.states[machine.current->number] = DONE;
    machine.done++;
    give_way();
    __builtin_unreachable();
}

void prepare(Fibre& f) {
    char* stack = machine.stacks + f.number * STACK;
    // Tops a cache line apart: at one address modulo a page they would drive each other out of the cache.
    char* top = stack + STACK - LINE * (1 + f.number % (PAGE / LINE));
#ifndef SHIM_PORTABLE
    void** s = (void**)top;
    *--s = nullptr;
    *--s = (void*)entry;
    for (int i = 0; i < 6; i++) *--s = nullptr;
    f.stack_pointer = s;
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = stack + PAGE;
    f.context.uc_stack.ss_size = size_t(top - stack) - PAGE;
    f.context.uc_link = nullptr;
    makecontext(&f.context, entry, 0);
#endif
}

// Stacks for the largest block; the first page of each faults.
bool have_stacks() {
    if (machine.stacks == nullptr) {
        int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
        void* p = mmap(nullptr, MOST_THREADS * STACK, access, kind, -1, 0);
        if (p == MAP_FAILED) return false;
        machine.stacks = (char*)p;
        for (unsigned i = 0; i < MOST_THREADS; i++) mprotect(machine.stacks + i * STACK, PAGE, PROT_NONE);
    }
#ifdef __SANITIZE_ADDRESS__
    // A launch that failed left its frames.
    __asan_unpoison_memory_region(machine.stacks, MOST_THREADS * STACK);
#endif
    return true;
}

void maybe_yield() {
    if (machine.yield_percent && draw() % 100 < machine.yield_percent) give_way();
}

// --- barriers ---
bool same(const Site& a, const Site& b) {
    return a.line() == b.line() && (a.file_name() == b.file_name() || !strcmp(a.file_name(), b.file_name()));
}

__attribute__((noinline)) int barrier(bool predicate, const Site& site) {
    if (machine.at_barrier == 0)
        machine.barrier_site = site;
    else if (!same(site, machine.barrier_site))
        fail("divergent __syncthreads: threads of one block wait at %s:%u and %s:%u",
             machine.barrier_site.file_name(), machine.barrier_site.line(), site.file_name(), site.line());
    machine.predicates += predicate;
    machine.at_barrier++;
    machine.states[machine.current->number] = AT_BARRIER;
    give_way();
    return machine.barrier_count;
}

bool open_barrier() {
    if (machine.at_barrier != machine.threads) return false;
    machine.barrier_count = machine.predicates;
    machine.predicates = 0;
    machine.at_barrier = 0;
    memset(machine.states, READY, machine.threads);
    return true;
}

// --- warp operations ---
uint32_t existing_lanes(unsigned warp) {
    unsigned lanes = std::min(WARP_LANES, machine.threads - warp * WARP_LANES);
    return lanes == WARP_LANES ? ~0u : (1u << lanes) - 1;
}

// All lanes of a mask are there.
void operate(Fibre* lanes, uint32_t present, Operation operation) {
    const Site& last = machine.current->site;
    uint64_t votes = 0;
    for (uint32_t rest = present; rest; rest &= rest - 1) {
        Fibre& f = lanes[__builtin_ctz(rest)];
        if (f.operation != operation)
            fail("lanes of one mask meet in different operations, at %s:%u and %s:%u", last.file_name(),
                 last.line(), f.site.file_name(), f.site.line());
        if (operation == SHUFFLE) {
            if (!(present >> f.from & 1))
                fail("the shuffle at %s:%u reads lane %d, which does not take part", f.site.file_name(),
                     f.site.line(), f.from);
            f.result = lanes[f.from].offer;
        }
        if (operation == VOTE) votes |= f.offer << (&f - lanes);
    }
    for (uint32_t rest = present; rest; rest &= rest - 1) {
        Fibre& f = lanes[__builtin_ctz(rest)];
        if (operation == VOTE) f.result = votes;
        machine.states[f.number] = READY;
    }
}

__attribute__((noinline)) uint64_t meet(uint32_t mask, Operation operation, uint64_t offer, int from,
                                        const Site& site) {
    Fibre& self = *machine.current;
    unsigned warp = self.number / WARP_LANES, lane = self.number % WARP_LANES;
    if (!(mask >> lane & 1))
        fail("lane %u is not in its own mask 0x%08x, at %s:%u", lane, mask, site.file_name(), site.line());
    self.mask = mask;
    self.operation = operation;
    self.offer = offer;
    self.from = from;
    self.site = site;
    uint32_t& waiting = machine.lanes_waiting[warp];
    waiting |= 1u << lane;
    uint32_t present = mask & existing_lanes(warp);
    Fibre* lanes = &machine.fibres[warp * WARP_LANES];
    bool complete = (waiting & present) == present;
    for (uint32_t rest = present; complete && rest; rest &= rest - 1)
        complete = lanes[__builtin_ctz(rest)].mask == mask;
    if (complete) {
        operate(lanes, present, operation);
        waiting &= ~present;
    } else {
        machine.states[self.number] = IN_WARP;
    }
    give_way();
    return self.result;
}

template <class T>
T shuffle(uint32_t mask, T value, int from, bool inside, const Site& site) {  // not inside: one's own
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    bits = meet(mask, SHUFFLE, bits, inside ? from : int(machine.current->number % WARP_LANES), site);
    memcpy(&value, &bits, sizeof value);
    return value;
}

// --- scheduler ---
void shuffle_order(unsigned* order, size_t n) {
    for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[draw() % i]);
}

// Let each that is ready run once; whether any was.
bool run_round() {
    machine.rounds = machine.rounds + 1;
    if (machine.order == RANDOM) shuffle_order(machine.turns, machine.threads);
    unsigned at = 0;
    while (at < machine.threads && machine.states[machine.turns[at]] != READY) at++;
    if (at == machine.threads) return false;
    machine.position = at;
    machine.turns_end = machine.threads;
    if (machine.order == WARPS) machine.turns_end = std::min((at / WARP_LANES + 1) * WARP_LANES, machine.threads);
    machine.current = &machine.fibres[machine.turns[at]];
    change(machine.scheduler, *machine.current);
    return true;
}

void describe_deadlock() {
    unsigned n = machine.threads, in_warp = n - machine.done - machine.at_barrier;
    size_t room = sizeof machine.error;
    size_t used = snprintf(machine.error, room, "deadlock: of %u threads %u have returned", n, machine.done);
    auto more = [&](unsigned count, const char* what, const Site& at) {
        if (count == 0 || used >= room) return;
        used += snprintf(machine.error + used, room - used, ", %u wait %s, %s:%u", count, what,
                         at.file_name(), at.line());
    };
    more(machine.at_barrier, "at a divergent __syncthreads", machine.barrier_site);
    State* first = std::find(machine.states, machine.states + n, IN_WARP);
    if (in_warp) more(in_warp, "for lanes of their masks", machine.fibres[first - machine.states].site);
}

constexpr char EXPIRED[] = "no end in sight: does a thread wait for a value that another must write?";

void run_block() {
    machine.done = machine.at_barrier = 0;
    machine.predicates = 0;
    memset(machine.lanes_waiting, 0, sizeof machine.lanes_waiting);
    while (machine.done < machine.threads && !*machine.error) {
        if (!run_round() && !open_barrier()) describe_deadlock();
        if (machine.expired && !*machine.error) strcpy(machine.error, EXPIRED);
    }
}

// The first signal asks the scheduler to stop. A fibre that is not back there by the next is left behind.
void on_timer(int) {
    if (!pthread_equal(pthread_self(), machine.caller)) return;
    if (!machine.expired) {
        machine.expired = true;
        machine.rounds_when_expired = machine.rounds;
    } else if (machine.current && machine.rounds == machine.rounds_when_expired) {
        fail("%s", EXPIRED);
    }
}

// The handler stays: a signal may be late, and the default action ends the process.
void watch(double seconds) {
    machine.expired = false;
    machine.rounds = 0;
    machine.caller = pthread_self();
    struct sigaction action = {};
    action.sa_handler = on_timer;
    action.sa_flags = SA_RESTART | SA_NODEFER;
    sigaction(SIGVTALRM, &action, nullptr);
    itimerval timer = {{0, 100000}, {time_t(seconds), suseconds_t(1e6 * (seconds - std::floor(seconds)))}};
    setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

void stop_watching() {
    itimerval none = {};
    setitimer(ITIMER_VIRTUAL, &none, nullptr);
}

#ifdef __SANITIZE_ADDRESS__
// memset would be checked, and the red zones between the arrays are no faults here.
__attribute__((no_sanitize("address"))) void poison_shared_memory() {
    volatile char* stop = __stop_gpushared;
    for (volatile char* p = __start_gpushared; p < stop; p++) *p = char(0xFF);
}
#else
void poison_shared_memory() {
    if (__start_gpushared)  // absent where no kernel has any
        memset(__start_gpushared, 0xFF, size_t(__stop_gpushared - __start_gpushared));  // NaN
}
#endif

const char* launch(const unsigned* grid, unsigned threads, void (*body)(void*), void* argument, uint64_t seed,
                   unsigned yield_percent, int order, double seconds) {
    if (threads == 0 || threads > MOST_THREADS) return "a block has 1 to 1024 threads";
    if (!have_stacks()) return "no memory for stacks";
    *machine.error = 0;
    machine.body = body;
    machine.argument = argument;
    machine.grid = {grid[0], grid[1], grid[2]};
    machine.threads = threads;
    machine.block_size = {threads, 1, 1};
    machine.random = seed * 2654435761u + 88172645463325252ull;
    machine.yield_percent = yield_percent;
    machine.order = Order(order);
    std::vector<unsigned> blocks(size_t(grid[0]) * grid[1] * grid[2]);
    for (unsigned i = 0; i < blocks.size(); i++) blocks[i] = i;
    for (unsigned i = 0; i < threads; i++) machine.turns[i] = order == REVERSE ? threads - 1 - i : i;
    if (order == REVERSE) std::reverse(blocks.begin(), blocks.end());
    if (order == RANDOM) shuffle_order(blocks.data(), blocks.size());
    watch(seconds);
    for (size_t b = 0; b < blocks.size() && !*machine.error; b++) {
        unsigned n = blocks[b];
        machine.block = {n % grid[0], n / grid[0] % grid[1], n / grid[0] / grid[1]};
        poison_shared_memory();
        for (unsigned i = 0; i < threads; i++) {
            machine.fibres[i].number = i;
            machine.fibres[i].thread = {i, 0, 0};
            machine.states[i] = READY;
            prepare(machine.fibres[i]);
        }
        run_block();
    }
    stop_watching();
    return *machine.error ? machine.error : nullptr;
}

template <class... A, size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(std::remove_reference_t<A>*)arguments[I]...);
}
template <class... A>
const char* run(void (*kernel)(A...), const unsigned* grid, unsigned threads, void** arguments, int count,
                uint64_t seed, unsigned yield_percent, int order, double seconds) {
    if (count != int(sizeof...(A))) return "called with a wrong number of arguments";
    struct Call {
        void (*kernel)(A...);
        void** arguments;
    } it{kernel, arguments};
    auto body = [](void* p) {
        auto* c = (Call*)p;
        call(c->kernel, c->arguments, std::index_sequence_for<A...>{});
    };
    return launch(grid, threads, body, &it, seed, yield_percent, order, seconds);
}
// Sizes of the parameters, so that an argument of a wrong type is found.
template <class... A>
void sizes_of(void (*)(A...), int* sizes) {
    ((*sizes++ = int(sizeof(A))), ...);
}
template <class... A>
constexpr int count_of(void (*)(A...)) {
    return int(sizeof...(A));
}

template <class T, class F>
T update(T* p, F f) {  // a yield on either side: others may come between, but not inside
    maybe_yield();
    T old = *p;
    *p = f(old);
    maybe_yield();
    return old;
}
int lane() { return int(machine.current->number % WARP_LANES); }
}  // namespace
}  // namespace gpushim

#define SHIM_EXPORT(k)                                                                                      \
    extern "C" const char* k##__launch(const unsigned* grid, unsigned threads, void** arguments, int count, \
                                       uint64_t seed, unsigned yield_percent, int order, double seconds) {  \
        return gpushim::run(k, grid, threads, arguments, count, seed, yield_percent, order, seconds);       \
    }                                                                                                       \
    extern "C" int k##__count() { return gpushim::count_of(k); }                                            \
    extern "C" void k##__sizes(int* sizes) { gpushim::sizes_of(k, sizes); }
#define threadIdx (gpushim::machine.current->thread)
#define blockIdx (gpushim::machine.block)
#define blockDim (gpushim::machine.block_size)
#define gridDim (gpushim::machine.grid)
constexpr int warpSize = gpushim::WARP_LANES;

// --- barriers, warps ---
#define SHIM_SITE gpushim::Site site = gpushim::Site::current()
inline void __syncthreads(SHIM_SITE) { gpushim::barrier(false, site); }
inline int __syncthreads_count(int p, SHIM_SITE) { return gpushim::barrier(p, site); }
inline int __syncthreads_and(int p, SHIM_SITE) {
    return gpushim::barrier(p, site) == int(gpushim::machine.threads);
}
inline int __syncthreads_or(int p, SHIM_SITE) { return gpushim::barrier(p, site) > 0; }
inline void __syncwarp(unsigned mask = ~0u, SHIM_SITE) { gpushim::meet(mask, gpushim::SYNC, 0, 0, site); }
inline void __threadfence() { gpushim::maybe_yield(); }
inline void __threadfence_block() { gpushim::maybe_yield(); }
inline void __threadfence_system() { gpushim::maybe_yield(); }
template <class T>
T __shfl_sync(unsigned mask, T v, int from, int width = 32, SHIM_SITE) {
    return gpushim::shuffle(mask, v, (gpushim::lane() & -width) + (from & (width - 1)), true, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned by, int width = 32, SHIM_SITE) {
    int from = gpushim::lane() + int(by);
    return gpushim::shuffle(mask, v, from, from <= (gpushim::lane() | (width - 1)), site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned by, int width = 32, SHIM_SITE) {
    int from = gpushim::lane() - int(by);
    return gpushim::shuffle(mask, v, from, from >= (gpushim::lane() & -width), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int with, int width = 32, SHIM_SITE) {
    int from = gpushim::lane() ^ with;
    return gpushim::shuffle(mask, v, from, from <= (gpushim::lane() | (width - 1)), site);
}
inline unsigned __ballot_sync(unsigned mask, int p, SHIM_SITE) {
    return unsigned(gpushim::meet(mask, gpushim::VOTE, p != 0, 0, site));
}
inline int __any_sync(unsigned mask, int p, SHIM_SITE) { return __ballot_sync(mask, p, site) != 0; }
inline int __all_sync(unsigned mask, int p, SHIM_SITE) { return __ballot_sync(mask, !p, site) == 0; }

// --- atomics ---
#define SHIM_ATOMIC(name, answer)                                    \
    template <class T>                                               \
    T name(T* p, std::type_identity_t<T> v) {                        \
        return gpushim::update(p, [=](T old) { return T(answer); }); \
    }
SHIM_ATOMIC(atomicAdd, old + v)
SHIM_ATOMIC(atomicSub, old - v)
SHIM_ATOMIC(atomicMin, std::min(old, v))
SHIM_ATOMIC(atomicMax, std::max(old, v))
SHIM_ATOMIC(atomicAnd, old& v)
SHIM_ATOMIC(atomicOr, old | v)
SHIM_ATOMIC(atomicXor, old ^ v)
SHIM_ATOMIC(atomicExch, v)
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
    return gpushim::update(p, [=](T old) { return old == expected ? v : old; });
}

// --- memory ---
#define SHIM_LOAD(name) \
    template <class T>  \
    T name(const T* p) { return *p; }
#define SHIM_STORE(name) \
    template <class T>   \
    void name(T* p, std::type_identity_t<T> v) { *p = v; }
SHIM_LOAD(__ldg)
SHIM_LOAD(__ldca)
SHIM_LOAD(__ldcg)
SHIM_LOAD(__ldcs)
SHIM_LOAD(__ldcv)
SHIM_STORE(__stcg)
SHIM_STORE(__stcs)
SHIM_STORE(__stwb)

// --- arithmetic ---
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
inline unsigned __brev(unsigned x) {
    x = (x >> 1 & 0x55555555u) | (x & 0x55555555u) << 1;
    x = (x >> 2 & 0x33333333u) | (x & 0x33333333u) << 2;
    x = (x >> 4 & 0x0F0F0F0Fu) | (x & 0x0F0F0F0Fu) << 4;
    return __builtin_bswap32(x);
}
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
inline long long __double_as_longlong(double d) { return __builtin_bit_cast(long long, d); }
inline double __longlong_as_double(long long i) { return __builtin_bit_cast(double, i); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __fma_rn(double a, double b, double c) { return std::fma(a, b, c); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
namespace gpushim {
namespace {
inline int saturate(double x) {  // as cvt does; NaN is 0
    return x != x ? 0 : x >= 2147483647.0 ? 2147483647 : x <= -2147483648.0 ? -2147483647 - 1 : int(x);
}
}  // namespace
}  // namespace gpushim
inline int __double2int_rd(double x) { return gpushim::saturate(std::floor(x)); }
inline int __double2int_ru(double x) { return gpushim::saturate(std::ceil(x)); }
inline int __double2int_rn(double x) { return gpushim::saturate(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return gpushim::saturate(std::floor(x)); }
inline int __float2int_ru(float x) { return gpushim::saturate(std::ceil(x)); }
inline int __float2int_rn(float x) { return gpushim::saturate(std::nearbyint(x)); }
using std::ceil;
using std::fabs;
using std::floor;
using std::fma;
using std::fmax;
using std::fmin;
using std::max;
using std::min;
using std::sqrt;
