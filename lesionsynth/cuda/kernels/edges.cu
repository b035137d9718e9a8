// edges.cu: erroneous edges (PAPER.md III-B), bright components of which most lies in the lung mask's shell.
// Twins: cpu/edges.py, cpu/shell.py; oracle: SciPy's erosion and labels in tests/test_lungs_edges.py
//
// The image is read once for what is bright and once for the result; between, everything works on bits and on
// the nodes of label.cu.
struct EdgesState {
    u32 found, strange;  // a voxel of the mask; one of them outside [0, 1]
};

// Voxels of the mask at or above the level; a warp is a word.
template <class Real>
__device__ __forceinline__ void mark_bright(const Real* image, const u32* lungs, u32* bright, EdgesState* state, i64 rows,
                                            int width, Real level) {
    int words = words_of(width), lane = lane_of_thread();
    bool found = false, strange = false;
    for (i64 t = first_warp_task(); t < rows * words; t += warp_task_step()) {
        u32 lung = lungs[t], above = 0;
        if (lung) {
            bool on = lung >> lane & 1u;
            Real value = on ? image[first_voxel(t, width) + lane] : (Real)0;
            strange |= !(value >= (Real)0 && value <= (Real)1);
            above = __ballot_sync(ALL_LANES, on && value >= level);
            found = true;
        }
        if (lane == 0) bright[t] = above;
    }
    if (found && lane == 0) *(volatile u32*)&state->found = 1;  // all write the same
    if (strange) *(volatile u32*)&state->strange = 1;
}

// Floor: 1/8 and the lungs' values read, 1/8 written.
KERNEL edges_bright_float(const float* image, const u32* lungs, u32* bright, EdgesState* state, i64 rows, int width,
                          float level) {
    mark_bright(image, lungs, bright, state, rows, width, level);
}
KERNEL edges_bright_double(const double* image, const u32* lungs, u32* bright, EdgesState* state, i64 rows, int width,
                           double level) {
    mark_bright(image, lungs, bright, state, rows, width, level);
}

// Voxels of which the mask holds the whole column y - reach ... y + reach.  Floor: 1/8 read, 1/8 written.
KERNEL edges_erode_y(const u32* lungs, u32* out, int depth, int height, int width, int reach) {
    int words = words_of(width);
    for (i64 t = first_task(); t < (i64)depth * height * words; t += task_step()) {
        int y;
        divide(t / words, height, &y);
        u32 deep = y >= reach && y + reach < height ? lungs[t] : 0u;
        for (int d = 1; d <= reach && deep; ++d)
            deep &= lungs[t - (i64)d * words] & lungs[t + (i64)d * words];
        out[t] = deep;
    }
}

// Word w of a row moved by `by` voxels: its bit x is the row's voxel x - by.  Twin: shifted
__device__ __forceinline__ u32 shifted(const u32* row, int w, int words, int by) {
    int whole = by >> 5, part = by & (WARP - 1);  // rounds down, also where `by` is negative
    int from = w - whole;
    u32 here = from >= 0 && from < words ? row[from] : 0u;
    u32 before = from >= 1 && from <= words ? row[from - 1] : 0u;
    return part ? here << part | before >> (WARP - part) : here;
}

// The shell: the mask without the voxels around which it holds a whole square.  Floor: 2/8 read, 1/8 written.
KERNEL edges_shell(const u32* lungs, const u32* columns, u32* shell, i64 rows, int width, int reach) {
    int words = words_of(width);
    for (i64 t = first_task(); t < rows * words; t += task_step()) {
        int w;
        const u32* row = columns + divide(t, words, &w) * words;
        u32 deep = row[w];
        for (int d = 1; d <= reach && deep; ++d)
            deep &= shifted(row, w, words, d) & shifted(row, w, words, -d);
        shell[t] = lungs[t] & ~deep;
    }
}

// Voxels of a component, and those in the shell.
struct Tally {
    u32 size, contact;
};

__device__ __forceinline__ void add(Tally* tallies, int number, const Tally& tally) {
    if (tally.size) atomicAdd(&tallies[number].size, tally.size);
    if (tally.contact) atomicAdd(&tallies[number].contact, tally.contact);
}

// A thread takes the words of a sector and adds up what is one component's.  Floor: 2/8 and the nodes read.
KERNEL edges_measure(const u32* bright, const u32* shell, const int* table, Tally* tallies, i64 rows,
                     int width) {
    constexpr int SECTOR = 8;
    i64 words = rows * words_of(width);
    for (i64 s = first_task(); s * SECTOR < words; s += task_step()) {
        int current = 0;
        Tally tally = {0, 0};
        for (i64 t = s * SECTOR; t < lmin(s * SECTOR + SECTOR, words); ++t) {
            u32 rest = bright[t];
            if (rest == 0) continue;
            i64 first = first_voxel(t, width);
            for (; rest; rest &= ~lowest_run(rest)) {
                u32 run = lowest_run(rest);
                int number = number_of(table, first + __ffs(rest) - 1);
                if (number != current) {
                    add(tallies, current, tally);
                    current = number;
                    tally = {0, 0};
                }
                tally.size += __popc(run);
                tally.contact += __popc(run & shell[t]);
            }
        }
        add(tallies, current, tally);
    }
}

// Take the runs of erroneous components out of the mask.  Floor: 2/8 and the nodes read, 1/8 written.
KERNEL edges_clear(const u32* bright, const int* table, const Tally* tallies, u32* lungs, i64 rows, int width,
                   double fraction) {
    for (i64 t = first_task(); t < rows * words_of(width); t += task_step()) {
        u32 rest = bright[t], wrong = 0;
        if (rest == 0) continue;
        i64 first = first_voxel(t, width);
        for (; rest; rest &= ~lowest_run(rest)) {
            Tally tally = tallies[number_of(table, first + __ffs(rest) - 1)];
            if ((double)tally.contact > fraction * (double)tally.size) wrong |= lowest_run(rest);
        }
        lungs[t] &= ~wrong;
    }
}

// The image, 0 outside the mask, and the mask in bytes.
template <class Real>
__device__ __forceinline__ void keep_quads(const Real* image, const u32* lungs, Real* out, u8* mask, i64 voxels, int width) {
    bool wide = ((u64)image & 15) == 0;
    for (i64 q = first_task(); q < (voxels + 3) / 4; q += task_step()) {
        u32 four = bits_of_quad(lungs, q, voxels, width);
        put_bytes(mask, four, q, voxels);
        Quad<Real> values = {};
        if (four && wide && 4 * q + 4 <= voxels) {
            values = ((const Quad<Real>*)image)[q];
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (four >> k & 1u) values.v[k] = image[4 * q + k];
        }
#pragma unroll
        for (int k = 0; k < 4; ++k)
            if ((four >> k & 1u) == 0) values.v[k] = (Real)0;
        if (4 * q + 4 <= voxels) {
            ((Quad<Real>*)out)[q] = values;
        } else {
#pragma unroll
            for (int k = 0; k < 4; ++k)
                if (4 * q + k < voxels) out[4 * q + k] = values.v[k];
        }
    }
}

// Floor: 1/8 and the lungs' values read, a value and 1 written.
KERNEL edges_keep_float(const float* image, const u32* lungs, float* out, u8* mask, i64 voxels, int width) {
    keep_quads(image, lungs, out, mask, voxels, width);
}
KERNEL edges_keep_double(const double* image, const u32* lungs, double* out, u8* mask, i64 voxels, int width) {
    keep_quads(image, lungs, out, mask, voxels, width);
}
