// ops.cu: packed masks, growth, means over a box, noise and the Gaussian of a volume.
// Twins: cpu/engine/bits.py, cpu/grow.py, cpu/filters.py, cpu/philox.py; oracle: SciPy, in tests/test_cuda_ops.py
//
// Bit x & 31 of word x >> 5 of a row is voxel x; bits beyond the row are 0, as is what lies beyond the
// volume. Floors count bytes a voxel through device memory: b bits are b / 8 bytes.
__device__ __forceinline__ i64 first_task() { return (i64)blockIdx.x * THREADS + threadIdx.x; }
__device__ __forceinline__ i64 task_step() { return (i64)gridDim.x * THREADS; }
__device__ __forceinline__ i64 first_warp_task() { return (i64)blockIdx.x * WARPS + warp_of_thread(); }
__device__ __forceinline__ i64 warp_task_step() { return (i64)gridDim.x * WARPS; }

// Quotient and rest; in 32 bits, which take a fifth of the time, wherever they suffice.
__device__ __forceinline__ i64 divide(i64 a, int b, int* rest) {
    if (a >> 32 == 0) {
        u32 q = (u32)a / (u32)b;
        *rest = (int)((u32)a - q * (u32)b);
        return q;
    }
    i64 q = a / b;
    *rest = (int)(a - q * b);
    return q;
}

__device__ __forceinline__ int words_of(int width) { return width / WARP + (width % WARP != 0); }

// Voxel of bit 0 of a word of the volume.
__device__ __forceinline__ i64 first_voxel(i64 word, int width) {
    int w;
    i64 row = divide(word, words_of(width), &w);
    return row * width + WARP * w;
}

// A word between its neighbours in the row.
struct Triple {
    u32 before, here, after;

    __device__ __forceinline__ u32 lower() const { return here << 1 | before >> 31; }  // bit x is voxel x - 1
    __device__ __forceinline__ u32 upper() const { return here >> 1 | after << 31; }   // bit x is voxel x + 1
    __device__ __forceinline__ u32 spread() const { return here | lower() | upper(); }
};
__device__ __forceinline__ Triple triple_of(const u32* bits, i64 row, int w, int words) {
    const u32* at = bits + row * words + w;
    return {w > 0 ? at[-1] : 0u, at[0], w + 1 < words ? at[1] : 0u};
}

// First bit of the run of a word that a set bit belongs to.
__device__ __forceinline__ int run_start(u32 word, int bit) {
    return WARP - __clz(~word & ((1u << bit) - 1u));
}

// Bits of the lowest run of a word: adding its first bit carries through it.
__device__ __forceinline__ u32 lowest_run(u32 word) { return word & ~(word + (word & (0u - word))); }

// Four bytes, zero or not, as four bits.
__device__ __forceinline__ u32 four_bits(u32 bytes) {
    u32 high = (((bytes & 0x7F7F7F7Fu) + 0x7F7F7F7Fu) | bytes) & 0x80808080u;
    // Bit 8 k times 2^(24 - 7 k) is bit 24 + k, and no two products share a bit.
    return (high >> 7) * 0x01020408u >> 24 & 15u;
}

// Pack a row that begins on sixteen bytes, a whole warp: a lane reads half a word.
__device__ __forceinline__ void pack_aligned(const u8* bytes, int width, const u32* also, u32* words) {
    for (int x0 = 0; x0 < width; x0 += 16 * WARP) {
        int x = x0 + 16 * lane_of_thread();
        u32 half = 0;
        if (x + 16 <= width) {
            uint4 q = *(const uint4*)(bytes + x);
            half = four_bits(q.x) | four_bits(q.y) << 4 | four_bits(q.z) << 8 | four_bits(q.w) << 12;
        } else {
            for (int k = 0; x + k < width; ++k) half |= (u32)(bytes[x + k] != 0) << k;
        }
        u32 word = half | __shfl_down_sync(ALL_LANES, half, 1) << 16;
        if ((lane_of_thread() & 1) == 0 && x < width) words[x / WARP] = also ? word | also[x / WARP] : word;
    }
}

// Pack any other row: a lane is a voxel.
__device__ __forceinline__ void pack_row(const u8* bytes, int width, const u32* also, u32* words) {
    for (int x0 = 0; x0 < width; x0 += WARP) {
        int x = x0 + lane_of_thread();
        u32 word = __ballot_sync(ALL_LANES, x < width && bytes[x] != 0);
        if (lane_of_thread() == 0) words[x0 / WARP] = also ? word | also[x0 / WARP] : word;
    }
}

