// ops.cu: filters, noise and growing on whole volumes.  Twins: cpu/filters.py, cpu/philox.py, cpu/grow.py; oracle:
// scipy.ndimage
//
// Lines of a (depth, height, width) volume along one axis, in tiles: the Gaussian of kernels/lines.cuh.
struct RowsIn {
    const float* base;  // voxel 0 of the first row of the group
    i64 pitch;
    int rows;

    __device__ void fill(float* tile, int begin, int end) const {
        for (int r = warp_of_thread(); r < LINES; r += WARPS) {
            for (int i = begin + lane_of_thread(); i < end; i += WARP) tile[i * PITCH + r] = r < rows ? base[r * pitch + i] : 0.0f;
        }
    }
    __device__ float at(int line, int i) const { return line < rows ? base[line * pitch + i] : 0.0f; }
};

// Floor: four bytes read and four written a voxel.
KERNEL_OF(2) gaussian_lines(const float* source, float* out, int depth, int height, int width, int axis, const double* taps,
                            const float* matrix, int radius, int plain) {
    __shared__ LineMemory memory;
    Weights w = {taps, matrix, radius};
    int n = axis == 0 ? depth : axis == 1 ? height : width;
    int length = tile_length(n, radius, plain), chunks = (n + length - 1) / length, columns = (width + LINES - 1) / LINES;
    i64 plane = (i64)height * width, rows = (i64)depth * height;
    i64 groups = axis == 2 ? (rows + LINES - 1) / LINES : (i64)(axis == 1 ? depth : height) * columns;
    bool slow = plain || chunk_of(n, radius) == 0;
    for (i64 t = blockIdx.x; t < groups * chunks; t += gridDim.x) {
        i64 group = t / chunks;
        Piece piece = piece_of(n, radius, (int)(t % chunks), plain);
        if (axis == 2) {
            i64 first = group * LINES;
            int count = rows - first < LINES ? (int)(rows - first) : LINES;
            RowsIn in = {source + first * width, width, count};
            RowsOut to = {out + first * width, memory.stage[warp_of_thread()], width, count};
            if (slow) filter_plainly(in, to, piece, w);
            else filter_tile(in, to, piece, w, memory);
        } else {
            int x = (int)(group % columns) * LINES + lane_of_thread();
            i64 at = group / columns * (axis == 1 ? plane : width) + x, step = axis == 1 ? width : plane;
            Columns in = {source + at, step, x < width};
            ColumnsOut to = {out + at, step, x < width};
            if (slow) filter_plainly(in, to, piece, w);
            else filter_tile(in, to, piece, w, memory);
        }
    }
}

// Sums over windows of `size` voxels along one axis, in float64, moved from voxel to voxel.  A thread takes `SEGMENT`
// outputs of a line; the last pass divides.  Floor: as many bytes read as a voxel has, eight written.
constexpr int SEGMENT = 32;

template <class T>
__device__ void window_sums(const T* source, double* out, float* mean, int depth, int height, int width, int axis, int size, double count) {
    int n = axis == 0 ? depth : axis == 1 ? height : width, pieces = (n + SEGMENT - 1) / SEGMENT;
    i64 plane = (i64)height * width, lines = (i64)depth * plane / n, step = axis == 0 ? plane : axis == 1 ? width : 1;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < lines * pieces; t += (i64)gridDim.x * THREADS) {
        // Neighbouring threads take neighbouring lines, except along x, where they take pieces of one.
        i64 line = axis == 2 ? t / pieces : t % lines;
        int first = (int)(axis == 2 ? t % pieces : t / lines) * SEGMENT;
        i64 base = axis == 0 ? line : axis == 1 ? line / width * plane + line % width : line * width;
        double sum = 0.0;
        for (int k = 0; k < size; ++k) sum += (double)source[base + reflect(first - size / 2 + k, n) * step];
        for (int i = first; i < imin(first + SEGMENT, n); ++i) {
            if (mean) mean[base + i * step] = (float)(sum / count);
            else out[base + i * step] = sum;
            int left = i - size / 2;
            sum += (double)source[base + reflect(left + size, n) * step] - (double)source[base + reflect(left, n) * step];
        }
    }
}
KERNEL window_sums_byte(const u8* source, double* out, float* mean, int depth, int height, int width, int axis, int size, double count) {
    window_sums(source, out, mean, depth, height, width, axis, size, count);
}
KERNEL window_sums_float(const float* source, double* out, float* mean, int depth, int height, int width, int axis, int size, double count) {
    window_sums(source, out, mean, depth, height, width, axis, size, count);
}
KERNEL window_sums_double(const double* source, double* out, float* mean, int depth, int height, int width, int axis, int size, double count) {
    window_sums(source, out, mean, depth, height, width, axis, size, count);
}

