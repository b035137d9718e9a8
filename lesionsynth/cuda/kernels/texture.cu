// texture.cu: a lesion's texture on its box (PAPER.md eq. 2-8), one pass an axis.  Twin: cpu/texture.py
//
//     a1 = noise - 1/2 -> x -> field0 -> y -> field1 -> z -> field0 = a2, least and greatest of it
//     b1 = [v < a]     -> x -> field1 -> y -> field0 -> z -> field1 = b2, its sum over the lesion
//
// A pass is one launch for all lesions of the batch: blocks take tiles from the list of kernels/schedule.cu.  Floor of
// a pass: four bytes read and four written a voxel of the boxes, which the L2 cache of a large card holds, and
// min(r, n / 2) multiply-adds.
struct TextureMemory {
    LineMemory lines;
    u32 voxels[ROWS];
};

__device__ __forceinline__ const float* field_of(const Batch& batch, const Lesion& l, int which) {
    return (const float*)(which ? batch.field1 : batch.field0) + l.field;
}

__device__ __forceinline__ Weights weights_of(const Batch& batch, const Lesion& l, int which, int axis) {
    const Blob& blob = blob_of(batch, l.root);
    return {(const double*)batch.taps + blob.taps[which][axis], (const float*)batch.weights + blob.weights[which][axis],
            blob.radius[which][axis]};
}

// The map of a2 to [a_L, a_U]; a field without range becomes a_L.  Twin: _rescale
struct Rescale {
    float low, slope, a_low;
};

__device__ Rescale rescale_of(const Batch& batch, const Lesion& l) {
    // Volatile: within one launch these came from atomics, past the first-level cache.
    const volatile State& s = state_of(batch, l.root);
    const Blob& blob = blob_of(batch, l.root);
    float low = float_of(s.least), high = float_of(s.greatest);
    double span = (double)high - (double)low;
    return {low, span > 0.0 ? (float)((blob.a_high - blob.a_low) / span) : 0.0f, (float)blob.a_low};
}

// Rows of noise: a lane is a row (z, y) of the box, so the four voxels of a Philox call are four rows of the tile.
template <bool SALT>
struct NoiseRows {
    const Lesion& l;
    u32 seed, sample, component;
    Rescale map;
    const float* a2;  // of this lane's row, at the column of voxel 0
    u32 plane;
    bool on;

    __device__ NoiseRows(const Batch& batch, const Lesion& lesion, i64 group) : l(lesion) {
        const Blob& blob = blob_of(batch, l.root);
        const Item& item = item_of(batch, blob.item);
        seed = item.seed;
        sample = item.sample;
        component = blob.component;
        i64 row = group * LINES + lane_of_thread();
        on = row < (i64)l.size[0] * l.size[1];
        int z = (int)(row / l.size[1]), y = (int)(row % l.size[1]);
        plane = (u32)(l.start[0] + z) << 16 | (u32)(l.start[1] + y);
        a2 = field_of(batch, l, 0) + row * l.pitch + l.skip;
        if (SALT) map = rescale_of(batch, l);
    }

    __device__ float value(u32 word, float a2) const {
        if (!SALT) return uniform_of(word) - 0.5f;  // centred: float32 resolves a narrow range around 0, not around 1/2
        float a = (a2 - map.low) * map.slope + map.a_low;
        return uniform_of(word) < a ? 1.0f : 0.0f;
    }

    __device__ Words words(int quad) const {
        return philox4x32_10((u32)quad, plane, sample, component, seed, SALT ? SALT_STREAM : PROBABILITY_STREAM);
    }