// Pack a mask of bytes, united with one that is packed, or with none (null).  Floor: 1 read, 1/8 written.
KERNEL pack_mask(const u8* mask, const u32* also, u32* bits, i64 rows, int width) {
    int words = words_of(width);
    for (i64 row = first_warp_task(); row < rows; row += warp_task_step()) {
        const u8* bytes = mask + row * width;
        const u32* other = also ? also + row * words : also;
        if (((u64)bytes & 15) == 0) pack_aligned(bytes, width, other, bits + row * words);
        else pack_row(bytes, width, other, bits + row * words);
    }
}

// Bits of voxels 4 q ... 4 q + 3 of the volume in C order, wherever its rows end.
__device__ __forceinline__ u32 bits_of_quad(const u32* bits, i64 quad, i64 voxels, int width) {
    int x, words = words_of(width);
    i64 row = divide(4 * quad, width, &x);
    if (x + 4 <= width && x % WARP <= WARP - 4) return bits[row * words + x / WARP] >> x % WARP & 15u;
    u32 four = 0;
    for (int k = 0; k < 4 && 4 * quad + k < voxels; ++k) {
        four |= (bits[row * words + x / WARP] >> x % WARP & 1u) << k;
        if (++x == width) {
            x = 0;
            ++row;
        }
    }
    return four;
}

// Write four bytes 0 or 1; those beyond the volume are left out.
__device__ __forceinline__ void put_bytes(u8* out, u32 four, i64 quad, i64 voxels) {
    u32 bytes = four * 0x00204081u & 0x01010101u;
    if (4 * quad + 4 <= voxels) ((u32*)out)[quad] = bytes;
    else
        for (int k = 0; 4 * quad + k < voxels; ++k) out[4 * quad + k] = (u8)(four >> k & 1u);
}

// Packed to bytes.  Floor: 1/8 read, 1 written.
KERNEL unpack_mask(const u32* bits, u8* out, i64 voxels, int width) {
    i64 quads = (voxels + 3) / 4;
    for (i64 q = first_task(); q < quads; q += task_step())
        put_bytes(out, bits_of_quad(bits, q, voxels, width), q, voxels);
}

// --- Growth ---

// The voxels beside those of a row `apart` steps away; beside those in x is one step more.
__device__ __forceinline__ u32 reach_from(const u32* bits, i64 row, int w, int words, int apart, int most) {
    if (apart > most) return 0u;
    return apart < most ? triple_of(bits, row, w, words).spread() : bits[row * words + w];
}

// One step.  Does nothing where the step before changed nothing: both buffers hold the same then.
// Floor: 2/8 read, 1/8 written.
KERNEL grow_step(const u32* region, const u32* room, u32* grown, const volatile u32* before, u32* changed,
                 int depth, int height, int width, int connectivity) {
    if (before && *before == 0) return;
    int words = words_of(width), most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    i64 count = (i64)depth * height * words;
    bool any = false;
    for (i64 t = first_task(); t < count; t += task_step()) {
        int w, y;
        i64 row = divide(t, words, &w), z = divide(row, height, &y);
        u32 here = region[t], free = room[t] & ~here, reached = 0;
        if (free) {
            for (int dz = z > 0 ? -1 : 0; dz <= (z + 1 < depth); ++dz)
                for (int dy = y > 0 ? -1 : 0; dy <= (y + 1 < height); ++dy) {
                    int apart = (dz != 0) + (dy != 0);
                    reached |= reach_from(region, row + (i64)dz * height + dy, w, words, apart, most);
                }
        }
        grown[t] = here | (free & reached);
        any |= (free & reached) != 0;
    }
    if (any) *(volatile u32*)changed = 1;  // all write the same
}

// The same, a thread a voxel: for tests.
KERNEL grow_step_plain(const u8* region, const u8* room, u8* grown, u32* changed, int depth, int height,
                       int width, int connectivity) {
    int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    i64 voxels = (i64)depth * height * width;
    for (i64 i = first_task(); i < voxels; i += task_step()) {
        int x = (int)(i % width), y = (int)(i / width % height), z = (int)(i / width / height);
        bool here = region[i] != 0, reached = here;
        for (int n = 0; n < 27 && room[i] && !reached; ++n) {
            int dz = n / 9 - 1, dy = n / 3 % 3 - 1, dx = n % 3 - 1;
            bool inside_z = z + dz >= 0 && z + dz < depth, inside_y = y + dy >= 0 && y + dy < height;
            bool inside = inside_z && inside_y && x + dx >= 0 && x + dx < width;
            bool near = (dz != 0) + (dy != 0) + (dx != 0) <= most;
            reached = inside && near && region[i + ((i64)dz * height + dy) * width + dx] != 0;
        }
        grown[i] = reached;
        if (reached && !here) *(volatile u32*)changed = 1;
    }
}

