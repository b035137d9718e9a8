// prelude.cuh: types and small tools that every program begins with.  From the loader: IMAGE, THREADS.
// Written for NVRTC without headers; tests/cuda_host compiles the same text for the host.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// A kernel, and one that is to leave registers for so many blocks on a multiprocessor.
#define KERNEL extern "C" __global__ void __launch_bounds__(THREADS)
#define KERNEL_OF(blocks) extern "C" __global__ void __launch_bounds__(THREADS, blocks)
constexpr u32 ALL_LANES = 0xFFFFFFFFu;
constexpr int WARP = 32, WARPS = THREADS / WARP;
constexpr int NOTHING = 0x7FFFFFFF;  // first voxel of an empty box

__device__ __forceinline__ int lane_of_thread() { return threadIdx.x & (WARP - 1); }
__device__ __forceinline__ int warp_of_thread() { return threadIdx.x / WARP; }
__device__ __forceinline__ int imin(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ int imax(int a, int b) { return a > b ? a : b; }
__device__ __forceinline__ i64 lmin(i64 a, i64 b) { return a < b ? a : b; }
__device__ __forceinline__ i64 lmax(i64 a, i64 b) { return a > b ? a : b; }

// Four neighbours in one access of up to sixteen bytes.
template <class T>
struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) Quad {
    T v[4];
};

// Quads that pass by once: caches let go of them first.  By type, since a cast would put them into local memory.
__device__ __forceinline__ Quad<float> load_once(const Quad<float>* at) {
    float4 q = __ldcs((const float4*)at);
    return {{q.x, q.y, q.z, q.w}};
}
__device__ __forceinline__ Quad<double> load_once(const Quad<double>* at) {
    double2 low = __ldcs((const double2*)at), high = __ldcs((const double2*)at + 1);
    return {{low.x, low.y, high.x, high.y}};
}
template <class T>
__device__ __forceinline__ Quad<T> load_once(const Quad<T>* at) {
    static_assert(sizeof(T) == 2, "float16, bfloat16 and int16");
    uint2 q = __ldcs((const uint2*)at);
    return {{(T)q.x, (T)(q.x >> 16), (T)q.y, (T)(q.y >> 16)}};
}
__device__ __forceinline__ void store_once(Quad<float>* at, const Quad<float>& q) {
    __stcs((float4*)at, make_float4(q.v[0], q.v[1], q.v[2], q.v[3]));
}
__device__ __forceinline__ void store_once(Quad<double>* at, const Quad<double>& q) {
    __stcs((double2*)at, make_double2(q.v[0], q.v[1]));
    __stcs((double2*)at + 1, make_double2(q.v[2], q.v[3]));
}
__device__ __forceinline__ void store_once(Quad<u16>* at, const Quad<u16>& q) {
    __stcs((uint2*)at, make_uint2(q.v[0] | (u32)q.v[1] << 16, q.v[2] | (u32)q.v[3] << 16));
}

// float16 by its bits, to nearest, ties to even; without cuda_fp16.h.
#ifdef HOST_SHIM
__device__ __forceinline__ float half_to_float(u16 bits) { return (float)__builtin_bit_cast(_Float16, bits); }
__device__ __forceinline__ u16 float_to_half(float x) { return __builtin_bit_cast(u16, (_Float16)x); }
#else
__device__ __forceinline__ float half_to_float(u16 bits) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
}
__device__ __forceinline__ u16 float_to_half(float x) {
    u16 bits;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x));
    return bits;
}
#endif

// Index of SciPy's "reflect" edge, d c b a | a b c d | d c b a, at any distance.  Twin: cpu/filters.py
__device__ __forceinline__ int reflect(int i, int n) {
    i %= 2 * n;
    if (i < 0) i += 2 * n;
    return i < n ? i : 2 * n - 1 - i;
}

__device__ __forceinline__ u32 warp_or(u32 word) {
    for (int d = WARP / 2; d; d /= 2) word |= __shfl_xor_sync(ALL_LANES, word, d);
    return word;
}

template <class T>
__device__ __forceinline__ T warp_sum(T n) {
    for (int d = WARP / 2; d; d /= 2) n += __shfl_xor_sync(ALL_LANES, n, d);
    return n;
}

// Sum over the lanes up to this one.
template <class T>
__device__ __forceinline__ T inclusive_sum(T n) {
    for (int d = 1; d < WARP; d *= 2) {
        T other = __shfl_up_sync(ALL_LANES, n, d);
        if (lane_of_thread() >= d) n += other;
    }
    return n;
}

// The largest k < n with first(k) <= value, a whole warp; first(0) <= value, and first(k) does not decrease.
template <class First>
__device__ __forceinline__ int last_at_most(const First& first, int n, i64 value) {
    int low = 0;
    while (n > 1) {
        int step = (n + WARP - 1) / WARP, k = lane_of_thread() * step;
        u32 passed = __ballot_sync(ALL_LANES, k < n && first(low + k) <= value);
        int lane = 31 - __clz(passed);  // they form a prefix
        low += lane * step;
        n = imin(step, n - lane * step);
    }
    return low;
}

// Float keys whose unsigned order is the order of the floats: minima by integer atomics know no order.
__device__ __forceinline__ u32 key_of(float x) {
    u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float float_of(u32 key) {
    return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

// Union-find over any table of parents: a parent is never greater than its child, so the root of a set is
// its least member, whatever the order of threads.
//
// Uniting halves the paths it walks: else rows that all hang on their neighbour at once make a path of
// thousands.  The write may undo another thread's atomicMin, but that thread goes on to unite what it
// displaced, so no link is lost.
template <bool HALVE = false>
__device__ __forceinline__ int root_of(volatile int* parent, int a) {
    int p = parent[a];
    while (p != a) {
        int above = parent[p];
        if (above == p) return p;
        if (HALVE) parent[a] = above;
        a = above;
        p = parent[a];
    }
    return a;
}

__device__ __forceinline__ void unite(int* parent, int a, int b) {
    while (true) {
        a = root_of<true>(parent, a);
        b = root_of<true>(parent, b);
        if (a == b) return;
        int high = imax(a, b), low = imin(a, b);
        int old = atomicMin(&parent[high], low);
        if (old == high) return;  // else another thread moved it meanwhile
        a = old;
        b = low;
    }
}

// The last block to arrive may read what all others wrote: they fence before they count themselves.
// `last` is shared memory; every thread of the block calls this.
__device__ __forceinline__ bool is_last_block(u32* ticket, u32 blocks, int* last) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *last = atomicAdd(ticket, 1u) == blocks - 1u;
    __syncthreads();
    bool answer = *last != 0;
    __threadfence();
    return answer;
}

KERNEL clear_words(u32* words, i64 n) {
    for (i64 k = (i64)blockIdx.x * THREADS + threadIdx.x; k < n; k += (i64)gridDim.x * THREADS) words[k] = 0u;
}
