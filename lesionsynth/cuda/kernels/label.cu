// label.cu: connected components in three dimensions.  Twin: cpu/label.py; oracle: scipy.ndimage.label
//
// Runs within words of 32 voxels, by ballot, are united with those of earlier rows once for each maximal overlap
// (runs: Hennequin et al., "A new direct connected component labeling and analysis algorithm for GPUs", DASIP 2018;
// lock-free union-find by atomicMin: Oliveira and Lotufo, SIBGRAPI 2010; Playne and Hawick, TPDS 2018). The parent of
// a run stands at its first voxel. Roots are then numbered in C order. Floor: a byte a voxel read, four written;
// parents are another four written and read.
struct Shape {
    int depth, height, width, words;  // words of a row
};
__device__ __forceinline__ Shape shape_of(int depth, int height, int width) { return {depth, height, width, (width + 31) / 32}; }
__device__ __forceinline__ i64 rows_of(const Shape& s) { return (i64)s.depth * s.height; }

// First voxel of the run that bit b of a word is in.
__device__ __forceinline__ int run_start(u32 word, int b) {
    u32 gaps = ~word & ((1u << b) - 1u);
    return 32 - __clz(gaps);
}
__device__ __forceinline__ u32 starts_of(u32 word) { return word & ~(word << 1); }

KERNEL pack_bits(const u8* mask, int depth, int height, int width, u32* bits) {
    Shape s = shape_of(depth, height, width);
    i64 warps = (i64)gridDim.x * WARPS, words = rows_of(s) * s.words;
    for (i64 w = (i64)blockIdx.x * WARPS + warp_of_thread(); w < words; w += warps) {
        i64 row = w / s.words;
        int x = (int)(w % s.words) * 32 + lane_of_thread();
        u32 word = __ballot_sync(ALL_LANES, x < width && mask[row * width + x] != 0);
        if (lane_of_thread() == 0) bits[w] = word;
    }
}

KERNEL unpack_bits(const u32* bits, int depth, int height, int width, u8* mask) {
    Shape s = shape_of(depth, height, width);
    i64 voxels = rows_of(s) * width;
    for (i64 v = (i64)blockIdx.x * THREADS + threadIdx.x; v < voxels; v += (i64)gridDim.x * THREADS) {
        int x = (int)(v % width);
        mask[v] = bits[v / width * s.words + x / 32] >> (x & 31) & 1u;
    }
}

// Every run its own parent; `each_voxel` makes every voxel one, for the plain way.
KERNEL begin_runs(const u32* bits, int depth, int height, int width, int each_voxel, int* parents) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words;
    for (i64 w = (i64)blockIdx.x * THREADS + threadIdx.x; w < words; w += (i64)gridDim.x * THREADS) {
        int first = (int)(w / s.words * width + w % s.words * 32);
        u32 left = each_voxel ? bits[w] : starts_of(bits[w]);
        for (; left; left &= left - 1u) parents[first + __ffs(left) - 1] = first + __ffs(left) - 1;
    }
}

// A word of a row and its neighbours.
struct Three {
    u32 here, before, after;
};
__device__ __forceinline__ Three three_of(const u32* row, int w, int words) {
    return {row[w], w > 0 ? row[w - 1] : 0u, w + 1 < words ? row[w + 1] : 0u};
}
__device__ __forceinline__ u32 shifted_up(const Three& t) { return t.here << 1 | t.before >> 31; }    // voxel x - 1 at x
__device__ __forceinline__ u32 shifted_down(const Three& t) { return t.here >> 1 | t.after << 31; }  // voxel x + 1 at x

// Unite the runs of two rows that `meet` says: voxel x of one touches voxel x + dx of the other.
__device__ void unite_runs(int* parents, u32 meet, const Three& one, i64 first, const Three& other, i64 other_first, int dx) {
    while (meet) {
        int x = __ffs(meet) - 1, y = x + dx;
        u32 word = y < 0 ? other.before : y > 31 ? other.after : other.here;
        int base = y < 0 ? -32 : y > 31 ? 32 : 0;
        unite(parents, (int)(first + run_start(one.here, x)), (int)(other_first + base + run_start(word, y - base)));
        u32 rest = ~(meet >> x);  // the segment ends at its first zero
        int length = rest ? __ffs(rest) - 1 : 32;
        meet = x + length >= 32 ? 0u : meet >> (x + length) << (x + length);
    }
}

KERNEL_OF(4) join_runs(const u32* bits, int depth, int height, int width, int connectivity, int* parents) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words;
    int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < words; t += (i64)gridDim.x * THREADS) {
        i64 row = t / s.words;
        int w = (int)(t % s.words), z = (int)(row / height), y = (int)(row % height);
        Three one = three_of(bits + row * s.words, w, s.words);
        if (one.here == 0) continue;
        i64 first = row * width + 32 * w;
        if (one.here & one.before >> 31) unite_runs(parents, 1u, one, first, one, first, -1);
        for (int k = 0; k < 4; ++k) {
            int dz = k == 0 ? 0 : -1, dy = k == 0 ? -1 : k - 2, steps = (dz != 0) + (dy != 0);
            if (z + dz < 0 || y + dy < 0 || y + dy >= height || steps > most) continue;
            i64 other_row = row + (i64)dz * height + dy;
            Three other = three_of(bits + other_row * s.words, w, s.words);
            i64 other_first = other_row * width + 32 * w;
            unite_runs(parents, one.here & other.here, one, first, other, other_first, 0);
            if (steps == most) continue;
            // Diagonals along x count where neither the straight neighbour nor the next voxel of the run has met it.
            u32 alone = one.here & ~other.here;
            unite_runs(parents, alone & shifted_up(other) & ~shifted_up(one), one, first, other, other_first, -1);
            unite_runs(parents, alone & shifted_down(other) & ~shifted_down(one), one, first, other, other_first, 1);
        }
    }
}

