// pair.cu: the pair (PAPER.md eq. 1 and 9), exactly.  Twin: cpu/inject.py
//     A = max(H, B_j) in G_j, or what the plan's mode says, and H elsewhere;  GT = (H >= tau) & ~G
// Floor of copy_pair: H read, A and GT written, nine bytes a voxel in float32; of inject, the lesions' voxels.
#if IMAGE == 0
typedef float Pixel, Result, Real;
#elif IMAGE == 1
typedef u16 Pixel, Result;  // float16
typedef float Real;
#elif IMAGE == 2
typedef u16 Pixel, Result;  // bfloat16
typedef float Real;
#elif IMAGE == 3
typedef short Pixel;  // Hounsfield units
typedef float Result, Real;
#else
typedef double Pixel, Result, Real;
#endif

// A stored value, and a value as it is stored.
__device__ __forceinline__ Real value_of(Result r) {
#if IMAGE == 1
    return half_to_float(r);
#elif IMAGE == 2
    return __uint_as_float((u32)r << 16);
#else
    return r;
#endif
}
__device__ __forceinline__ Result stored(Real value) {
#if IMAGE == 1
    return float_to_half(value);
#elif IMAGE == 2
    u32 bits = __float_as_uint(value);  // to nearest, ties to even; no NaN comes here but a strange image's
    return (u16)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
#else
    return value;
#endif
}

// A pixel on the scale of H; Hounsfield units as `lesionsynth.window_hu` rounds them.
__device__ __forceinline__ Real real_of(Pixel p, const Batch& batch) {
#if IMAGE == 3
    float value = (float)p;
    value = value < batch.hu_low ? batch.hu_low : value > batch.hu_high ? batch.hu_high : value;
    return (value - batch.hu_low) / (batch.hu_high - batch.hu_low);
#else
    return value_of(p);
#endif
}

// The value as it goes out where there is no lesion: the very bits that came in, except from Hounsfield units.
__device__ __forceinline__ Result unchanged(Pixel p, Real value) {
#if IMAGE == 3
    return value;
#else
    return p;
#endif
}

__device__ __forceinline__ bool is_outside(Real value, Real low, Real high) {
#if IMAGE == 3
    return false;
#else
    return !(value >= low && value <= high);  // NaN is outside
#endif
}

// What an item's healthy image is compared with.
struct Levels {
    Real tau, low, high;
};

__device__ __forceinline__ Levels levels_of(const Item& item) { return {(Real)item.tau, (Real)item.least, (Real)item.most}; }

__device__ __forceinline__ u32 copy_voxel(const Batch& batch, Pixel p, const Levels& levels, Result* out, bool* strange) {
    Real value = real_of(p, batch);
    *out = unchanged(p, value);
    *strange |= is_outside(value, levels.low, levels.high);
    return value >= levels.tau;
}

constexpr int AHEAD = 4;  // reads under way at once: the copy runs on few threads, beside the other kernels

// Four voxels at a time, where memory is contiguous and the pointers allow it.
__device__ i64 copy_quads(const Batch& batch, int item, i64 voxels, i64 first, i64 step, bool* strange) {
    const Pixel* image = (const Pixel*)batch.image + item * batch.image_strides[0];
    Result* out = (Result*)batch.out + item * voxels;
    u8* target = (u8*)batch.target + item * voxels;
    bool aligned = ((u64)image % alignof(Quad<Pixel>) | (u64)out % alignof(Quad<Result>) | (u64)target % 4) == 0;
    bool contiguous = batch.image_strides[3] == 1 && batch.image_strides[2] == batch.width &&
                      batch.image_strides[1] == (i64)batch.width * batch.height;
    if (!aligned || !contiguous) return 0;
    Levels levels = levels_of(item_of(batch, item));
    i64 quads = voxels / 4;
    for (i64 q0 = first; q0 < quads; q0 += AHEAD * step) {
        Quad<Pixel> in[AHEAD];
#pragma unroll
        for (int k = 0; k < AHEAD; ++k)
            if (q0 + k * step < quads) in[k] = load_once((const Quad<Pixel>*)image + q0 + k * step);
#pragma unroll
        for (int k = 0; k < AHEAD; ++k) {
            if (q0 + k * step >= quads) break;
            Quad<Result> now;
            u32 bright = 0;
#pragma unroll
            for (int c = 0; c < 4; ++c) bright |= copy_voxel(batch, in[k].v[c], levels, &now.v[c], strange) << (8 * c);
            store_once((Quad<Result>*)out + q0 + k * step, now);
            __stcs((u32*)target + q0 + k * step, bright);
        }
    }
    return voxels / 4 * 4;
}

