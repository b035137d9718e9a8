// merge.cu: blobs that touch become one lesion.  Twin: cpu/merge.py; oracle: tests/oracles.py
//
// A task is a slice of a blob, held against every later blob of its item whose tight box is within reach: 32 voxels a
// word, so the work is the overlap of the boxes in bits.  The union-find is over blobs.
__device__ __forceinline__ u32 box_word(const Batch& batch, int b, int z, int y, int w) {
    const State& s = state_of(batch, b);
    z -= s.start[0];
    y -= s.start[1];
    w -= s.word;
    if (z < 0 || y < 0 || w < 0 || z >= s.size[0] || y >= s.size[1] || w >= s.words) return 0;
    return ((const u32*)batch.bits)[blob_of(batch, b).bits + ((i64)z * s.size[1] + y) * s.words + w];
}

__device__ __forceinline__ bool within_reach(const State& a, const State& b, int z) {
    if (b.high[0] < 0 || b.low[0] > z + 1 || b.high[0] < z - 1) return false;
    return b.low[1] <= a.high[1] + 1 && a.low[1] <= b.high[1] + 1 && b.low[2] <= a.high[2] + 1 && a.low[2] <= b.high[2] + 1;
}

// Whether a word of blob b near row (z, y) has a voxel next to, or in, the row of blob a.
__device__ bool touches(const Batch& batch, int a, int b, int z, int y, int w, int connectivity) {
    u32 here = box_word(batch, a, z, y, w), left = box_word(batch, a, z, y, w - 1), right = box_word(batch, a, z, y, w + 1);
    u32 wide = here | here << 1 | here >> 1 | left >> 31 | right << 31;
    if (wide == 0) return false;
    for (int dz = -1; dz <= 1; ++dz) {
        for (int dy = -1; dy <= 1; ++dy) {
            int steps = (dz != 0) + (dy != 0);  // along z and y; one along x is left within the neighbourhood
            int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
            if (steps > most) continue;
            if ((steps < most ? wide : here) & box_word(batch, b, z + dz, y + dy, w)) return true;
        }
    }
    return false;
}

__device__ void join_blob(const Batch& batch, int a, int b, int z) {
    const State &one = state_of(batch, a), &other = state_of(batch, b);
    int y0 = imax(one.low[1], other.low[1] - 1), rows = imin(one.high[1], other.high[1] + 1) - y0 + 1;
    int w0 = imax(one.low[2] - 1, other.low[2]) >> 5, words = (imin(one.high[2] + 1, other.high[2]) >> 5) - w0 + 1;
    int connectivity = item_of(batch, blob_of(batch, a).item).connectivity;
    for (int t = threadIdx.x; t < rows * words; t += THREADS) {
        if (touches(batch, a, b, z, y0 + t / words, w0 + t % words, connectivity)) {
            unite((int*)batch.parents, a, b);
            return;
        }
    }
}

KERNEL_OF(4) join_blobs(Batch* table) {
    __shared__ Layout layout;
    __shared__ int near[THREADS], count, last;
    Batch& batch = *table;
    for (int task = blockIdx.x; task < batch.n_tasks; task += gridDim.x) {
        int2 at = task_of(batch, task);
        const State& state = state_of(batch, at.x);
        if (at.y >= state.size[0]) continue;
        int z = state.start[0] + at.y;
        if (z < state.low[0] || z > state.high[0]) continue;
        const Item& item = item_of(batch, blob_of(batch, at.x).item);
        for (int base = at.x + 1; base < item.first_blob + item.blobs; base += THREADS) {
            int b = base + threadIdx.x;
            __syncthreads();
            if (threadIdx.x == 0) count = 0;
            __syncthreads();
            if (b < item.first_blob + item.blobs && within_reach(state, state_of(batch, b), z)) near[atomicAdd(&count, 1)] = b;
            __syncthreads();
            for (int k = 0; k < count; ++k) join_blob(batch, at.x, near[k], z);
        }
    }
    if (is_last_block(&table->ticket, gridDim.x, &last)) schedule(batch, layout);
}