    __device__ void fill(float* tile, int begin, int end) const {
        int x0 = l.start[2], last = (x0 + end - 1) >> 2;
        for (int quad = ((x0 + begin) >> 2) + warp_of_thread(); quad <= last; quad += WARPS) {
            Words w = words(quad);
            Quad<float> a = {};  // columns are aligned as the volume is, so a quad is sixteen aligned bytes
            int first = 4 * quad - x0;
            if (SALT && on && first >= begin && first + 4 <= end) a = *(const Quad<float>*)(a2 + first);
            else if (SALT && on) {  // beyond the box nobody has written
#pragma unroll
                for (int c = 0; c < 4; ++c)
                    if (first + c >= begin && first + c < end) a.v[c] = a2[first + c];
            }
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                int i = first + c;
                if (i >= begin && i < end) tile[i * PITCH + lane_of_thread()] = on ? value(w.w[c], a.v[c]) : 0.0f;
            }
        }
    }

    __device__ float at(int, int i) const {
        int x = l.start[2] + i;
        return on ? value(words(x >> 2).w[x & 3], SALT ? a2[i] : 0.0f) : 0.0f;
    }
};

// Where the columns of a group lie: the first, and which of them are the box's.
struct Group {
    int other;   // z for lines along y, y for lines along z
    int column;  // of this lane, counted from the field's first
    i64 at, step;
    bool on;
};

__device__ __forceinline__ Group group_of(const Lesion& l, int axis, i64 number) {
    Group g;
    int columns = columns_of(l);
    g.other = (int)(number / columns);
    g.column = (int)(number % columns) * LINES + lane_of_thread();
    g.on = g.column >= l.skip && g.column < l.skip + l.size[2];
    g.step = axis == ALONG_Y ? l.pitch : (i64)l.size[1] * l.pitch;
    g.at = (i64)g.other * (axis == ALONG_Y ? (i64)l.size[1] * l.pitch : l.pitch) + g.column;
    return g;
}

// a2, with its extremes on the box.
struct Extremes {
    ColumnsOut columns;
    u32 least, greatest;

    __device__ __forceinline__ void put(int i, const float* values, int from, int to) {
        columns.put(i, values, from, to);
#pragma unroll
        for (int j = 0; j < BLOCK; ++j) {
            if (columns.on && j >= from && j < to) {
                u32 key = key_of(values[j]);
                least = key < least ? key : least;
                greatest = key > greatest ? key : greatest;
            }
        }
    }
    __device__ void finish(State& s) {
        for (int d = WARP / 2; d; d /= 2) {
            u32 low = __shfl_xor_sync(ALL_LANES, least, d), high = __shfl_xor_sync(ALL_LANES, greatest, d);
            least = low < least ? low : least;
            greatest = high > greatest ? high : greatest;
        }
        if (lane_of_thread() == 0 && least <= greatest) {
            atomicMin(&s.least, least);
            atomicMax(&s.greatest, greatest);
        }
    }
};

// The blobs of a lesion, a lane each: lane k holds blob k of the item.  Items of more blobs read the others each time.
struct Members {
    const Batch& batch;
    int root, first, end;
    int z0, z1, y0, y1, word, words;
    const u32* bits;

    __device__ Members(const Batch& b, int lesion) : batch(b), root(lesion) {
        const Item& item = item_of(batch, blob_of(batch, lesion).item);
        first = item.first_blob;
        end = first + item.blobs;
        load(first + lane_of_thread());
    }

    __device__ void load(int b) {
        z0 = z1 = y0 = y1 = 0;
        word = words = 0;
        if (b >= end || ((const int*)batch.parents)[b] != root) return;
        const State& s = state_of(batch, b);
        z0 = s.start[0];
        z1 = z0 + s.size[0];
        y0 = s.start[1];
        y1 = y0 + s.size[1];
        word = s.word;
        words = s.words;
        bits = (const u32*)batch.bits + blob_of(batch, b).bits;
    }

    // Bits of this lane's blob in the 32 voxels from x on.
    __device__ u32 own(int z, int y, int x) const {
        if (z < z0 || z >= z1 || y < y0 || y >= y1) return 0;
        const u32* row = bits + ((i64)(z - z0) * (y1 - y0) + y - y0) * words;
        int w = (x >> 5) - word;
        u32 low = w >= 0 && w < words ? row[w] : 0u;
        if ((x & 31) == 0) return low;
        u32 high = w + 1 >= 0 && w + 1 < words ? row[w + 1] : 0u;
        return low >> (x & 31) | high << (32 - (x & 31));
    }

