// label.cu: connected components, numbered as scipy.ndimage.label does.  Twin: cpu/label.py; oracle: SciPy
//
// As in Playne and Hawick (2018) and Hennequin, Lacassagne, Cabaret and Meunier (2018), in three dimensions:
// the mask is packed, a node of the union-find is a run of voxels within a word, and a node's name is its
// first voxel.  Two runs of neighbouring rows touch in one stretch, found by shifting words, and are united
// once.  Parents are never greater than their children, so roots in ascending order are components in C order
// of their first voxels; sums of roots number them.
//
// The table is the label volume itself, in turn
//     label_runs, label_unite   parent of each node
//     label_count               its root, and how many roots each 256 words hold; the last block sums them up
//     label_number              roots: minus their number
//     label_paint               labels
// Other entries are never read.  Floor of all: 1 byte read, 4 written; the rest works on bits and on nodes.
constexpr int LOOK_BACK = 16;  // words: a longer run hangs on itself, so that no thread walks a whole row

struct LabelState {
    u32 ticket, components;
};

// Number of a node's component behind label_number; its root may be painted already.
__device__ __forceinline__ int number_of(const volatile int* table, i64 node) {
    int entry = table[node];
    return entry < 0 ? -entry : abs(table[entry]);
}

// Parent of every node: itself, or where the run goes on from the word before, the node where it began.
// Floor: 1/8 read, 4 bytes a node written.
KERNEL label_runs(const u32* bits, int* parent, LabelState* state, i64 rows, int width) {
    int words = words_of(width);
    if (first_task() == 0) state->ticket = 0;
    for (i64 t = first_task(); t < rows * words; t += task_step()) {
        u32 rest = bits[t];
        if (rest == 0) continue;
        int w;
        i64 row = divide(t, words, &w), first = row * width + WARP * w;
        if (w > 0 && (rest & 1u) && bits[t - 1] >> 31) {
            int k = 1;
            while (k < imin(w, LOOK_BACK) && bits[t - k] == ALL_LANES && bits[t - k - 1] >> 31) ++k;
            parent[first] = (int)(first - WARP * k + run_start(bits[t - k], WARP - 1));
            rest &= ~lowest_run(rest);
        }
        for (; rest; rest &= ~lowest_run(rest)) {
            int node = (int)first + __ffs(rest) - 1;
            parent[node] = node;
        }
    }
}

// Unite the nodes of a word and of the same word of another row, whose bits 0 are voxels `first` and `other`.
__device__ __forceinline__ void join_words(int* parent, const Triple& a, int first, const Triple& b,
                                           int other, bool diagonal) {
    u32 both = a.here & b.here;
    u32 starts = both & ~(both << 1 | (a.before & b.before) >> 31);
    for (; starts; starts &= starts - 1) {
        int bit = __ffs(starts) - 1;
        unite(parent, first + run_start(a.here, bit), other + run_start(b.here, bit));
    }
    if (!diagonal) return;
    // Runs that touch without a stretch in common: one begins right behind the other's end.
    u32 behind = a.here & b.lower() & ~(a.lower() | b.here);
    u32 ahead = a.here & b.upper() & ~(a.upper() | b.here);
    for (; behind; behind &= behind - 1) {
        int bit = __ffs(behind) - 1;
        int node = bit > 0 ? run_start(b.here, bit - 1) : run_start(b.before, WARP - 1) - WARP;
        unite(parent, first + bit, other + node);
    }
    for (; ahead; ahead &= ahead - 1) {
        int bit = __ffs(ahead) - 1;
        unite(parent, first + run_start(a.here, bit), other + bit + 1);
    }
}

