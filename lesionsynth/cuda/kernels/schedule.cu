// schedule.cu: from joined blobs to lesions, their boxes, and the tiles of every pass.  Twins: cpu/merge.py (the
// numbering), cpu/texture.py (the fields)
//
// One block does this, the last to finish joining: some hundred blobs, and no count ever travels to the host.
enum Stage { ALONG_X, ALONG_Y, ALONG_Z, STAGES_OF_A, INJECTION = 2 * STAGES_OF_A, SOFTENING, STAGES };
constexpr int INJECT_WORDS = 64;  // words of 32 voxels in a tile of the injection
constexpr int EDGE_ROWS = 64;     // the same for a soft edge, one above the other

__device__ __forceinline__ bool is_lesion(const Batch& batch, int b) {
    return ((const int*)batch.parents)[b] == b && state_of(batch, b).lesion_high[0] >= 0;
}

// A lesion's box as the passes see it.  A field has the box's rows, each begun `skip` columns early so that columns
// are aligned to eight voxels of the volume, and padded to `pitch`.
struct Lesion {
    int root, label, pitch, skip;
    int start[3], size[3];
    i64 field;
};

__device__ Lesion lesion_of(const Batch& batch, int root) {
    const State& s = state_of(batch, root);
    Lesion lesion = {root, s.label, s.pitch, s.skip};
    for (int i = 0; i < 3; ++i) {
        lesion.start[i] = s.lesion_low[i];
        lesion.size[i] = s.lesion_high[i] + 1 - s.lesion_low[i];
    }
    lesion.field = s.field;
    return lesion;
}

__device__ __forceinline__ int words_of(const Lesion& l) {
    return ((l.start[2] + l.size[2] - 1) >> 5) - (l.start[2] >> 5) + 1;
}

// Groups of 32 lines, and pieces of a line: a pass has a tile for each pair.
__device__ __forceinline__ int columns_of(const Lesion& l) { return (l.skip + l.size[2] + LINES - 1) / LINES; }
__device__ __forceinline__ i64 groups_of(const Lesion& l, int axis) {
    if (axis == ALONG_X) return ((i64)l.size[0] * l.size[1] + LINES - 1) / LINES;
    return (i64)(axis == ALONG_Y ? l.size[0] : l.size[1]) * columns_of(l);
}
__device__ __forceinline__ int chunks_of(const Batch& batch, const Lesion& l, int stage) {
    int n = l.size[2 - stage % STAGES_OF_A];
    int radius = blob_of(batch, l.root).radius[stage / STAGES_OF_A][2 - stage % STAGES_OF_A];
    int length = tile_length(n, radius, batch.plain);
    return (n + length - 1) / length;
}
__device__ __forceinline__ int edge_chunks(const Lesion& l) { return (l.size[1] + EDGE_ROWS - 1) / EDGE_ROWS; }
__device__ i64 tiles_of(const Batch& batch, const Lesion& l, int stage) {
    if (stage == SOFTENING) {
        bool soft = item_of(batch, blob_of(batch, l.root).item).edge > 0.0f;
        return soft ? (i64)l.size[0] * words_of(l) * edge_chunks(l) : 0;
    }
    if (stage == INJECTION) return ((i64)l.size[0] * l.size[1] * words_of(l) + INJECT_WORDS - 1) / INJECT_WORDS;
    return groups_of(l, stage % STAGES_OF_A) * chunks_of(batch, l, stage);
}

// Point every blob at its root, and give each root its lesion's box.
__device__ void gather_lesions(const Batch& batch) {
    int* parents = (int*)batch.parents;
    for (int b = threadIdx.x; b < batch.n_blobs; b += THREADS) {
        const volatile State& s = state_of(batch, b);
        int root = root_of(parents, b);
        ((volatile int*)parents)[b] = root;  // others may walk over it: it was their way to the same root
        if (s.high[0] < 0) continue;
        for (int i = 0; i < 3; ++i) {
            atomicMin(&state_of(batch, root).lesion_low[i], s.low[i]);
            atomicMax(&state_of(batch, root).lesion_high[i], s.high[i]);
        }
    }
    __threadfence();
    __syncthreads();
}

