// runtime.cpp: runs the blocks of racing.h. Compiled without -fsanitize=thread: what it does itself is no access.
//
// A launch has a few workers, and a worker starts a new thread for each of its blocks, so that shared memory is
// new. No two blocks of a launch have fibres in common: what one had done would come before what the other does.
// Fibres take ThreadSanitizer long to make, so later launches have them again.
//
// A fibre runs until it must wait, or yields by chance in an atomic, a fence or a volatile access. The order of
// blocks is drawn, and that of the fibres in each round; a fibre may have several turns in a row, so that warps
// run ahead.
#include <link.h>
#include <sanitizer/tsan_interface.h>

#include <atomic>

namespace racing {
namespace {

using gpushim::AT_BARRIER, gpushim::DONE, gpushim::IN_WARP, gpushim::READY, gpushim::State;
using gpushim::LINE, gpushim::MOST_THREADS, gpushim::PAGE, gpushim::STACK, gpushim::WARP_LANES;
constexpr unsigned MOST_WARPS = MOST_THREADS / WARP_LANES;
constexpr unsigned CREWS_KEPT = 10;  // a crew of 256 takes ThreadSanitizer 200 MB

struct Fibre : gpushim::Fibre {
    void* context;  // what ThreadSanitizer knows it by
    char* order;    // of the warp operation it waits in, see Block
};

// The fibres that a block runs on.
struct Crew {
    unsigned count = 0;
    void* contexts[MOST_THREADS];
    char* stacks;
};

struct Launch {
    const Call& call;
    dim3 grid;
    unsigned threads, yield_percent;
    uint64_t seed;
    std::vector<unsigned> order;  // of blocks
    std::atomic<unsigned> next = 0;
    std::atomic<bool> failed = false;
    char error[400] = "";
};

// A block in flight.
struct Block {
    Launch& launch;
    dim3 at;
    uint64_t random;
    Fibre fibres[MOST_THREADS];
    State states[MOST_THREADS];
    unsigned turns[MOST_THREADS];
    uint32_t lanes_waiting[MOST_WARPS];
    unsigned threads, done, at_barrier;
    Fibre scheduler;
    Fibre* current;  // null while the scheduler runs
    unsigned barriers, predicates, barrier_count;
    Site barrier_site;
    unsigned warp_operations[MOST_WARPS];
    bool failed;
    // Addresses for ThreadSanitizer to keep orders by. Two barriers in a row have different ones: who leaves the
    // first late does not come after what others did on their way to the second.
    char start;
    char barrier_orders[2];
    char warp_orders[MOST_WARPS][WARP_LANES];
};
thread_local Block* here;
char launch_start, launch_end;  // addresses of that kind
Crew kept[CREWS_KEPT];

uint64_t random_of(uint64_t seed) { return seed * 2654435761u + 88172645463325252ull; }

uint32_t draw(uint64_t& s) {
    s ^= s << 13;
    s ^= s >> 7;
    s ^= s << 17;
    return uint32_t(s >> 32);
}

void shuffle_order(unsigned* order, size_t n, uint64_t& random) {
    for (size_t i = n; i > 1; i--) std::swap(order[i - 1], order[draw(random) % i]);
}

// --- fibres ---
void dismiss(Crew& crew) {
    for (unsigned i = 0; i < crew.count; i++) __tsan_destroy_fiber(crew.contexts[i]);
    if (crew.count) munmap(crew.stacks, crew.count * STACK);
    crew.count = 0;
}

// Have enough fibres.
void assemble(Crew& crew, unsigned count) {
    if (crew.count >= count) return;
    dismiss(crew);
    int access = PROT_READ | PROT_WRITE, kind = MAP_PRIVATE | MAP_ANONYMOUS;
    void* p = mmap(nullptr, count * STACK, access, kind, -1, 0);
    if (p == MAP_FAILED) abort();
    crew.stacks = (char*)p;
    for (unsigned i = 0; i < count; i++) crew.contexts[i] = __tsan_create_fiber(0);
    crew.count = count;
}

void change(Fibre& from, Fibre& to) {
    __tsan_switch_to_fiber(to.context, __tsan_switch_to_fiber_no_sync);
    gpushim::gpushim_switch(&from.stack_pointer, to.stack_pointer);
}

__attribute__((noinline)) void give_way() {
    Fibre& self = *here->current;
    here->current = nullptr;
    change(self, here->scheduler);
}

// End the block, and with it the launch, whose first message stays. The fibres are left where they are.
__attribute__((noinline, format(printf, 1, 2))) void fail(const char* format, ...) {
    if (!here->launch.failed.exchange(true)) {
        va_list values;
        va_start(values, format);
        vsnprintf(here->launch.error, sizeof here->launch.error, format, values);
        va_end(values);
    }
    here->failed = true;
    if (here->current) give_way();
}

void entry() {
    __tsan_acquire(&launch_start);
    __tsan_acquire(&here->start);
    const Call& call = here->launch.call;
    call.run(call);
    __tsan_release(&launch_end);
    here->states[here->current->number] = DONE;
    here->done++;
    give_way();
    __builtin_unreachable();
}

void prepare(Fibre& fibre, const Crew& crew, unsigned number) {
    char name[64];
    snprintf(name, sizeof name, "block (%u, %u, %u), thread %u", here->at.x, here->at.y, here->at.z, number);
    __tsan_set_fiber_name(crew.contexts[number], name);
    fibre.context = crew.contexts[number];
    fibre.number = number;
    fibre.thread = {number, 0, 0};
    void** s = (void**)(crew.stacks + (number + 1) * STACK - LINE * (1 + number % (PAGE / LINE)));
    *--s = nullptr;
    *--s = (void*)entry;
    for (int i = 0; i < 6; i++) *--s = nullptr;
    fibre.stack_pointer = s;
    here->states[number] = READY;
    here->turns[number] = number;
}

// --- shared memory ---
struct SharedMemory {
    const void* code;  // of the library that it belongs to
    char* first;
    size_t size;
};

int look_for(dl_phdr_info* library, size_t, void* p) {
    auto& memory = *(SharedMemory*)p;
    bool found = false;
    memory.size = 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        const ElfW(Phdr)& part = library->dlpi_phdr[i];
        size_t offset = size_t(memory.code) - library->dlpi_addr - part.p_vaddr;
        found |= part.p_type == PT_LOAD && offset < part.p_memsz;
        if (part.p_type == PT_TLS) memory.size = part.p_memsz;
    }
    memory.first = (char*)library->dlpi_tls_data;
    return found;
}

void poison_shared_memory(const Call& call) {
    call.touch();
    SharedMemory memory = {(const void*)call.run};
    dl_iterate_phdr(look_for, &memory);
    memset(memory.first, 0xFF, memory.size);  // NaN
}

// --- a block ---
bool open_barrier() {
    Block& b = *here;
    if (b.at_barrier != b.threads) return false;
    b.barrier_count = b.predicates;
    b.at_barrier = b.predicates = 0;
    b.barriers++;
    memset(b.states, READY, b.threads);
    return true;
}

// Let each that is ready run; whether any was.
bool run_round() {
    Block& b = *here;
    bool any = false;
    shuffle_order(b.turns, b.threads, b.random);
    for (unsigned i = 0; i < b.threads; i++) {
        unsigned number = b.turns[i];
        do {
            if (b.states[number] != READY || b.failed) break;
            any = true;
            b.current = &b.fibres[number];
            change(b.scheduler, b.fibres[number]);
        } while (draw(b.random) % 4 == 0);
    }
    return any;
}

void describe_deadlock() {
    Block& b = *here;
    unsigned in_warp = b.threads - b.done - b.at_barrier;
    fail("deadlock: of %u threads %u have returned, %u wait at a divergent __syncthreads, "
         "%u for lanes of their masks", b.threads, b.done, b.at_barrier, in_warp);
}

// Fibres that are left where they are come before the end of the launch too.
void abandon(const Crew& crew) {
    for (unsigned i = 0; i < crew.count; i++) {
        __tsan_switch_to_fiber(crew.contexts[i], __tsan_switch_to_fiber_no_sync);
        __tsan_release(&launch_end);
    }
    __tsan_switch_to_fiber(here->scheduler.context, __tsan_switch_to_fiber_no_sync);
}

void run_block(const Crew& crew) {
    Block& b = *here;
    poison_shared_memory(b.launch.call);
    for (unsigned i = 0; i < b.threads; i++) prepare(b.fibres[i], crew, i);
    __tsan_release(&b.start);
    while (b.done < b.threads && !b.failed)
        if (!run_round() && !open_barrier()) describe_deadlock();
    if (b.failed) abandon(crew);
}

void start_thread(pthread_t& thread, void* (*body)(void*), void* argument) {
    if (pthread_create(&thread, nullptr, body, argument)) abort();
}

struct Turn {
    Launch& launch;
    unsigned number;  // in the order of blocks
};

void* take_turn(void* p) {
    auto [launch, number] = *(Turn*)p;
    Crew own, &crew = number < CREWS_KEPT ? kept[number] : own;
    assemble(crew, launch.threads);
    const dim3& grid = launch.grid;
    unsigned n = launch.order[number];
    dim3 at = {n % grid.x, n / grid.x % grid.y, n / grid.x / grid.y};
    here = new Block{launch, at, random_of(launch.seed + 977 * n)};
    here->threads = launch.threads;
    here->scheduler.context = __tsan_get_current_fiber();
    run_block(crew);
    if (here->failed || &crew == &own) dismiss(crew);
    delete here;
    return nullptr;
}

void* work(void* p) {
    Launch& launch = *(Launch*)p;
    for (unsigned i = launch.next++; i < launch.order.size() && !launch.failed; i = launch.next++) {
        Turn turn = {launch, i};
        pthread_t thread;
        start_thread(thread, take_turn, &turn);
        pthread_join(thread, nullptr);
    }
    return nullptr;
}

// --- warp operations ---
uint32_t existing_lanes(unsigned warp) {
    unsigned lanes = std::min(WARP_LANES, here->threads - warp * WARP_LANES);
    return lanes == WARP_LANES ? ~0u : (1u << lanes) - 1;
}

// Those of the lanes that wait in an operation of a mask.
uint32_t waiting_in(const Fibre* lanes, uint32_t waiting, uint32_t mask) {
    uint32_t found = 0;
    for (uint32_t rest = waiting; rest; rest &= rest - 1)
        if (lanes[__builtin_ctz(rest)].mask == mask) found |= rest & -rest;
    return found;
}

// All lanes of a mask are there.
void operate(Fibre* lanes, uint32_t present) {
    const Fibre& last = *here->current;
    uint64_t votes = 0;
    for (uint32_t rest = present; rest; rest &= rest - 1) {
        Fibre& f = lanes[__builtin_ctz(rest)];
        if (f.operation != last.operation)
            fail("lanes of one mask meet in different operations, at %s:%u and %s:%u", last.site.file_name(),
                 last.site.line(), f.site.file_name(), f.site.line());
        if (f.operation == gpushim::SHUFFLE) {
            if (!(present >> f.from & 1))
                fail("the shuffle at %s:%u reads lane %d, which does not take part", f.site.file_name(),
                     f.site.line(), f.from);
            f.result = lanes[f.from].offer;
        }
        votes |= f.offer << (&f - lanes);
    }
    for (uint32_t rest = present; rest; rest &= rest - 1) {
        Fibre& f = lanes[__builtin_ctz(rest)];
        if (f.operation == gpushim::VOTE) f.result = votes;
        here->states[f.number] = READY;
    }
}
}  // namespace