// A thread is a word; the four earlier rows are joined once, from the later one.
// Floor: 1/8 read; a union takes an atomic and some four dependent reads in the L2 cache.
KERNEL_OF(4) label_unite(const u32* bits, int* parent, int depth, int height, int width, int connectivity) {
    int words = words_of(width);
    for (i64 t = first_task(); t < (i64)depth * height * words; t += task_step()) {
        int w, y;
        i64 row = divide(t, words, &w), z = divide(row, height, &y);
        Triple here = triple_of(bits, row, w, words);
        if (here.here == 0) continue;
#pragma unroll 1
        for (int k = 0; k < 4; ++k) {
            int dz = k < 3 ? -1 : 0, dy = k < 3 ? k - 1 : -1, apart = (dz != 0) + (dy != 0);
            if (z + dz < 0 || y + dy < 0 || y + dy >= height || (connectivity == 6 && apart > 1)) continue;
            i64 other = row + (i64)dz * height + dy;
            Triple there = triple_of(bits, other, w, words);
            bool diagonal = connectivity == 26 || (connectivity == 18 && apart == 1);
            int first = (int)(row * width) + WARP * w, base = (int)(other * width) + WARP * w;
            join_words(parent, here, first, there, base, diagonal);
        }
    }
}

// The plain way, for tests: every voxel is a node, and has up to 13 earlier neighbours.
KERNEL label_voxels_plain(int* parent, LabelState* state, i64 voxels) {
    if (first_task() == 0) state->ticket = 0;
    for (i64 i = first_task(); i < voxels; i += task_step()) parent[i] = (int)i;
}

KERNEL label_unite_plain(const u8* mask, int* parent, int depth, int height, int width, int connectivity) {
    int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    for (i64 i = first_task(); i < (i64)depth * height * width; i += task_step()) {
        int x = (int)(i % width), y = (int)(i / width % height), z = (int)(i / width / height);
        for (int n = 0; n < 13 && mask[i]; ++n) {
            int dz = n / 9 - 1, dy = n / 3 % 3 - 1, dx = n % 3 - 1;
            bool inside = z + dz >= 0 && y + dy >= 0 && y + dy < height && x + dx >= 0 && x + dx < width;
            i64 other = i + ((i64)dz * height + dy) * width + dx;
            bool near = (dz != 0) + (dy != 0) + (dx != 0) <= most;
            if (inside && near && mask[other]) unite(parent, (int)i, (int)other);
        }
    }
}

// Sum over the threads before this one, and over all.  `sums` is shared memory, a word a warp.
__device__ __forceinline__ u32 sum_before(u32 n, u32* sums, u32* all) {
    u32 sum = inclusive_sum(n), before = 0;
    __syncthreads();  // the last sums are read
    if (lane_of_thread() == WARP - 1) sums[warp_of_thread()] = sum;
    __syncthreads();
    *all = 0;
    for (int w = 0; w < WARPS; ++w) {
        if (w < warp_of_thread()) before += sums[w];
        *all += sums[w];
    }
    return before + sum - n;
}

// Turn counts into the sums before them, one block.
__device__ void scan_counts(volatile u32* counts, i64 chunks, LabelState* state, u32* sums) {
    i64 share = (chunks + THREADS - 1) / THREADS;
    i64 first = lmin(threadIdx.x * share, chunks), end = lmin(first + share, chunks);
    u32 sum = 0, all;
    for (i64 i = first; i < end; ++i) sum += counts[i];
    u32 before = sum_before(sum, sums, &all);
    for (i64 i = first; i < end; ++i) {
        u32 here = counts[i];
        counts[i] = before;
        before += here;
    }
    if (threadIdx.x == 0) state->components = all;
}

// Point the nodes of a word at their roots; returns how many are roots themselves.
__device__ __forceinline__ u32 flatten(volatile int* parent, u32 word, int first) {
    u32 roots = 0;
    for (u32 rest = word; rest; rest &= ~lowest_run(rest)) {
        int node = first + __ffs(rest) - 1, root = root_of(parent, node);
        if (root == node) ++roots;
        else parent[node] = root;
    }
    return roots;
}