// The pair as if there were no lesion.  Four blocks are 64 registers: `noise_along_x` fits beside two of them.
constexpr int COPY_BLOCKS = IMAGE == 4 ? 3 : 4;  // float64 would spill
KERNEL_OF(COPY_BLOCKS) copy_pair(const Batch* table) {
    const Batch& batch = *table;
    i64 voxels = (i64)batch.depth * batch.height * batch.width;
    i64 thread = (i64)blockIdx.x * THREADS + threadIdx.x, threads = (i64)gridDim.x * THREADS;
    bool strange = false;
    for (int item = 0; item < batch.n_items; ++item) {
        i64 done = copy_quads(batch, item, voxels, thread, threads, &strange);
        const Pixel* image = (const Pixel*)batch.image + item * batch.image_strides[0];
        Levels levels = levels_of(item_of(batch, item));
        for (i64 v = done + thread; v < voxels; v += threads) {
            i64 row = v / batch.width;
            i64 at = row / batch.height * batch.image_strides[1] + row % batch.height * batch.image_strides[2] +
                     v % batch.width * batch.image_strides[3];
            ((u8*)batch.target)[item * voxels + v] =
                (u8)copy_voxel(batch, image[at], levels, (Result*)batch.out + item * voxels + v, &strange);
        }
    }
    if (strange) report(batch, OUTSIDE_RANGE);
}

// beta of eq. 6; the continuous limit where no voxel passes the threshold.
__device__ float beta_of(const Batch& batch, const Lesion& l) {
    const volatile State& s = state_of(batch, l.root);  // see rescale_of
    const Blob& blob = blob_of(batch, l.root);
    u64 passing = s.passing, total = s.total;
    double mean = passing ? (double)total / 67108864.0 / (double)passing : item_of(batch, blob.item).threshold;
    return (float)(blob.mu0 / mean);
}

enum Mode { MAX, MIN, ADD, BLEND };  // MODES of config.py

// A value of the image's range: rounding must not leave it.
__device__ __forceinline__ Real within(Real value, const Item& item) {
    Real least = item.least, most = item.most;
    return value < least ? least : value > most ? most : value;
}

// A voxel of a lesion as it is stored: b is the lesion's brightness, `share` what its weight and edge leave of it.
// No product is fused with a sum: the CPU twin fuses none here.
__device__ __forceinline__ Result blend(const Item& item, float b, float share, Result healthy, Real h) {
    if (item.mode <= MIN) {
        // Compared as it is stored: rounded to the type of the image.
        Result lesion = stored(within((item.mode == MIN ? 1.0f - b : b) * item.span + item.low, item));
        Real value = value_of(lesion);
        return (item.mode == MIN ? value < h : value > h) ? lesion : healthy;
    }
    Real value;
    if (item.mode == ADD) value = h + (Real)(share * b * item.span);
    else value = h + (Real)share * ((Real)(b * item.span + item.low) - h);
    return stored(within(value, item));
}