// --- Mean over a box: sums along z, then y, then x, divided once ---

__device__ __forceinline__ int mirrored(int i, int n) { return i >= 0 && i < n ? i : reflect(i, n); }

// Sums of windows i - size / 2 ... of a line, for outputs begin ... end - 1: a sum moves with its window.
template <class Line, class Out>
__device__ __forceinline__ void run_sums(const Line& line, const Out& put, int n, int size, int begin,
                                         int end) {
    int left = size / 2;
    double total = 0.0;
    for (int k = 0; k < size; ++k) total += line(mirrored(begin - left + k, n));
    for (int i = begin; i < end; ++i) {
        put(i, total);
        if (i + 1 < end) total += line(mirrored(i - left + size, n)) - line(mirrored(i - left, n));
    }
}

// A thread is a column and takes up to `run` outputs.
template <class T>
__device__ __forceinline__ void box_along_z(const T* volume, double* sums, int depth, i64 plane, int first,
                                            int slices, int size, int run) {
    i64 pieces = (slices + run - 1) / run;
    for (i64 t = first_task(); t < plane * pieces; t += task_step()) {
        i64 piece = t / plane, column = t - piece * plane;
        int begin = first + (int)piece * run, end = imin(begin + run, first + slices);
        run_sums([=](int z) { return (double)volume[z * plane + column]; },
                 [=](int z, double sum) { sums[(z - first) * plane + column] = sum; }, depth, size, begin,
                 end);
    }
}

// Slices first ... first + slices - 1 of the sums.  Floor: a value read, 8 written; each is read twice,
// `size` slices apart.
KERNEL box_z_byte(const u8* volume, double* sums, int depth, i64 plane, int first, int slices, int size, int run) {
    box_along_z(volume, sums, depth, plane, first, slices, size, run);
}
KERNEL box_z_float(const float* volume, double* sums, int depth, i64 plane, int first, int slices, int size, int run) {
    box_along_z(volume, sums, depth, plane, first, slices, size, run);
}
KERNEL box_z_double(const double* volume, double* sums, int depth, i64 plane, int first, int slices, int size, int run) {
    box_along_z(volume, sums, depth, plane, first, slices, size, run);
}

// Floor: 8 read, 8 written.
KERNEL box_y(const double* sums, double* out, int slices, int height, int width, int size, int run) {
    i64 pieces = (height + run - 1) / run;
    for (i64 t = first_task(); t < slices * pieces * width; t += task_step()) {
        int x;
        i64 part = divide(t, width, &x), z = part / pieces;
        int begin = (int)(part - z * pieces) * run, end = imin(begin + run, height);
        i64 at = z * height * width + x;
        run_sums([=](int y) { return sums[at + (i64)y * width]; },
                 [=](int y, double sum) { out[at + (i64)y * width] = sum; }, height, size, begin, end);
    }
}

// A warp is a row: 32 windows at a time, scanning what enters less what leaves.  Floor: 8 read, 4 written.
KERNEL box_x(const double* sums, float* out, i64 rows, int width, int size, double count) {
    int left = size / 2;
    for (i64 r = first_warp_task(); r < rows; r += warp_task_step()) {
        const double* row = sums + r * width;
        double total = 0.0;
        for (int k = lane_of_thread(); k < size; k += WARP) total += row[mirrored(k - left, width)];
        total = warp_sum(total);
        for (int x0 = 0; x0 < width; x0 += WARP) {
            int x = x0 + lane_of_thread();
            bool moved = x > 0 && x < width;
            int enters = mirrored(x - left + size - 1, width), leaves = mirrored(x - left - 1, width);
            double change = moved ? row[enters] - row[leaves] : 0.0;
            double sum = total + inclusive_sum(change);
            if (x < width) out[r * width + x] = (float)(sum / count);
            total = __shfl_sync(ALL_LANES, sum, WARP - 1);
        }
    }
}

// --- Noise ---