// Number a lesion among its item's, by its lowest blob.
__device__ int label_of(const Batch& batch, int root) {
    int label = 1;
    for (int b = item_of(batch, blob_of(batch, root).item).first_blob; b < root; ++b) label += is_lesion(batch, b);
    return label;
}

struct Layout {
    i64 volumes[THREADS];
    i64 tiles[STAGES][THREADS];
};

// Lay out the fields of up to 256 lesions, first come first served.
__device__ void lay_out(Batch& batch, int base, int count, const i64* volumes, i64& at) {
    for (int k = 0; k < count; ++k) {
        if (volumes[k] == 0) continue;
        bool room = at + volumes[k] <= batch.capacity;
        state_of(batch, base + k).field = room ? at : -1;
        if (room) at += volumes[k];
        else ++batch.crowded;
    }
}

// First tile of each lesion in a pass: a warp turns counts into sums.
__device__ void number_tiles(const Batch& batch, int stage, int base, int count, const i64* counts, i64& before) {
    i64* first = (i64*)batch.tiles + (i64)stage * (batch.n_blobs + 1) + base;
    for (int k0 = 0; k0 < count; k0 += WARP) {
        int k = k0 + lane_of_thread();
        i64 here = k < count ? counts[k] : 0, sum = inclusive_sum(here);
        if (k < count) first[k] = before + sum - here;
        before += __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
    if (base + count == batch.n_blobs && lane_of_thread() == 0) first[count] = before;
}

__device__ void schedule(Batch& batch, Layout& layout) {
    gather_lesions(batch);
    i64 at = 0, before = 0;
    for (int base = 0; base < batch.n_blobs; base += THREADS) {
        int count = imin(THREADS, batch.n_blobs - base), b = base + threadIdx.x;
        bool lesion = (int)threadIdx.x < count && is_lesion(batch, b);
        __syncthreads();
        layout.volumes[threadIdx.x] = 0;
        if (lesion) {
            State& s = state_of(batch, b);
            s.label = label_of(batch, b);
            s.skip = s.lesion_low[2] & 7;
            s.pitch = round_up(s.skip + s.lesion_high[2] + 1 - s.lesion_low[2], 8);
            Lesion l = lesion_of(batch, b);
            layout.volumes[threadIdx.x] = (i64)l.size[0] * l.size[1] * l.pitch;
        }
        __syncthreads();
        if (threadIdx.x == 0) lay_out(batch, base, count, layout.volumes, at);
        __syncthreads();
        for (int stage = 0; stage < STAGES; ++stage) {
            bool listed = lesion && ((volatile State&)state_of(batch, b)).field >= 0;
            layout.tiles[stage][threadIdx.x] = listed ? tiles_of(batch, lesion_of(batch, b), stage) : 0;
        }
        __syncthreads();
        int stage = warp_of_thread();
        if (stage < STAGES) number_tiles(batch, stage, base, count, layout.tiles[stage], before);
    }
}

// The lesion and the tile of it that tile `t` of a pass is.
struct Tile {
    int root;
    i64 number;
};

__device__ __forceinline__ i64 tiles_in(const Batch& batch, int stage) {
    return ((const i64*)batch.tiles)[(i64)(stage + 1) * (batch.n_blobs + 1) - 1];
}
__device__ __forceinline__ Tile tile_of(const Batch& batch, int stage, i64 t) {
    const i64* first = (const i64*)batch.tiles + (i64)stage * (batch.n_blobs + 1);
    int root = last_at_most([=](int k) { return first[k]; }, batch.n_blobs, t);
    return {root, t - first[root]};
}
