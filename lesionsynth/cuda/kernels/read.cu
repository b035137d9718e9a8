// read.cu: the mask as bits, and where blobs go.  Twins: cpu/engine/bits.py, cpu/place.py
// Floor of read_mask: a byte a voxel read, a bit written.
enum Status { EMPTY_MASK, NOT_BINARY, OUTSIDE_RANGE, LATTICE_TOO_LARGE };

__device__ __forceinline__ void report(const Batch& batch, Status what) { ((volatile u32*)batch.status)[what] = 1u; }
__device__ __forceinline__ Item& item_of(const Batch& batch, int i) { return ((Item*)batch.items)[i]; }
__device__ __forceinline__ const Blob& blob_of(const Batch& batch, int b) { return ((const Blob*)batch.blobs)[b]; }
__device__ __forceinline__ State& state_of(const Batch& batch, int b) { return ((State*)batch.states)[b]; }

// Rows of the mask's bits, and their counts: (item, z, y).
__device__ __forceinline__ u32* lungs_of(const Batch& batch, i64 row) { return (u32*)batch.lungs + row * batch.row_words; }

// Sixteen bytes of 0 or 1 as sixteen bits.
__device__ __forceinline__ u32 bits_of(uint4 bytes, u32* strange) {
    *strange |= (bytes.x | bytes.y | bytes.z | bytes.w) & 0xFEFEFEFEu;
    // Bit 8 k times 2^(24 - 7 k) is bit 24 + k, and no two products share a bit.
    u32 a = ((bytes.x & 0x01010101u) * 0x01020408u) >> 24, b = ((bytes.y & 0x01010101u) * 0x01020408u) >> 24;
    u32 c = ((bytes.z & 0x01010101u) * 0x01020408u) >> 24, d = ((bytes.w & 0x01010101u) * 0x01020408u) >> 24;
    return a | b << 4 | c << 8 | d << 12;
}

// Pack a row of the mask, a whole warp; returns its voxels.
__device__ u32 pack_row(const u8* bytes, i64 step, int width, u32* words, u32* strange) {
    int lane = lane_of_thread(), n_words = (width + 31) / 32;
    bool wide = step == 1 && ((u64)bytes & 15) == 0;
    u32 count = 0;
    for (int x0 = 0; x0 < width; x0 += 16 * WARP) {
        int x = x0 + 16 * lane;
        u32 half = 0;
        if (wide && x + 16 <= width) {
            half = bits_of(*(const uint4*)(bytes + x), strange);
        } else {
            for (int k = 0; k < 16 && x + k < width; ++k) {
                u32 value = bytes[(x + k) * step];
                *strange |= value & 0xFEu;
                half |= (value & 1u) << k;
            }
        }
        u32 word = half | __shfl_down_sync(ALL_LANES, half, 1) << 16;
        if ((lane & 1) == 0 && x / 32 < n_words) words[x / 32] = word;
        count += __popc(half);
    }
    return warp_sum(count);
}

// Sums over equal shares of some counts, one for each thread of the block.  A warp takes eight shares at a time: lanes
// read beside each other, with eight loads under way, and eight sums over lanes cost nine exchanges: three that halve
// the shares a lane holds, then two among the four lanes that hold the same.
__device__ void sum_shares(const volatile u32* counts, int n, int share, i64* sums) {
    constexpr int SHARES = 8;
    for (int first = SHARES * warp_of_thread(); first < THREADS; first += SHARES * WARPS) {
        u32 sum[SHARES] = {};
#pragma unroll 1
        for (int r = lane_of_thread(); r < share; r += WARP) {
            u32 at = (u32)first * share + r;
#pragma unroll
            for (int k = 0; k < SHARES; ++k, at += share)
                if (at < (u32)n) sum[k] += counts[at];
        }
#pragma unroll
        for (int half = SHARES / 2; half; half /= 2) {
            bool upper = lane_of_thread() & half;
#pragma unroll
            for (int k = 0; k < half; ++k) {
                u32 given = upper ? sum[k] : sum[k + half], kept = upper ? sum[k + half] : sum[k];
                sum[k] = kept + __shfl_xor_sync(ALL_LANES, given, half);
            }
        }
        for (int d = SHARES; d < WARP; d *= 2) sum[0] += __shfl_xor_sync(ALL_LANES, sum[0], d);
        if (lane_of_thread() < SHARES) sums[first + lane_of_thread()] = sum[0];
    }
    __syncthreads();
}