// Floor: 1/8 and the nodes read.
KERNEL label_count(const u32* bits, int* parent, u32* counts, LabelState* state, i64 rows, int width) {
    __shared__ u32 sums[WARPS];
    __shared__ int last;
    i64 words = rows * words_of(width), chunks = (words + THREADS - 1) / THREADS;
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        i64 t = chunk * THREADS + threadIdx.x;
        u32 roots = t < words && bits[t] ? flatten(parent, bits[t], (int)first_voxel(t, width)) : 0u, all;
        sum_before(roots, sums, &all);
        if (threadIdx.x == 0) counts[chunk] = all;
    }
    if (is_last_block(&state->ticket, gridDim.x, &last)) scan_counts(counts, chunks, state, sums);
}

// Floor: 1/8 and the nodes read.
KERNEL label_number(const u32* bits, int* table, const u32* counts, i64 rows, int width) {
    __shared__ u32 sums[WARPS];
    i64 words = rows * words_of(width), chunks = (words + THREADS - 1) / THREADS;
    for (i64 chunk = blockIdx.x; chunk < chunks; chunk += gridDim.x) {
        i64 t = chunk * THREADS + threadIdx.x;
        u32 word = t < words ? bits[t] : 0u, roots = 0, all;
        int first = word ? (int)first_voxel(t, width) : 0;
        for (u32 rest = word; rest; rest &= ~lowest_run(rest)) {
            int node = first + __ffs(rest) - 1;
            roots += table[node] == node;
        }
        int number = (int)(counts[chunk] + sum_before(roots, sums, &all));
        for (u32 rest = word; rest && roots; rest &= ~lowest_run(rest)) {
            int node = first + __ffs(rest) - 1;
            if (table[node] == node) table[node] = -++number;
        }
    }
}

// A warp is a word: lanes learn their node's number before any writes over it.  Floor: 1/8 read, 4 written.
KERNEL label_paint(const u32* bits, int* table, i64 rows, int width) {
    int words = words_of(width);
    for (i64 t = first_warp_task(); t < rows * words; t += warp_task_step()) {
        int w, lane = lane_of_thread(), number = 0;
        u32 word = bits[t];
        i64 row = divide(t, words, &w), first = row * width + WARP * w;
        if (word >> lane & 1u) number = number_of(table, first + run_start(word, lane));
        __syncwarp();
        // Others may read the number of a root that is painted: it stays, but for the sign.
        if (WARP * w + lane < width) ((volatile int*)table)[first + lane] = number;
    }
}

// Growth until nothing changes: of the components of seed or room, those that hold a voxel of the seed. Their
// roots are marked with -1 behind label_count.  Floor: 2/8 and the nodes read.
KERNEL grow_mark(const u32* seed, const u32* both, int* table, i64 rows, int width) {
    volatile int* roots = table;
    for (i64 t = first_task(); t < rows * words_of(width); t += task_step()) {
        u32 word = both[t], wanted = seed[t];
        if (wanted == 0) continue;
        i64 first = first_voxel(t, width);
        for (; word; word &= ~lowest_run(word)) {
            if ((lowest_run(word) & wanted) == 0) continue;
            i64 node = first + __ffs(word) - 1;
            int root = roots[node];
            roots[root < 0 ? node : root] = -1;  // a marked node is a root itself
        }
    }
}

// In place.  Floor: 1/8 and the nodes read, 1/8 written.
KERNEL grow_select(u32* both, const int* table, i64 rows, int width) {
    for (i64 t = first_task(); t < rows * words_of(width); t += task_step()) {
        u32 word = both[t], kept = 0;
        if (word == 0) continue;
        i64 first = first_voxel(t, width);
        for (u32 rest = word; rest; rest &= ~lowest_run(rest)) {
            int root = table[first + __ffs(rest) - 1];
            if (root < 0 || table[root] < 0) kept |= lowest_run(rest);
        }
        both[t] = kept;
    }
}
