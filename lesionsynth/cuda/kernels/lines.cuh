// lines.cuh: a Gaussian along 32 parallel lines of a box, a tile in shared memory.  Twin: cpu/engine/lines.py
//
// Taps, where the kernel is no longer than the line (2 r + 1 <= n):
//     acc = w_0 x_i, then acc = fma(w_k, x_{i-k} + x_{i+k}, acc) for k = 1 ... r.
// Matrix, where it is longer: u_j = x_j + x_{n-1-j}, v_j = x_j - x_{n-1-j} (a middle voxel is its own even part),
//     e = E_i0 u_0, then e = fma(E_ij, u_j, e) for j = 1 ... (n - 1) / 2, the same for o,
//     y_i = e + o, y_{n-1-i} = e - o.
//
// Order and rounding are the twin's, so the bits are.  A line is a lane: row i of the tile holds voxel i of all 32.
// A thread accumulates eight outputs at once; with taps, its two windows slide through registers, so a step costs
// two shared loads for eight additions and eight multiply-adds.
constexpr int LINES = WARP;
constexpr int PITCH = LINES + 1;  // rows are written along lanes and, for lines along x, read across them
constexpr int ROWS = 280;         // of a tile: 36,960 bytes, so that sm_75 holds one block and sm_90 four
constexpr int BLOCK = 8;          // outputs of a thread
constexpr int PAIRS = 4;          // the same for the matrix: outputs i and n - 1 - i of four i
constexpr int LEAST_CHUNK = 64;   // shorter pieces of a line would spend most on their margins

__device__ __forceinline__ bool is_matrix(int n, int radius) { return 2 * radius + 1 > n; }

__device__ __forceinline__ int round_up(int n, int unit) { return (n + unit - 1) / unit * unit; }

// Outputs of a line that a tile computes; 0 where no tile holds what they need, and the plain way must do.
__device__ __forceinline__ int chunk_of(int n, int radius) {
    if (is_matrix(n, radius)) return n <= ROWS ? n : 0;
    int margin = round_up(radius, BLOCK);
    if (round_up(n, BLOCK) + 2 * margin <= ROWS) return n;
    int room = (ROWS - 2 * margin) / BLOCK * BLOCK;
    return room >= LEAST_CHUNK ? room : 0;
}

// The same with the plain way's chunk, so that every tile has outputs.
__device__ __forceinline__ int tile_length(int n, int radius, bool plain) {
    int chunk = plain ? 0 : chunk_of(n, radius);
    return chunk > 0 ? chunk : imin(n, LEAST_CHUNK);
}

// A line's weights: float64 taps w_0 ... w_r (rounded here, as the twin rounds them) and, where the kernel is longer
// than the line, the halves of the matrix, (ceil(h / 4), h, 8) with E_ij at [i / 4][j][i % 4] and O_ij 4 further.
struct Weights {
    const double* taps;
    const float* matrix;
    int radius;
};

// Entry p of the taps wrapped around a period of 2n, summed in the order of k.  Twin: kernel_of
__device__ inline double wrapped_tap(const double* taps, int radius, int n, int p) {
    int period = 2 * n;
    p %= period;
    if (p < 0) p += period;
    int q = p == 0 ? 0 : period - p;  // k = q (mod 2n) reaches p from the other side
    double sum = p == 0 ? taps[0] : 0.0;
    int k = p == 0 ? period : imin(p, q);
    int step = p == 0 ? 0 : imax(p, q) - k;  // from k to the other side's next
    while (k <= radius) {
        sum += taps[k];
        if (k + step <= radius) sum += taps[k + step];
        k += period;
    }
    return sum;
}

// Fill entry (i, j) of the folded matrix; i may lie beyond the half, up to a multiple of four.
__device__ inline void fold_entry(const double* taps, int radius, int n, int i, int j, float* matrix) {
    int half = (n + 1) / 2;
    double here = 0.0, there = 0.0;
    if (i < half) {
        here = wrapped_tap(taps, radius, n, i - j) + wrapped_tap(taps, radius, n, i + j + 1);
        there = wrapped_tap(taps, radius, n, i + j + 1 - n) + wrapped_tap(taps, radius, n, i - j + n);
    }
    float* at = matrix + ((i64)(i / PAIRS) * half + j) * 2 * PAIRS + i % PAIRS;
    at[0] = (float)(0.5 * (here + there));
    at[PAIRS] = (float)(0.5 * (here - there));
}

// Write the margins of a tile of taps, where row margin + i - first holds voxel i.
__device__ __forceinline__ void reflect_rows(float* tile, int first, int margin, int rows, int n) {
    for (int r = warp_of_thread(); r < rows; r += WARPS) {
        int i = first - margin + r;
        if (i >= 0 && i < n) continue;
        // Rows further out feed only outputs beyond the line, which nobody reads.
        int from = i < n + margin ? reflect(i, n) - first + margin : -1;
        tile[r * PITCH + lane_of_thread()] = from < 0 ? 0.0f : tile[from * PITCH + lane_of_thread()];
    }
}

