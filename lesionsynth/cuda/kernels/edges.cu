// edges.cu: erroneous edges (PAPER.md III-B).  Twins: cpu/edges.py, cpu/shell.py; oracle: tests/test_lungs_edges.py
//
// Bits throughout, and the runs of kernels/label.cu; the image is read twice and written once.
enum EdgeStatus { EMPTY_LUNGS, OUTSIDE_RANGE };

// Bits of bright tissue, `(image >= level) & mask`.
template <class T>
__device__ void threshold_words(const T* image, const u32* lungs, int depth, int height, int width, T level, u32* bright, u32* status) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words, warps = (i64)gridDim.x * WARPS;
    for (i64 w = (i64)blockIdx.x * WARPS + warp_of_thread(); w < words; w += warps) {
        i64 first = w / s.words * width + w % s.words * 32;
        bool lung = lungs[w] >> lane_of_thread() & 1;
        T value = lung ? image[first + lane_of_thread()] : (T)0;
        u32 word = __ballot_sync(ALL_LANES, lung && value >= level);
        u32 strange = __ballot_sync(ALL_LANES, !(value >= (T)0 && value <= (T)1));
        if (lane_of_thread() == 0) {
            bright[w] = word;
            if (lungs[w]) ((volatile u32*)status)[EMPTY_LUNGS] = 0u;  // begins as 1
            if (strange) ((volatile u32*)status)[OUTSIDE_RANGE] = 1u;
        }
    }
}
KERNEL threshold_float(const float* image, const u32* lungs, int depth, int height, int width, double level, u32* bright, u32* status) {
    threshold_words<float>(image, lungs, depth, height, width, (float)level, bright, status);
}
KERNEL threshold_double(const double* image, const u32* lungs, int depth, int height, int width, double level, u32* bright, u32* status) {
    threshold_words<double>(image, lungs, depth, height, width, level, bright, status);
}

// Word w of a row with its voxels `by` further along x (or back), zeros beyond the row.
__device__ __forceinline__ u32 moved(const u32* row, int w, int words, int by) {
    int whole = by >> 5, rest = by & 31, k = w + whole;  // arithmetic shift: floor
    u32 low = k >= 0 && k < words ? row[k] : 0u;
    if (rest == 0) return low;
    u32 high = k + 1 >= 0 && k + 1 < words ? row[k + 1] : 0u;
    return low >> rest | high << (32 - rest);
}

// Voxels whose row is in the mask `reach` steps to both sides.
KERNEL erode_along_x(const u32* lungs, int depth, int height, int width, int reach, u32* out) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < words; t += (i64)gridDim.x * THREADS) {
        const u32* row = lungs + t / s.words * s.words;
        u32 deep = lungs[t];
        for (int k = 1; k <= reach && deep; ++k) deep &= moved(row, (int)(t % s.words), s.words, k) & moved(row, (int)(t % s.words), s.words, -k);
        out[t] = deep;
    }
}

// The shell: voxels of the mask without the whole square around them.
KERNEL shell_of(const u32* lungs, const u32* rows, int depth, int height, int width, int reach, u32* shell) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < words; t += (i64)gridDim.x * THREADS) {
        int y = (int)(t / s.words % height);
        u32 deep = y - reach >= 0 && y + reach < height ? lungs[t] : 0u;
        for (int k = -reach; k <= reach && deep; ++k) deep &= rows[t + (i64)k * s.words];
        shell[t] = lungs[t] & ~deep;
    }
}

// Size of each component, and how much of it lies in the shell.
KERNEL measure_runs(const u32* bright, const u32* shell, int depth, int height, int width, const int* parents, u32* sizes, u32* contacts) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words;
    for (i64 t = (i64)blockIdx.x * THREADS + threadIdx.x; t < words; t += (i64)gridDim.x * THREADS) {
        i64 first = t / s.words * width + t % s.words * 32;
        for (u32 left = bright[t]; left;) {
            int x = __ffs(left) - 1;
            u32 rest = ~(left >> x);
            int length = rest ? __ffs(rest) - 1 : 32;
            u32 run = (length == 32 ? 0xFFFFFFFFu : (1u << length) - 1u) << x;
            int number = number_at(parents, first + x);
            atomicAdd(&sizes[number], (u32)length);
            u32 contact = __popc(run & shell[t]);
            if (contact) atomicAdd(&contacts[number], contact);
            left &= ~run;
        }
    }
}

// Mask and image without the erroneous components.
template <class T>
__device__ void keep_words(const T* image, const u32* lungs, const u32* bright, int depth, int height, int width, const int* parents,
                           const u32* sizes, const u32* contacts, double fraction, T* out, u8* kept) {
    Shape s = shape_of(depth, height, width);
    i64 words = rows_of(s) * s.words, warps = (i64)gridDim.x * WARPS;
    for (i64 w = (i64)blockIdx.x * WARPS + warp_of_thread(); w < words; w += warps) {
        i64 first = w / s.words * width + w % s.words * 32, v = first + lane_of_thread();
        if ((int)(w % s.words) * 32 + lane_of_thread() >= width) continue;
        bool keep = lungs[w] >> lane_of_thread() & 1;
        if (bright[w] >> lane_of_thread() & 1) {
            int number = number_at(parents, first + run_start(bright[w], lane_of_thread()));
            keep = !((double)contacts[number] > fraction * (double)sizes[number]);
        }
        out[v] = keep ? image[v] : (T)0;
        kept[v] = keep;
    }
}
KERNEL keep_float(const float* image, const u32* lungs, const u32* bright, int depth, int height, int width, const int* parents,
                  const u32* sizes, const u32* contacts, double fraction, float* out, u8* kept) {
    keep_words<float>(image, lungs, bright, depth, height, width, parents, sizes, contacts, fraction, out, kept);
}
KERNEL keep_double(const double* image, const u32* lungs, const u32* bright, int depth, int height, int width, const int* parents,
                   const u32* sizes, const u32* contacts, double fraction, double* out, u8* kept) {
    keep_words<double>(image, lungs, bright, depth, height, width, parents, sizes, contacts, fraction, out, kept);
}