// --- what kernels call ---
dim3 thread() { return here->current->thread; }
dim3 block() { return here->at; }
dim3 block_size() { return {here->threads, 1, 1}; }
dim3 grid() { return here->launch.grid; }
int lane() { return int(here->current->number % WARP_LANES); }

void maybe_yield() {
    if (here->current && draw(here->random) % 100 < here->launch.yield_percent) give_way();
}

__attribute__((noinline)) int barrier(bool predicate, const Site& site) {
    Block& b = *here;
    if (b.at_barrier == 0)
        b.barrier_site = site;
    else if (!gpushim::same(site, b.barrier_site))
        fail("divergent __syncthreads: threads of one block wait at %s:%u and %s:%u",
             b.barrier_site.file_name(), b.barrier_site.line(), site.file_name(), site.line());
    char* order = &b.barrier_orders[b.barriers % 2];
    b.predicates += predicate;
    b.at_barrier++;
    b.states[b.current->number] = AT_BARRIER;
    __tsan_release(order);
    give_way();
    __tsan_acquire(order);
    return b.barrier_count;
}

__attribute__((noinline)) uint64_t meet(uint32_t mask, int operation, uint64_t offer, int from,
                                        const Site& site) {
    Block& b = *here;
    Fibre& self = *b.current;
    unsigned warp = self.number / WARP_LANES;
    if (!(mask >> lane() & 1))
        fail("lane %u is not in its own mask 0x%08x, at %s:%u", lane(), mask, site.file_name(), site.line());
    Fibre* lanes = &b.fibres[warp * WARP_LANES];
    uint32_t& waiting = b.lanes_waiting[warp];
    uint32_t present = mask & existing_lanes(warp), others = waiting_in(lanes, waiting, mask);
    if (others == 0)
        self.order = &b.warp_orders[warp][b.warp_operations[warp]++ % WARP_LANES];
    else
        self.order = lanes[__builtin_ctz(others)].order;
    self.mask = mask;
    self.operation = gpushim::Operation(operation);
    self.offer = offer;
    self.from = from;
    self.site = site;
    waiting |= 1u << lane();
    b.states[self.number] = IN_WARP;
    if (operation == gpushim::SYNC) __tsan_release(self.order);
    if (waiting_in(lanes, waiting, mask) == present) {
        waiting &= ~present;
        operate(lanes, present);
    }
    give_way();
    if (operation == gpushim::SYNC) __tsan_acquire(self.order);
    return self.result;
}