// Inclusive sums over the block's threads, in place.
__device__ void scan_block(i64* values) {
    for (int d = 1; d < THREADS; d *= 2) {
        i64 other = (int)threadIdx.x >= d ? values[threadIdx.x - d] : 0;
        __syncthreads();
        values[threadIdx.x] += other;
        __syncthreads();
    }
}

// Among `n` counts from `counts(k)`, a whole warp: the k whose voxels contain the one of rank *left, which becomes
// its rank there.
template <class Counts>
__device__ int find_rank(const Counts& counts, int n, u32* left) {
    for (int k0 = 0;; k0 += WARP) {
        int k = k0 + lane_of_thread();
        u32 here = k < n ? counts(k) : 0u, sum = inclusive_sum(here);
        u32 found = __ballot_sync(ALL_LANES, sum > *left);
        if (found || k0 + WARP >= n) {
            int at = found ? __ffs(found) - 1 : WARP - 1;
            *left -= __shfl_sync(ALL_LANES, sum - here, at);
            return k0 + at;
        }
        *left -= __shfl_sync(ALL_LANES, sum, WARP - 1);
    }
}

// Box of a blob around its centre, clipped to the volume.
__device__ void clip_box(const Batch& batch, const Item& item, const Blob& blob, const int* center, State& state) {
    int shape[3] = {batch.depth, batch.height, batch.width};
    bool empty = false;
    double nodes = 1.0;
    for (int i = 0; i < 3; ++i) {
        int start = imax(center[i] - blob.reach[i], 0);
        int size = imin(center[i] + blob.reach[i] + 1, shape[i]) - start;
        state.start[i] = start;
        state.size[i] = size;
        empty |= size <= 0;
        double low = (double)(start - center[i]) * item.scale[i], high = (double)(start + size - 1 - center[i]) * item.scale[i];
        nodes *= floor(high / blob.spacing) - floor(low / blob.spacing) + 4.0;
    }
    bool endless = nodes > 33554432.0;  // MOST_NODES of cpu/shapes.py
    if (endless && !empty) report(batch, LATTICE_TOO_LARGE);
    if (empty || endless) state.size[0] = state.size[1] = state.size[2] = 0;
    state.word = state.start[2] >> 5;
    state.words = empty || endless ? 0 : ((state.start[2] + state.size[2] - 1) >> 5) - state.word + 1;
}

// The straight way from a voxel of the mask through a slice, to where the mask ends.
struct Walk {
    int steps;
    bool inside;  // whether it ends before the array does
};

// A whole warp, 32 steps at a time; `words` are the slice's.
__device__ Walk walk_mask(const Batch& batch, const volatile u32* words, int y, int x, int dy, int dx) {
    for (int n = 0;; n += WARP) {
        int y1 = y + dy * (n + 1 + lane_of_thread()), x1 = x + dx * (n + 1 + lane_of_thread());
        bool inside = y1 >= 0 && y1 < batch.height && x1 >= 0 && x1 < batch.width;
        bool on = inside && words[(i64)y1 * batch.row_words + (x1 >> 5)] >> (x1 & 31) & 1;
        u32 ends = __ballot_sync(ALL_LANES, !on), array = __ballot_sync(ALL_LANES, inside);
        if (ends) {
            int first = __ffs(ends) - 1;
            return {n + first, (bool)(array >> first & 1)};
        }
    }
}

enum Placement { ANYWHERE, TO_SURFACE, TO_DEPTH };  // PLACEMENTS of config.py