// The plain way: every voxel with its earlier neighbours.
KERNEL join_voxels(const u8* mask, int depth, int height, int width, int connectivity, int* parents) {
    int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    i64 voxels = (i64)depth * height * width;
    for (i64 v = (i64)blockIdx.x * THREADS + threadIdx.x; v < voxels; v += (i64)gridDim.x * THREADS) {
        if (!mask[v]) continue;
        int x = (int)(v % width), y = (int)(v / width % height), z = (int)(v / width / height);
        for (int k = 0; k < 13; ++k) {  // of the 27 in C order, those before the middle
            int dz = k / 9 - 1, dy = k / 3 % 3 - 1, dx = k % 3 - 1;
            if ((dz != 0) + (dy != 0) + (dx != 0) > most) continue;
            if (z + dz < 0 || y + dy < 0 || y + dy >= height || x + dx < 0 || x + dx >= width) continue;
            i64 u = v + ((i64)dz * height + dy) * width + dx;
            if (mask[u]) unite(parents, (int)v, (int)u);
        }
    }
}

// Point every run at its root, and count the roots of each chunk of words.
constexpr int CHUNK_WORDS = 4096;

KERNEL flatten_runs(const u32* bits, int depth, int height, int width, int* parents, u32* counts) {
    __shared__ u32 count;
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words, chunks = (words + CHUNK_WORDS - 1) / CHUNK_WORDS;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        __syncthreads();
        if (threadIdx.x == 0) count = 0;
        __syncthreads();
        for (i64 w = c * CHUNK_WORDS + threadIdx.x; w < lmin((c + 1) * CHUNK_WORDS, words); w += THREADS) {
            int first = (int)(w / s.words * width + w % s.words * 32);
            u32 roots = 0;
            for (u32 left = starts_of(bits[w]); left; left &= left - 1u) {
                int at = first + __ffs(left) - 1, root = root_of(parents, at);
                // A root keeps pointing at itself; others may be shortened while their neighbours look.
                if (root == at) ++roots;
                else parents[at] = root;
            }
            if (roots) atomicAdd(&count, roots);
        }
        __syncthreads();
        if (threadIdx.x == 0) counts[c] = count;
    }
}

// Sums of `values` over the threads before this one, and *total over all.  `work` is shared memory.
__device__ u32 sum_before(u32 value, u32* work, u32* total) {
    u32 sum = value;
    for (int d = 1; d < WARP; d *= 2) {
        u32 other = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane_of_thread() >= d) sum += other;
    }
    __syncthreads();
    if (lane_of_thread() == WARP - 1) work[warp_of_thread()] = sum;
    __syncthreads();
    u32 before = 0, all = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp_of_thread()) before += work[w];
        all += work[w];
    }
    *total = all;
    return before + sum - value;
}

// Turn counts into the roots before each chunk; one block.
KERNEL number_chunks(u32* counts, int chunks, u32* total) {
    __shared__ u32 work[WARPS];
    u32 before = 0, all;
    for (int c0 = 0; c0 < chunks; c0 += THREADS) {
        int c = c0 + threadIdx.x;
        u32 here = c < chunks ? counts[c] : 0u, sum = sum_before(here, work, &all);
        if (c < chunks) counts[c] = before + sum;
        before += all;
    }
    if (threadIdx.x == 0) *total = before;
}

// Give roots their numbers, as the negative of it: runs that point at a root find it there.
KERNEL number_roots(const u32* bits, int depth, int height, int width, const u32* counts, int* parents) {
    __shared__ u32 work[WARPS];
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words, chunks = (words + CHUNK_WORDS - 1) / CHUNK_WORDS;
    for (i64 c = blockIdx.x; c < chunks; c += gridDim.x) {
        u32 before = counts[c], all;
        for (i64 w0 = c * CHUNK_WORDS; w0 < lmin((c + 1) * CHUNK_WORDS, words); w0 += THREADS) {
            i64 w = w0 + threadIdx.x;
            int first = (int)(w / s.words * width + w % s.words * 32);
            u32 starts = w < words ? starts_of(bits[w]) : 0u, roots = 0;
            for (u32 left = starts; left; left &= left - 1u) roots += parents[first + __ffs(left) - 1] == first + __ffs(left) - 1;
            u32 number = before + sum_before(roots, work, &all);
            for (u32 left = starts; left; left &= left - 1u) {
                int at = first + __ffs(left) - 1;
                if (parents[at] == at) parents[at] = -(int)(++number);
            }
            before += all;
        }
    }
}

__device__ __forceinline__ int number_at(const int* parents, i64 start) {
    int p = parents[start];
    return p < 0 ? -p : -parents[p];
}

KERNEL write_labels(const u32* bits, int depth, int height, int width, const int* parents, int* labels) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words, warps = (i64)gridDim.x * WARPS;
    for (i64 w = (i64)blockIdx.x * WARPS + warp_of_thread(); w < words; w += warps) {
        i64 first = w / s.words * width + w % s.words * 32;
        int x = (int)(w % s.words) * 32 + lane_of_thread();
        u32 word = bits[w];
        bool on = word >> lane_of_thread() & 1;
        if (x < width) labels[first + lane_of_thread()] = on ? number_at(parents, first + run_start(word, lane_of_thread())) : 0;
    }
}