const char* launch(const Call& call, const unsigned* grid, unsigned threads, uint64_t seed, unsigned workers,
                   unsigned yield_percent) {
    if (threads == 0 || threads > MOST_THREADS) return "a block has 1 to 1024 threads";
    dim3 extent = {grid[0], grid[1], grid[2]};
    uint64_t random = random_of(seed);
    std::vector<unsigned> order(size_t(extent.x) * extent.y * extent.z);
    for (unsigned i = 0; i < order.size(); i++) order[i] = i;
    shuffle_order(order.data(), order.size(), random);
    Launch it = {call, extent, threads, yield_percent, seed, std::move(order)};
    __tsan_release(&launch_start);
    std::vector<pthread_t> working(workers);
    for (pthread_t& worker : working) start_thread(worker, work, &it);
    for (pthread_t& worker : working) pthread_join(worker, nullptr);
    __tsan_acquire(&launch_end);
    static char error[sizeof it.error];  // outlives the launch
    memcpy(error, it.error, sizeof error);
    return *error ? error : nullptr;
}
}  // namespace racing

// --- volatile accesses ---
// Relaxed atomics to ThreadSanitizer; adding nothing counts as a store. A report is to name the function that has
// the access, so this call goes on its stack.
extern "C" void __tsan_func_entry(void* caller);
extern "C" void __tsan_func_exit();
#define RACING_VOLATILE(bytes, bits)                                                                \
    extern "C" uint##bits##_t __tsan_atomic##bits##_load(const volatile void*, int);                \
    extern "C" uint##bits##_t __tsan_atomic##bits##_fetch_add(volatile void*, uint##bits##_t, int); \
    extern "C" void __tsan_volatile_read##bytes(void* p) {                                          \
        racing::maybe_yield();                                                                      \
        __tsan_func_entry(__builtin_return_address(0));                                             \
        __tsan_atomic##bits##_load(p, __ATOMIC_RELAXED);                                            \
        __tsan_func_exit();                                                                         \
    }                                                                                               \
    extern "C" void __tsan_volatile_write##bytes(void* p) {                                         \
        racing::maybe_yield();                                                                      \
        __tsan_func_entry(__builtin_return_address(0));                                             \
        __tsan_atomic##bits##_fetch_add(p, 0, __ATOMIC_RELAXED);                                    \
        __tsan_func_exit();                                                                         \
    }
RACING_VOLATILE(1, 8)
RACING_VOLATILE(2, 16)
RACING_VOLATILE(4, 32)
RACING_VOLATILE(8, 64)