// Eight outputs of a lane by taps.  `at` is the row of the first; `taps` are zero from r + 1 up to a multiple of 8.
__device__ __forceinline__ void convolve(const float* tile, const float* taps, int margin, int at, float* out) {
    const float* x = tile + at * PITCH + lane_of_thread();
    float low[BLOCK], high[BLOCK];  // x_{i-k} and x_{i+k}: the windows move by renaming
#pragma unroll
    for (int j = 0; j < BLOCK; ++j) {
        float v = x[j * PITCH];
        out[j] = taps[0] * v;
        low[j] = high[j] = v;
    }
    for (int k = 0; k < margin; k += BLOCK) {
#pragma unroll
        for (int s = 0; s < BLOCK; ++s) {  // step k + s + 1; windows are rotated by s + 1
            low[BLOCK - 1 - s] = x[-(k + s + 1) * PITCH];
            high[s] = x[(k + s + BLOCK) * PITCH];
            float w = taps[k + s + 1];
#pragma unroll
            for (int j = 0; j < BLOCK; ++j) {
                float sum = low[(j + 2 * BLOCK - 1 - s) % BLOCK] + high[(j + s + 1) % BLOCK];
                out[j] = fmaf(w, sum, out[j]);
            }
        }
    }
}

// Turn a tile of n rows into its even and odd parts, in place.
__device__ __forceinline__ void split_parity(float* tile, int n) {
    for (int j = warp_of_thread(); j < n / 2; j += WARPS) {
        float* a = tile + j * PITCH + lane_of_thread();
        float* b = tile + (n - 1 - j) * PITCH + lane_of_thread();
        float x = *a, y = *b;
        *a = x + y;
        *b = x - y;
    }
}

// Outputs i ... i + 3 to out[0 ... 3] and n - 4 - i ... n - 1 - i to out[4 ... 7]; i is a multiple of 4.
__device__ __forceinline__ void multiply(const float* tile, const float* matrix, int n, int i, float* out) {
    int half = (n + 1) / 2;
    const float4* row = (const float4*)(matrix + (i64)(i / PAIRS) * half * 2 * PAIRS);
    const float* u = tile + lane_of_thread();
    const float* v = tile + (n - 1) * PITCH + lane_of_thread();
    float4 a = row[0], b = row[1];
    float e0 = a.x * u[0], e1 = a.y * u[0], e2 = a.z * u[0], e3 = a.w * u[0];
    float o0 = b.x * v[0], o1 = b.y * v[0], o2 = b.z * v[0], o3 = b.w * v[0];
#pragma unroll 4
    for (int j = 1; j < half; ++j) {
        a = row[2 * j];
        b = row[2 * j + 1];
        float even = u[j * PITCH], odd = v[-j * PITCH];
        e0 = fmaf(a.x, even, e0);
        e1 = fmaf(a.y, even, e1);
        e2 = fmaf(a.z, even, e2);
        e3 = fmaf(a.w, even, e3);
        o0 = fmaf(b.x, odd, o0);
        o1 = fmaf(b.y, odd, o1);
        o2 = fmaf(b.z, odd, o2);
        o3 = fmaf(b.w, odd, o3);
    }
    out[0] = e0 + o0;
    out[1] = e1 + o1;
    out[2] = e2 + o2;
    out[3] = e3 + o3;
    out[7] = e0 - o0;
    out[6] = e1 - o1;
    out[5] = e2 - o2;
    out[4] = e3 - o3;
}

// One output by taps or matrix, straight from a source of voxels: slow, and the same bits.
template <class Source>
__device__ __noinline__ float plain_output(const Source& source, int line, int n, const Weights& w, int i) {
    if (!is_matrix(n, w.radius)) {
        float sum = (float)w.taps[0] * source.at(line, i);
        for (int k = 1; k <= w.radius; ++k) {
            sum = fmaf((float)w.taps[k], source.at(line, reflect(i - k, n)) + source.at(line, reflect(i + k, n)), sum);
        }
        return sum;
    }
    int half = (n + 1) / 2, m = imin(i, n - 1 - i);
    const float* row = w.matrix + (i64)(m / PAIRS) * half * 2 * PAIRS + m % PAIRS;
    float e = 0.0f, o = 0.0f;
    for (int j = 0; j < half; ++j) {
        float x = source.at(line, j), y = source.at(line, n - 1 - j);
        bool middle = 2 * j == n - 1;
        float even = middle ? x : x + y, odd = middle ? x : x - y;
        e = j == 0 ? row[0] * even : fmaf(row[j * 2 * PAIRS], even, e);
        o = j == 0 ? row[PAIRS] * odd : fmaf(row[j * 2 * PAIRS + PAIRS], odd, o);
    }
    return 2 * i < n - 1 ? e + o : e - o;
}