    // The lesion's voxels among the 32 from x on; a whole warp calls this.
    __device__ u32 at(int z, int y, int x) {
        u32 mine = own(z, y, x);
        for (int base = first + WARP; base < end; base += WARP) {
            load(base + lane_of_thread());
            mine |= own(z, y, x);
        }
        if (end - first > WARP) load(first + lane_of_thread());
        return warp_or(mine);
    }
};

// b2, with the number and the sum of its voxels in the lesion above the threshold, in units of 2^-26: a float32 of
// [0.125, 1] is a multiple of that, so the sum is exact and knows no order.
struct Brightness {
    ColumnsOut columns;
    const u32* voxels;  // the lesion's, in the tile's columns, a word for each i
    float threshold;
    u32 size, passing;
    u64 total;

    __device__ __forceinline__ void put(int i, const float* values, int from, int to) {
        columns.put(i, values, from, to);
#pragma unroll
        for (int j = 0; j < BLOCK; ++j) {
            if (j < from || j >= to) continue;
            bool on = voxels[i + j] >> lane_of_thread() & 1, above = on && values[j] > threshold;
            size += on;
            passing += above;
            if (above) total += (u64)(i64)floor((double)values[j] * 67108864.0 + 0.5);
        }
    }
    __device__ void finish(State& s) {
        size = warp_sum(size);
        passing = warp_sum(passing);
        total = warp_sum(total);
        if (lane_of_thread() == 0 && size) {
            atomicAdd(&s.voxels, (u64)size);
            atomicAdd(&s.passing, (u64)passing);
            atomicAdd(&s.total, total);
        }
    }
};

template <bool PLAIN, class Source, class Sink>
__device__ __forceinline__ void filter(const Source& source, Sink& sink, const Piece& piece, const Weights& w, TextureMemory& memory) {
    if (PLAIN) filter_plainly(source, sink, piece, w);
    else filter_tile(source, sink, piece, w, memory.lines);
}

template <int STAGE, bool PLAIN>
__device__ __forceinline__ void noise_tile(const Batch& batch, const Lesion& l, i64 number, const Weights& w, TextureMemory& memory) {
    constexpr bool SALT = STAGE >= STAGES_OF_A;
    int chunks = chunks_of(batch, l, STAGE);
    i64 group = number / chunks;
    NoiseRows<SALT> source(batch, l, group);
    i64 rows = (i64)l.size[0] * l.size[1] - group * LINES;
    float* out = (float*)field_of(batch, l, SALT) + group * LINES * l.pitch + l.skip;
    RowsOut sink = {out, memory.lines.stage[warp_of_thread()], l.pitch, rows < LINES ? (int)rows : LINES};
    filter<PLAIN>(source, sink, piece_of(l.size[2], w.radius, (int)(number % chunks), batch.plain), w, memory);
}

template <int STAGE, bool PLAIN>
__device__ __forceinline__ void column_tile(const Batch& batch, const Lesion& l, i64 number, const Weights& w, TextureMemory& memory) {
    constexpr int AXIS = STAGE % STAGES_OF_A, FROM = (STAGE == ALONG_Y || STAGE == STAGES_OF_A + ALONG_Z) ? 0 : 1;
    int chunks = chunks_of(batch, l, STAGE);
    Piece piece = piece_of(l.size[2 - AXIS], w.radius, (int)(number % chunks), batch.plain);
    Group g = group_of(l, AXIS, number / chunks);
    Columns source = {field_of(batch, l, FROM) + g.at, g.step, g.on};
    ColumnsOut out = {(float*)field_of(batch, l, 1 - FROM) + g.at, g.step, g.on};
    State& state = state_of(batch, l.root);
    if (AXIS == ALONG_Y) {
        filter<PLAIN>(source, out, piece, w, memory);
    } else if (STAGE < STAGES_OF_A) {
        Extremes sink = {out, 0xFFFFFFFFu, 0u};
        filter<PLAIN>(source, sink, piece, w, memory);
        sink.finish(state);
    } else {
        Members members(batch, l.root);
        int x = l.start[2] - l.skip + g.column - lane_of_thread();
        __syncthreads();  // the last tile is done with the words
        for (int i = warp_of_thread(); i < piece.count; i += WARPS) {
            u32 word = members.at(l.start[0] + piece.first + i, l.start[1] + g.other, x);
            if (lane_of_thread() == 0) memory.voxels[i] = word;
        }
        float threshold = item_of(batch, blob_of(batch, l.root).item).mean_threshold;
        Brightness sink = {out, memory.voxels - piece.first, threshold, 0u, 0u, 0ull};
        filter<PLAIN>(source, sink, piece, w, memory);  // begins with a barrier
        sink.finish(state);
    }
}