// Sixty-four words of 32 voxels, a warp each in turn.  Without a soft edge it takes fewer registers.
template <bool SOFT>
__device__ void inject_tile(const Batch& batch, const Lesion& l, i64 number) {
    int i = blob_of(batch, l.root).item, words = words_of(l);
    const Item& item = item_of(batch, i);
    float beta = beta_of(batch, l);
    Members members(batch, l.root);
    i64 all = (i64)l.size[0] * l.size[1] * words;
    u32 changed = 0;
    for (int k = warp_of_thread(); k < INJECT_WORDS; k += WARPS) {
        i64 t = number * INJECT_WORDS + k;
        if (t >= all) break;
        i64 row = t / words;
        int z = (int)(row / l.size[1]), y = (int)(row % l.size[1]);
        int x = ((l.start[2] >> 5) + (int)(t % words)) * WARP;
        u32 bits = members.at(l.start[0] + z, l.start[1] + y, x);
        if (bits >> lane_of_thread() & 1) {
            x += lane_of_thread();
            i64 column = row * l.pitch + l.skip + x - l.start[2];
            float b = field_of(batch, l, 1)[column] * beta;
            b = b < 0.0f ? 0.0f : b > 1.0f ? 1.0f : b;
            float share = (float)blob_of(batch, l.root).weight;
            if (SOFT && item.edge > 0.0f) share *= edge_of(batch, item, l, field_of(batch, l, 0) + column, z);
            i64 at = (((i64)i * batch.depth + l.start[0] + z) * batch.height + l.start[1] + y) * batch.width + x;
            Pixel pixel = ((const Pixel*)batch.image)[i * batch.image_strides[0] + (l.start[0] + z) * batch.image_strides[1] +
                                                      (l.start[1] + y) * batch.image_strides[2] + x * batch.image_strides[3]];
            Real h = real_of(pixel, batch);
            Result now = blend(item, b, share, unchanged(pixel, h), h);
            ((Result*)batch.out)[at] = now;
            ((u8*)batch.target)[at] = 0;
            changed += value_of(now) != h;
        }
    }
    changed = warp_sum(changed);
    if (lane_of_thread() == 0 && changed) atomicAdd(&state_of(batch, l.root).changed, (u64)changed);
}

template <bool SOFT>
__device__ __forceinline__ void inject_lesions(const Batch& batch) {
    i64 tiles = tiles_in(batch, INJECTION);
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = tile_of(batch, INJECTION, t);
        inject_tile<SOFT>(batch, lesion_of(batch, tile.root), tile.number);
    }
}

KERNEL_OF(4) inject(const Batch* table) { inject_lesions<false>(*table); }
KERNEL_OF(3) inject_soft(const Batch* table) { inject_lesions<true>(*table); }

template <int STAGE>
__device__ void one_by_one(const Batch& batch, const Lesion& l, TextureMemory& memory) {
    i64 tiles = tiles_of(batch, l, STAGE);
    for (i64 t = 0; t < tiles; ++t) plain_tile<STAGE>(batch, l.root, t, memory);
    __threadfence();
    __syncthreads();
}

// Lesions whose field found no room, one after another in one block and the plain way: rare, see docs/gpu.md.
KERNEL_OF(2) inject_crowded(const Batch* table) {
    __shared__ union {
        TextureMemory texture;
        EdgeMemory edge;
    } memory;
    const Batch& batch = *table;
    for (int b = 0; b < batch.n_blobs && batch.crowded; ++b) {
        if (!is_lesion(batch, b) || state_of(batch, b).field >= 0) continue;
        Lesion l = lesion_of(batch, b);
        l.field = 0;
        one_by_one<0>(batch, l, memory.texture);
        one_by_one<1>(batch, l, memory.texture);
        one_by_one<2>(batch, l, memory.texture);
        one_by_one<3>(batch, l, memory.texture);
        one_by_one<4>(batch, l, memory.texture);
        one_by_one<5>(batch, l, memory.texture);
        for (i64 t = 0; t < tiles_of(batch, l, SOFTENING); ++t) edge_tile(batch, l, t, memory.edge);
        __threadfence();
        __syncthreads();
        for (i64 t = 0; t < tiles_of(batch, l, INJECTION); ++t) inject_tile<true>(batch, l, t);
        __syncthreads();
    }
}

// The labels of all items: 0 is there already.  Blobs of one lesion write the same into the voxels they share.
KERNEL paint_labels(const Batch* table, int* labels) {
    const Batch& batch = *table;
    for (int task = blockIdx.x; task < batch.n_tasks; task += gridDim.x) {
        int2 at = task_of(batch, task);
        const State& s = state_of(batch, at.x);
        if (at.y >= s.size[0]) continue;
        i64 first = (i64)blob_of(batch, at.x).item * batch.depth;
        int z = s.start[0] + at.y, label = state_of(batch, ((const int*)batch.parents)[at.x]).label;
        for (int t = warp_of_thread(); t < s.size[1] * s.words; t += WARPS) {
            int y = s.start[1] + t / s.words, w = s.word + t % s.words;
            if (box_word(batch, at.x, z, y, w) >> lane_of_thread() & 1)
                ((volatile int*)labels)[((first + z) * batch.height + y) * batch.width + 32 * w + lane_of_thread()] = label;
        }
    }
}