// Shared memory of a tile: 46,736 bytes.
struct LineMemory {
    float tile[ROWS * PITCH];
    float stage[WARPS][WARP * (BLOCK + 1)];  // for `RowsOut`
    float taps[ROWS / 2];
};

constexpr int AT_ONCE = 4;  // loads of a thread under way while a tile is filled

// Columns of a volume: a lane is a column, and the lines run along another axis.
struct Columns {
    const float* base;  // voxel 0 of this lane's line
    i64 step;
    bool on;

    __device__ void fill(float* tile, int begin, int end) const {
        for (int i = begin + warp_of_thread(); i < end; i += AT_ONCE * WARPS) {
            float v[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) v[k] = on && i + k * WARPS < end ? base[(i + k * WARPS) * step] : 0.0f;
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k)
                if (i + k * WARPS < end) tile[(i + k * WARPS) * PITCH + lane_of_thread()] = v[k];
        }
    }
    __device__ float at(int, int i) const { return on ? base[i * step] : 0.0f; }
};

// Rows go out through shared memory, eight voxels of four rows at a time, so that whole sectors are written.
struct RowsOut {
    float* out;  // column of voxel 0 in the first row of the group
    float* stage;
    i64 pitch;
    int rows;

    __device__ __forceinline__ void put(int i, const float* values, int from, int to) {
#pragma unroll
        for (int j = 0; j < BLOCK; ++j)
            if (j >= from && j < to) stage[lane_of_thread() * (BLOCK + 1) + j] = values[j];
        __syncwarp();
        int j = lane_of_thread() % BLOCK;
        if (j >= from && j < to) {
            for (int r = lane_of_thread() / BLOCK; r < rows; r += WARP / BLOCK) out[r * pitch + i + j] = stage[r * (BLOCK + 1) + j];
        }
        __syncwarp();
    }
};

struct ColumnsOut {
    float* out;
    i64 step;
    bool on;

    __device__ __forceinline__ void put(int i, const float* values, int from, int to) const {
#pragma unroll
        for (int j = 0; j < BLOCK; ++j)
            if (on && j >= from && j < to) out[(i + j) * step] = values[j];
    }
};

// The piece of its lines that a tile computes.
struct Piece {
    int n, first, count;
};
__device__ __forceinline__ Piece piece_of(int n, int radius, int chunk, bool plain) {
    int length = tile_length(n, radius, plain);
    return {n, chunk * length, imin(length, n - chunk * length)};
}

// Filter one tile, a piece of 32 lines.
//   source.fill(tile, begin, end): write voxels [begin, end) of the lines, voxel i to row i of `tile`
//   source.at(line, i): one voxel, for the plain way
//   sink.put(i, values, from, to): outputs i + from ... i + to - 1 of this thread's lane; whole warps call it
// Begins with a barrier, so that the shared memory is free; ends without one.
template <class Source, class Sink>
__device__ __forceinline__ void filter_tile(const Source& source, Sink& sink, const Piece& piece, const Weights& w, LineMemory& memory) {
    float *tile = memory.tile, *taps = memory.taps;
    int n = piece.n, first = piece.first, count = piece.count;
    float out[BLOCK];
    __syncthreads();
    if (is_matrix(n, w.radius)) {
        source.fill(tile, 0, n);
        __syncthreads();
        split_parity(tile, n);
        __syncthreads();
        int half = (n + 1) / 2;
        for (int i = PAIRS * warp_of_thread(); i < half; i += PAIRS * WARPS) {
            multiply(tile, w.matrix, n, i, out);
            int outputs = imin(PAIRS, half - i);
            bool middle = 2 * (i + outputs) > n;  // of an odd line: its own mirror image
            sink.put(i, out, 0, outputs);
            sink.put(n - i - 2 * PAIRS, out, 2 * PAIRS - outputs + middle, 2 * PAIRS);
        }
        return;
    }
    int margin = round_up(w.radius, BLOCK), rows = round_up(count, BLOCK) + 2 * margin;
    for (int k = threadIdx.x; k <= margin; k += THREADS) taps[k] = k <= w.radius ? (float)w.taps[k] : 0.0f;
    source.fill(tile + (margin - first) * PITCH, imax(first - margin, 0), imin(first - margin + rows, n));
    __syncthreads();
    reflect_rows(tile, first, margin, rows, n);
    __syncthreads();
    for (int i = BLOCK * warp_of_thread(); i < count; i += BLOCK * WARPS) {
        convolve(tile, taps, margin, margin + i, out);
        sink.put(first + i, out, 0, imin(BLOCK, count - i));
    }
}

// The same outputs the plain way.
template <class Source, class Sink>
__device__ __forceinline__ void filter_plainly(const Source& source, Sink& sink, const Piece& piece, const Weights& w) {
    __syncthreads();
    for (int i = piece.first + warp_of_thread(); i < piece.first + piece.count; i += WARPS) {
        float out[BLOCK];
        out[0] = plain_output(source, lane_of_thread(), piece.n, w, i);
        sink.put(i, out, 0, 1);
    }
}