// From the voxel that a position names to a blob's centre; `turn` in [0, 1) says where to look for the surface first.
__device__ void move_center(const Batch& batch, int item, int placement, double turn, int* center) {
    const volatile u32* words = lungs_of(batch, ((i64)item * batch.depth + center[0]) * batch.height);
    if (placement == TO_SURFACE) {
        int first = imin((int)(4.0 * turn), 3);
        for (int k = first; k < first + 4; ++k) {  // +x, +y, -x, -y, and again
            int step = k & 2 ? -1 : 1, dy = k & 1 ? step : 0, dx = step - dy;
            Walk walk = walk_mask(batch, words, center[1], center[2], dy, dx);
            if (!walk.inside) continue;
            center[1] += dy * walk.steps;
            center[2] += dx * walk.steps;
            return;
        }
    } else if (placement == TO_DEPTH) {
        for (int axis = 2; axis >= 1; --axis) {
            int dx = axis - 1, dy = 1 - dx;
            int before = walk_mask(batch, words, center[1], center[2], -dy, -dx).steps;
            int after = walk_mask(batch, words, center[1], center[2], dy, dx).steps;
            center[axis] = (2 * center[axis] + after - before) / 2;
        }
    }
}

// Centre of every blob of an item: voxel floor(u |M|) of the mask in C order, or where it leads.  `sums` is shared
// memory.
__device__ void place_blobs(const Batch& batch, int i, i64* sums) {
    Item& item = item_of(batch, i);
    int rows = batch.depth * batch.height, share = (rows + THREADS - 1) / THREADS;
    const volatile u32* counts = (const volatile u32*)batch.rows + (i64)i * rows;
    sum_shares(counts, rows, share, sums);
    scan_block(sums);
    i64 total = sums[THREADS - 1];
    if (threadIdx.x == 0) {
        item.lung_voxels = total;
        if (total == 0) report(batch, EMPTY_MASK);
    }
    for (int b = item.first_blob + warp_of_thread(); b < item.first_blob + item.blobs; b += WARPS) {
        const Blob& blob = blob_of(batch, b);
        int center[3] = {(int)blob.center[0], (int)blob.center[1], (int)blob.center[2]};
        if (center[0] < 0 && total > 0) {
            double place = blob.position * (double)total;
            i64 rank = lmin((i64)place, total - 1);  // the product may round up to |M|
            int k = last_at_most([=](int at) { return at ? sums[at - 1] : 0; }, THREADS, rank);
            u32 left = (u32)(rank - (k ? sums[k - 1] : 0));
            int first = k * share;
            int row = first + find_rank([=](int r) { return counts[first + r]; }, imin(share, rows - first), &left);
            const volatile u32* words = lungs_of(batch, (i64)i * rows + row);
            int w = find_rank([=](int at) { return (u32)__popc(words[at]); }, batch.row_words, &left);
            u32 word = words[w];
            for (; left > 0; --left) word &= word - 1u;  // takes the lowest voxel off
            center[0] = row / batch.height;
            center[1] = row % batch.height;
            center[2] = 32 * w + __ffs(word) - 1;
            if (blob.placement != ANYWHERE) move_center(batch, i, blob.placement, place - floor(place), center);
        }
        if (lane_of_thread() == 0) {
            State& state = state_of(batch, b);
            if (total > 0) clip_box(batch, item, blob, center, state);
            for (int axis = 0; axis < 3; ++axis) state.center[axis] = center[axis];
        }
    }
}

// Blocks take rows of one item each; the last of an item places its blobs.
KERNEL_OF(4) read_mask(Batch* table) {
    __shared__ i64 sums[THREADS];
    __shared__ int last;
    const Batch& batch = *table;
    int i = blockIdx.x % batch.n_items, part = blockIdx.x / batch.n_items;
    int parts = (gridDim.x - i + batch.n_items - 1) / batch.n_items, rows = batch.depth * batch.height;
    const u8* mask = (const u8*)batch.mask + i * batch.mask_strides[0];
    u32 strange = 0;
    for (int row = part * WARPS + warp_of_thread(); row < rows; row += parts * WARPS) {
        const u8* bytes = mask + row / batch.height * batch.mask_strides[1] + row % batch.height * batch.mask_strides[2];
        i64 at = (i64)i * rows + row;
        u32 count = pack_row(bytes, batch.mask_strides[3], batch.width, lungs_of(batch, at), &strange);
        if (lane_of_thread() == 0) ((u32*)batch.rows)[at] = count;
    }
    if (strange) report(batch, NOT_BINARY);
    if (is_last_block(&item_of(batch, i).ticket, parts, &last)) place_blobs(batch, i, sums);
}