template <int STAGE, bool PLAIN>
__device__ __forceinline__ void texture_tile(const Batch& batch, const Lesion& l, i64 number, TextureMemory& memory) {
    constexpr int AXIS = STAGE % STAGES_OF_A;
    Weights w = weights_of(batch, l, STAGE / STAGES_OF_A, 2 - AXIS);
    if constexpr (AXIS == ALONG_X) noise_tile<STAGE, PLAIN>(batch, l, number, w, memory);
    else column_tile<STAGE, PLAIN>(batch, l, number, w, memory);
}

// Where no tile holds what an output needs, the plain way must do.
template <int STAGE>
__device__ __forceinline__ bool is_plain(const Batch& batch, const Lesion& l) {
    constexpr int AXIS = 2 - STAGE % STAGES_OF_A;
    return batch.plain || chunk_of(l.size[AXIS], blob_of(batch, l.root).radius[STAGE / STAGES_OF_A][AXIS]) == 0;
}

template <int STAGE>
__device__ __noinline__ void plain_tile(const Batch& batch, int root, i64 number, TextureMemory& memory) {
    Lesion l = lesion_of(batch, root);
    if (l.field < 0) l.field = 0;  // one that found no room has them all to itself
    texture_tile<STAGE, true>(batch, l, number, memory);
}

template <int STAGE>
__device__ __forceinline__ void run_stage(const Batch& batch, TextureMemory& memory) {
    i64 tiles = tiles_in(batch, STAGE);
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = tile_of(batch, STAGE, t);
        Lesion l = lesion_of(batch, tile.root);
        if (is_plain<STAGE>(batch, l)) plain_tile<STAGE>(batch, tile.root, tile.number, memory);
        else texture_tile<STAGE, false>(batch, l, tile.number, memory);
    }
}

KERNEL_OF(2) noise_along_x(const Batch* table) { __shared__ TextureMemory memory; run_stage<0>(*table, memory); }
KERNEL_OF(3) noise_along_y(const Batch* table) { __shared__ TextureMemory memory; run_stage<1>(*table, memory); }
KERNEL_OF(3) noise_along_z(const Batch* table) { __shared__ TextureMemory memory; run_stage<2>(*table, memory); }
KERNEL_OF(2) salt_along_x(const Batch* table) { __shared__ TextureMemory memory; run_stage<3>(*table, memory); }
KERNEL_OF(3) salt_along_y(const Batch* table) { __shared__ TextureMemory memory; run_stage<4>(*table, memory); }
KERNEL_OF(2) salt_along_z(const Batch* table) { __shared__ TextureMemory memory; run_stage<5>(*table, memory); }

// Folded matrices of the lesions whose kernels are longer than their boxes.
KERNEL fold_matrices(const Batch* table) {
    const Batch& batch = *table;
    for (int task = blockIdx.x; task < 6 * batch.n_blobs; task += gridDim.x) {
        int b = task / 6, which = task / 3 % 2, axis = task % 3;
        if (!is_lesion(batch, b)) continue;
        Lesion l = lesion_of(batch, b);
        Weights w = weights_of(batch, l, which, axis);
        int n = l.size[axis], half = (n + 1) / 2;
        if (!is_matrix(n, w.radius)) continue;
        // Rows are read in fours: those beyond the half are zero, and nobody puts their outputs.
        for (i64 t = threadIdx.x; t < (i64)round_up(half, PAIRS) * half; t += THREADS)
            fold_entry(w.taps, w.radius, n, (int)(t / half), (int)(t % half), (float*)w.matrix);
    }
}