// A thread is a Philox call, four voxels along x.  Floor: 4 written, 25 integer operations.
KERNEL fill_uniform(float* out, int depth, int height, int width, u32 seed, u32 stream, u32 sample,
                    u32 component, u32 z0, u32 y0, u32 x0) {
    u32 skip = x0 & 3;  // voxels of the first quad that lie before the box
    int quads = (int)(((i64)width + skip + 3) / 4);
    i64 count = (i64)depth * height * quads;
    for (i64 t = first_task(); t < count; t += task_step()) {
        int k, y;
        i64 row = divide(t, quads, &k), z = divide(row, height, &y);
        u32 plane = (z0 + (u32)z) << 16 | (y0 + y);
        Words w = philox4x32_10((x0 >> 2) + k, plane, sample, component, seed, stream);
        i64 x = 4 * (i64)k - skip;
        float* at = out + row * width + x;
        Quad<float> q = {{uniform_of(w.w[0]), uniform_of(w.w[1]), uniform_of(w.w[2]), uniform_of(w.w[3])}};
        if (x >= 0 && x + 4 <= width && ((u64)at & 15) == 0) {
            *(Quad<float>*)at = q;
        } else {
            for (int c = 0; c < 4; ++c)
                if (x + c >= 0 && x + c < width) at[c] = q.v[c];
        }
    }
}

// --- Gaussian: one pass an axis, on the tiles of lines.cuh ---

// 32 rows of the volume, a lane of the tile each; they are read along x.
struct RowsIn {
    const float* base;
    int width, rows;

    __device__ void fill(float* tile, int begin, int end) const {
        static_assert(LINES == AT_ONCE * WARPS, "a warp's rows of a tile");
        for (int i = begin + lane_of_thread(); i < end; i += WARP) {
            float v[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                int r = warp_of_thread() + k * WARPS;
                v[k] = r < rows ? base[(i64)r * width + i] : 0.0f;
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) tile[i * PITCH + warp_of_thread() + k * WARPS] = v[k];
        }
    }
    __device__ float at(int line, int i) const { return line < rows ? base[(i64)line * width + i] : 0.0f; }
};

template <class Source, class Sink>
__device__ __forceinline__ void filter(const Source& source, Sink& sink, const Piece& piece, const Weights& w,
                                       bool plain, LineMemory& memory) {
    if (plain) filter_plainly(source, sink, piece, w);
    else filter_tile(source, sink, piece, w, memory);
}

// Along x.  Floor: 4 read, 4 written; min(r, n / 2) multiply-adds.
KERNEL_OF(3) gauss_rows(const float* volume, float* out, i64 rows, int width, const double* weights,
                        const float* matrix, int radius, int plain) {
    __shared__ LineMemory memory;
    Weights w = {weights, matrix, radius};
    bool slow = plain || chunk_of(width, radius) == 0;
    int length = tile_length(width, radius, slow), chunks = (width + length - 1) / length;
    i64 groups = (rows + LINES - 1) / LINES;
    for (i64 t = blockIdx.x; t < groups * chunks; t += gridDim.x) {
        int chunk;
        i64 row = divide(t, chunks, &chunk) * LINES;
        int count = (int)lmin(rows - row, LINES);
        RowsIn source = {volume + row * width, width, count};
        RowsOut sink = {out + row * width, memory.stage[warp_of_thread()], width, count};
        filter(source, sink, piece_of(width, radius, chunk, slow), w, slow, memory);
    }
}

// Along y (outer = depth, step = width) or z (outer = 1, step = height width): lines of n voxels, `step` of
// them side by side.  Floor: as along x.
KERNEL_OF(3) gauss_columns(const float* volume, float* out, int outer, int n, i64 step, const double* weights,
                           const float* matrix, int radius, int plain) {
    __shared__ LineMemory memory;
    Weights w = {weights, matrix, radius};
    bool slow = plain || chunk_of(n, radius) == 0;
    int length = tile_length(n, radius, slow), chunks = (n + length - 1) / length;
    i64 groups = (step + LINES - 1) / LINES;
    for (i64 t = blockIdx.x; t < outer * groups * chunks; t += gridDim.x) {
        int chunk;
        i64 group = divide(t, chunks, &chunk), other = group / groups;
        i64 column = (group - other * groups) * LINES + lane_of_thread();
        i64 at = other * n * step + column;
        Columns source = {volume + at, step, column < step};
        ColumnsOut sink = {out + at, step, column < step};
        filter(source, sink, piece_of(n, radius, chunk, slow), w, slow, memory);
    }
}