// Uniforms of a box of voxels from (z0, y0, x0) on, a quad a thread.  Floor: four bytes written a voxel.
KERNEL fill_uniform(float* out, int depth, int height, int width, u32 seed, u32 stream, u32 sample, u32 component, u32 z0, u32 y0, u32 x0) {
    i64 first = x0 >> 2, quads = (((i64)x0 + width - 1) >> 2) - first + 1, rows = (i64)depth * height;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < rows * quads; t += (i64)gridDim.x * THREADS) {
        i64 row = t / quads, quad = first + t % quads;
        u32 plane = (z0 + (u32)(row / height)) << 16 | (y0 + (u32)(row % height));
        Words words = philox4x32_10((u32)quad, plane, sample, component, seed, stream);
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            i64 x = 4 * quad + c - (i64)x0;
            if (x >= 0 && x < width) out[row * width + x] = uniform_of(words.w[c]);
        }
    }
}

// One step of growing a region inside `room`: a word a thread.  `changed[step]` tells whether anything was added; where
// the last step added nothing, both buffers hold the result, and there is nothing to do.
KERNEL grow_step(const u32* region, const u32* room, int depth, int height, int width, int connectivity, int step, u32* changed, u32* out) {
    if (step > 0 && changed[step - 1] == 0) return;
    int words = (width + 31) / 32, most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    i64 all = (i64)depth * height * words;
    bool added = false;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < all; t += (i64)gridDim.x * THREADS) {
        i64 row = t / words;
        int w = (int)(t % words), y = (int)(row % height), z = (int)(row / height);
        u32 near = 0;
        if (room[t] & ~region[t]) {
            for (int k = 0; k < 9; ++k) {
                int dz = k / 3 - 1, dy = k % 3 - 1, steps = (dz != 0) + (dy != 0);
                if (steps > most || z + dz < 0 || z + dz >= depth || y + dy < 0 || y + dy >= height) continue;
                const u32* other = region + (row + (i64)dz * height + dy) * words;
                near |= other[w];
                if (steps == most) continue;
                near |= other[w] << 1 | other[w] >> 1;
                if (w > 0) near |= other[w - 1] >> 31;
                if (w + 1 < words) near |= other[w + 1] << 31;
            }
        }
        u32 grown = region[t] | (near & room[t]);
        added |= grown != region[t];
        out[t] = grown;
    }
    if (added) ((volatile u32*)changed)[step] = 1u;
}

// The plain way, a byte a voxel.
KERNEL grow_voxels(const u8* region, const u8* room, int depth, int height, int width, int connectivity, int step, u32* changed, u8* out) {
    if (step > 0 && changed[step - 1] == 0) return;
    int most = connectivity == 6 ? 1 : connectivity == 18 ? 2 : 3;
    i64 voxels = (i64)depth * height * width;
    for (i64 v = (i64)blockIdx.x * THREADS + threadIdx.x; v < voxels; v += (i64)gridDim.x * THREADS) {
        int x = (int)(v % width), y = (int)(v / width % height), z = (int)(v / width / height);
        bool on = region[v] != 0;
        for (int k = 0; k < 27 && !on && room[v]; ++k) {
            int dz = k / 9 - 1, dy = k / 3 % 3 - 1, dx = k % 3 - 1;
            if ((dz != 0) + (dy != 0) + (dx != 0) > most) continue;
            if (z + dz < 0 || z + dz >= depth || y + dy < 0 || y + dy >= height || x + dx < 0 || x + dx >= width) continue;
            on = region[v + ((i64)dz * height + dy) * width + dx] != 0;
        }
        if (on != (region[v] != 0)) ((volatile u32*)changed)[step] = 1u;
        out[v] = on;
    }
}
