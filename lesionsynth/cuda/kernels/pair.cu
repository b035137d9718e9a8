// pair.cu: the pair (PAPER.md eq. 1 and 9), exactly.  Twin: cpu/inject.py
//     A = max(H, B_j) in G_j and H elsewhere;  GT = (H >= tau) & ~G
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
__device__ __forceinline__ Result stored(float b) {
#if IMAGE == 1
    return float_to_half(b);
#elif IMAGE == 2
    u32 bits = __float_as_uint(b);  // to nearest, ties to even; b is never NaN
    return (u16)((bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16);
#else
    return b;
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

__device__ __forceinline__ bool outside_unit(Real value) {
#if IMAGE == 3
    return false;
#else
    return !(value >= (Real)0 && value <= (Real)1);  // NaN is outside
#endif
}

__device__ __forceinline__ u32 copy_voxel(const Batch& batch, Pixel p, Real tau, Result* out, bool* strange) {
    Real value = real_of(p, batch);
    *out = unchanged(p, value);
    *strange |= outside_unit(value);
    return value >= tau;
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
    Real tau = (Real)item_of(batch, item).tau;
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
            for (int c = 0; c < 4; ++c) bright |= copy_voxel(batch, in[k].v[c], tau, &now.v[c], strange) << (8 * c);
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
        Real tau = (Real)item_of(batch, item).tau;
        for (i64 v = done + thread; v < voxels; v += threads) {
            i64 row = v / batch.width;
            i64 at = row / batch.height * batch.image_strides[1] + row % batch.height * batch.image_strides[2] +
                     v % batch.width * batch.image_strides[3];
            ((u8*)batch.target)[item * voxels + v] =
                (u8)copy_voxel(batch, image[at], tau, (Result*)batch.out + item * voxels + v, &strange);
        }
    }
    if (strange) report(batch, OUTSIDE_UNIT);
}

// beta of eq. 6; the continuous limit where no voxel passes the threshold.
__device__ float beta_of(const Batch& batch, const Lesion& l) {
    const volatile State& s = state_of(batch, l.root);  // see rescale_of
    const Blob& blob = blob_of(batch, l.root);
    u64 passing = s.passing, total = s.total;
    double mean = passing ? (double)total / 67108864.0 / (double)passing : item_of(batch, blob.item).threshold;
    return (float)(blob.mu0 / mean);
}

// Sixty-four words of 32 voxels, a warp each in turn.
__device__ void inject_tile(const Batch& batch, const Lesion& l, i64 number) {
    int item = blob_of(batch, l.root).item, words = words_of(l);
    float beta = beta_of(batch, l);
    Members members(batch, l.root);
    i64 all = (i64)l.size[0] * l.size[1] * words;
    for (int k = warp_of_thread(); k < INJECT_WORDS; k += WARPS) {
        i64 t = number * INJECT_WORDS + k;
        if (t >= all) return;
        i64 row = t / words;
        int z = (int)(row / l.size[1]), y = (int)(row % l.size[1]);
        int x = ((l.start[2] >> 5) + (int)(t % words)) * WARP;
        u32 bits = members.at(l.start[0] + z, l.start[1] + y, x);
        if (bits >> lane_of_thread() & 1) {
            x += lane_of_thread();
            float b = field_of(batch, l, 1)[row * l.pitch + l.skip + x - l.start[2]] * beta;
            b = b < 0.0f ? 0.0f : b > 1.0f ? 1.0f : b;
            Result lesion = stored(b);
            i64 at = (((i64)item * batch.depth + l.start[0] + z) * batch.height + l.start[1] + y) * batch.width + x;
            Pixel pixel = ((const Pixel*)batch.image)[item * batch.image_strides[0] + (l.start[0] + z) * batch.image_strides[1] +
                                                      (l.start[1] + y) * batch.image_strides[2] + x * batch.image_strides[3]];
            // Compared as it is stored: rounded to the type of the image.
            if (value_of(lesion) > real_of(pixel, batch)) ((Result*)batch.out)[at] = lesion;
            ((u8*)batch.target)[at] = 0;
        }
    }
}

KERNEL inject(const Batch* table) {
    const Batch& batch = *table;
    i64 tiles = tiles_in(batch, INJECTION);
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = tile_of(batch, INJECTION, t);
        inject_tile(batch, lesion_of(batch, tile.root), tile.number);
    }
}

template <int STAGE>
__device__ void one_by_one(const Batch& batch, const Lesion& l, TextureMemory& memory) {
    i64 tiles = tiles_of(batch, l, STAGE);
    for (i64 t = 0; t < tiles; ++t) plain_tile<STAGE>(batch, l.root, t, memory);
    __threadfence();
    __syncthreads();
}

// Lesions whose field found no room, one after another in one block and the plain way: rare, see docs/gpu.md.
KERNEL inject_crowded(const Batch* table) {
    __shared__ TextureMemory memory;
    const Batch& batch = *table;
    for (int b = 0; b < batch.n_blobs && batch.crowded; ++b) {
        if (!is_lesion(batch, b) || state_of(batch, b).field >= 0) continue;
        Lesion l = lesion_of(batch, b);
        l.field = 0;
        one_by_one<0>(batch, l, memory);
        one_by_one<1>(batch, l, memory);
        one_by_one<2>(batch, l, memory);
        one_by_one<3>(batch, l, memory);
        one_by_one<4>(batch, l, memory);
        one_by_one<5>(batch, l, memory);
        for (i64 t = 0; t < tiles_of(batch, l, INJECTION); ++t) inject_tile(batch, l, t);
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
