// shapes.cu: warped ellipsoids, evaluated in their boxes.  Twins: cpu/shapes.py, cpu/lattice.py; oracle: tests/oracles.py
//
// A task is a slice of a blob's box.  Its displacement is a cubic B-spline over a lattice of Philox nodes: the block
// sums the lattice over z, then, sixteen rows at a time, over y, in shared memory; a voxel sums four nodes along x.
// The lattice itself is never stored.  Float64 throughout, in the twin's order: a boundary voxel must not depend on the
// device.  Floor: about 40 float64 operations for each voxel of the boxes that the culling of rows leaves.
constexpr double SURFACE = 1.0 + 1e-9;
constexpr int PLANE_NODES = 640, ROW_NODES = 40;  // of a slice, and along x, that fit; more take the plain way
constexpr int ROWS_AT_ONCE = 16, PANEL = THREADS;  // rows and voxels along x that are prepared together

struct Spline {
    double w[4];
    int first;  // node of w[0]
};

// Cubic B-spline at t: weights of the nodes floor(t) - 1 ... floor(t) + 2.
__device__ __forceinline__ Spline spline_at(double t) {
    double k = floor(t), f = t - k, g = 1.0 - f;
    return {{g * g * g / 6.0, 2.0 / 3.0 - f * f * (1.0 - 0.5 * f), 2.0 / 3.0 - g * g * (1.0 - 0.5 * g), f * f * f / 6.0},
            (int)k - 1};
}

// Displacement of a node, component i; node (0, 0, 0) is at the centre.
__device__ __forceinline__ Words node_words(const Item& item, const Blob& blob, int i, int z, int y, int quad) {
    u32 plane = ((u32)(z + 32768) << 16) | (u32)(y + 32768);
    return philox4x32_10((u32)quad, plane, item.sample, 3u * blob.component + i, item.seed, WARP_STREAM);
}
__device__ __forceinline__ double displacement_of(const Blob& blob, u32 word) {
    return blob.bound * (2.0 * (double)uniform_of(word) - 1.0);
}
constexpr int NODE_X = 1 << 20;  // added to a node's x

// A slice of a blob's box, and the part of the lattice it depends on; in shared memory, one a block.
struct Slice {
    const Item* item;
    const Blob* blob;
    const State* state;
    double pz;
    Spline z;
    int first_y, first_x, nodes_y, nodes_x;
};

__device__ __forceinline__ double offset_of(const Slice& s, int axis, int at) {
    return (double)(at - s.state->center[axis]) * s.item->scale[axis];
}

__device__ Slice slice_of(const Item& item, const Blob& blob, const State& state, int z) {
    Slice s = {&item, &blob, &state};
    s.pz = offset_of(s, 0, z);
    s.z = spline_at(s.pz / blob.spacing);
    int start_y = state.start[1], start_x = state.start[2];
    s.first_y = (int)floor(offset_of(s, 1, start_y) / blob.spacing) - 1;
    s.first_x = (int)floor(offset_of(s, 2, start_x) / blob.spacing) - 1;
    s.nodes_y = (int)floor(offset_of(s, 1, start_y + state.size[1] - 1) / blob.spacing) + 3 - s.first_y;
    s.nodes_x = (int)floor(offset_of(s, 2, start_x + state.size[2] - 1) / blob.spacing) + 3 - s.first_x;
    return s;
}

// Sum the lattice over z: plane[i][y][x].
__device__ __noinline__ void sum_over_z(const Slice& s, double* plane) {
    int quad0 = (s.first_x + NODE_X) >> 2, quads = ((s.first_x + s.nodes_x - 1 + NODE_X) >> 2) - quad0 + 1;
    for (int t = threadIdx.x; t < 3 * s.nodes_y * quads; t += THREADS) {
        int quad = quad0 + t % quads, y = t / quads % s.nodes_y, i = t / quads / s.nodes_y;
        double sum[4];
#pragma unroll 1
        for (int k = 0; k < 4; ++k) {
            Words words = node_words(*s.item, *s.blob, i, s.z.first + k, s.first_y + y, quad);
#pragma unroll
            for (int c = 0; c < 4; ++c) {
                double node = displacement_of(*s.blob, words.w[c]);
                sum[c] = k == 0 ? s.z.w[0] * node : fma(s.z.w[k], node, sum[c]);
            }
        }
#pragma unroll
        for (int c = 0; c < 4; ++c) {
            int x = 4 * quad + c - NODE_X - s.first_x;
            if (x >= 0 && x < s.nodes_x) plane[(i * s.nodes_y + y) * s.nodes_x + x] = sum[c];
        }
    }
}

// Sum a plane over y for rows y0 ... of the volume: rows[r][i][x].
__device__ void sum_over_y(const Slice& s, const double* plane, int y0, int count, double* rows) {
    for (int t = threadIdx.x; t < count * 3 * s.nodes_x; t += THREADS) {
        int x = t % s.nodes_x, i = t / s.nodes_x % 3, r = t / s.nodes_x / 3;
        Spline y = spline_at(offset_of(s, 1, y0 + r) / s.blob->spacing);
        const double* from = plane + (i * s.nodes_y + y.first - s.first_y) * s.nodes_x + x;
        double sum = y.w[0] * from[0];
#pragma unroll
        for (int k = 1; k < 4; ++k) sum = fma(y.w[k], from[k * s.nodes_x], sum);
        rows[t] = sum;
    }
}

// First and last voxel of a row that can lie in the blob, given the range of its displacements.  Twin: _possible
__device__ __noinline__ int2 possible(const Slice& s, double py, const double* row) {
    double middle[3], half[3];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        double low = row[i * s.nodes_x], high = low;
        for (int k = 1; k < s.nodes_x; ++k) {
            low = fmin(low, row[i * s.nodes_x + k]);
            high = fmax(high, row[i * s.nodes_x + k]);
        }
        middle[i] = 0.5 * (high + low);
        half[i] = 0.5 * (high - low);
    }
    double aa = 0.0, ab = 0.0, bb = 0.0, reach = 0.0;
#pragma unroll
    for (int j = 0; j < 3; ++j) {
        double u0 = s.blob->to_unit[0][j], u1 = s.blob->to_unit[1][j], u2 = s.blob->to_unit[2][j];
        double a = u0 * (s.pz + middle[0]) + u1 * (py + middle[1]) + u2 * middle[2];
        double b = u2 * s.item->scale[2];
        double r = fabs(u0) * half[0] + fabs(u1) * half[1] + fabs(u2) * half[2];
        aa += a * a;
        ab += a * b;
        bb += b * b;
        reach += r * r;
    }
    double level = 1.0 + 1e-6 + sqrt(reach);  // rounding must not cut a voxel off
    double discriminant = ab * ab - bb * (aa - level * level);
    if (discriminant < 0.0) return make_int2(0, -1);
    double center = s.state->center[2] - ab / bb, width = sqrt(discriminant) / bb;
    int first = s.state->start[2], last = first + s.state->size[2] - 1;
    return make_int2(imax(first, (int)fmax(center - width, -1.0)), imin(last, (int)fmin(center + width + 1.0, 1e9)));
}

// Whether the warped position v lies inside.
__device__ __forceinline__ bool is_inside(const Blob& blob, double vz, double vy, double vx) {
    const double(*u)[3] = blob.to_unit;
    double q0 = fma(u[2][0], vx, fma(u[1][0], vy, u[0][0] * vz));
    double q1 = fma(u[2][1], vx, fma(u[1][1], vy, u[0][1] * vz));
    double q2 = fma(u[2][2], vx, fma(u[1][2], vy, u[0][2] * vz));
    return fma(q2, q2, fma(q1, q1, q0 * q0)) <= SURFACE;
}

// One voxel from the nodes themselves, 64 for each component: slow, and the same bits.
__device__ __noinline__ bool plain_inside(const Slice& s, int y, int x) {
    double v[3] = {s.pz, offset_of(s, 1, y), offset_of(s, 2, x)};
    Spline wy = spline_at(v[1] / s.blob->spacing), wx = spline_at(v[2] / s.blob->spacing);
#pragma unroll 1
    for (int i = 0; i < 3; ++i) {
#pragma unroll 1
        for (int a = 0; a < 4; ++a) {
            int node = wx.first + a + NODE_X;
            double row = 0.0;
#pragma unroll 1
            for (int b = 0; b < 4; ++b) {
                double column = 0.0;
#pragma unroll 1
                for (int c = 0; c < 4; ++c) {
                    Words words = node_words(*s.item, *s.blob, i, s.z.first + c, wy.first + b, node >> 2);
                    double d = displacement_of(*s.blob, words.w[node & 3]);
                    column = c == 0 ? s.z.w[0] * d : fma(s.z.w[c], d, column);
                }
                row = b == 0 ? wy.w[0] * column : fma(wy.w[b], column, row);
            }
            v[i] = fma(wx.w[a], row, v[i]);
        }
    }
    return is_inside(*s.blob, v[0], v[1], v[2]);
}

// What a warp found of its blob.
struct Extent {
    int low_y, high_y, low_x, high_x;
};

__device__ __forceinline__ void note(Extent& e, int y, int word, u32 bits) {
    if (bits == 0) return;
    e.low_y = imin(e.low_y, y);
    e.high_y = imax(e.high_y, y);
    e.low_x = imin(e.low_x, 32 * word + __ffs(bits) - 1);
    e.high_x = imax(e.high_x, 32 * word + 31 - __clz(bits));
}

// One word of a row: the lung's bits, and where the blob's go.
struct Place {
    const u32* lungs;
    u32* bits;
};

__device__ __forceinline__ Place place_of(const Batch& batch, const Slice& s, int z, int y) {
    i64 line = ((i64)s.blob->item * batch.depth + z) * batch.height + y;
    i64 row = (i64)(z - s.state->start[0]) * s.state->size[1] + y - s.state->start[1];
    return {lungs_of(batch, line) + s.state->word, (u32*)batch.bits + s.blob->bits + row * s.state->words};
}

__device__ __noinline__ void draw_plain(const Batch& batch, const Slice& s, int z, Extent& found) {
    for (int t = warp_of_thread(); t < s.state->size[1] * s.state->words; t += WARPS) {
        int y = s.state->start[1] + t / s.state->words, w = t % s.state->words;
        int x = 32 * (s.state->word + w) + lane_of_thread();
        Place at = place_of(batch, s, z, y);
        u32 lung = at.lungs[w];
        bool on = lung >> lane_of_thread() & 1 && x >= s.state->start[2] && x < s.state->start[2] + s.state->size[2];
        u32 bits = __ballot_sync(ALL_LANES, on && plain_inside(s, y, x));
        if (lane_of_thread() == 0) at.bits[w] = bits;
        note(found, y, s.state->word + w, bits);
    }
}

// Scratch of a task: 40,064 bytes.
struct Workspace {
    double plane[3 * PLANE_NODES];
    double rows[ROWS_AT_ONCE * 3 * ROW_NODES];
    double weights[4][PANEL];
    int node[PANEL];
    int2 span[ROWS_AT_ONCE];
};

// Rows y0 ... of one panel of words: a warp takes a word of a row.
__device__ void draw_rows(const Batch& batch, const Slice& s, int z, int y0, int count, int w0, int panel_words,
                          const Workspace& work, Extent& found) {
    int stride = 3 * s.nodes_x;
    for (int t = warp_of_thread(); t < panel_words * count; t += WARPS) {
        int r = t % count, w = w0 + t / count, column = 32 * (w - w0) + lane_of_thread();
        int x = 32 * (s.state->word + w) + lane_of_thread(), y = y0 + r;
        Place at = place_of(batch, s, z, y);
        u32 bits = 0, lung = at.lungs[w];
        bool wanted = work.span[r].x <= work.span[r].y && work.span[r].x < x - lane_of_thread() + WARP &&
                      work.span[r].y >= x - lane_of_thread();
        if (lung != 0 && wanted) {
            double vz = s.pz, vy = offset_of(s, 1, y), vx = offset_of(s, 2, x);
            const double* row = work.rows + r * stride + work.node[column];
#pragma unroll
            for (int a = 0; a < 4; ++a) {
                double weight = work.weights[a][column];
                vz = fma(weight, row[a], vz);
                vy = fma(weight, row[s.nodes_x + a], vy);
                vx = fma(weight, row[2 * s.nodes_x + a], vx);
            }
            bool on = x >= s.state->start[2] && x < s.state->start[2] + s.state->size[2];
            bits = __ballot_sync(ALL_LANES, on && is_inside(*s.blob, vz, vy, vx)) & lung;
        }
        if (lane_of_thread() == 0) at.bits[w] = bits;
        note(found, y, s.state->word + w, bits);
    }
}

__device__ void draw_slice(const Batch& batch, const Slice& s, int z, Workspace& work, Extent& found) {
    sum_over_z(s, work.plane);
    for (int w0 = 0; w0 < s.state->words; w0 += PANEL / WARP) {
        int panel_words = imin(PANEL / WARP, s.state->words - w0);
        // Outside the box the nearest voxel stands in; its bit is not set.
        int x = imax(s.state->start[2], imin(32 * (s.state->word + w0) + (int)threadIdx.x, s.state->start[2] + s.state->size[2] - 1));
        Spline along_x = spline_at(offset_of(s, 2, x) / s.blob->spacing);
        __syncthreads();  // the last panel is done
#pragma unroll
        for (int a = 0; a < 4; ++a) work.weights[a][threadIdx.x] = along_x.w[a];
        work.node[threadIdx.x] = along_x.first - s.first_x;
        for (int y0 = 0; y0 < s.state->size[1]; y0 += ROWS_AT_ONCE) {
            int count = imin(ROWS_AT_ONCE, s.state->size[1] - y0), y = s.state->start[1] + y0;
            __syncthreads();  // the plane is summed, the last rows are drawn
            sum_over_y(s, work.plane, y, count, work.rows);
            __syncthreads();
            if ((int)threadIdx.x < count)
                work.span[threadIdx.x] = possible(s, offset_of(s, 1, y + threadIdx.x), work.rows + threadIdx.x * 3 * s.nodes_x);
            __syncthreads();
            draw_rows(batch, s, z, y, count, w0, panel_words, work, found);
        }
    }
}

// Blob and slice of a task; the slice may lie beyond the box.
__device__ __forceinline__ int2 task_of(const Batch& batch, int task) {
    const Blob* blobs = (const Blob*)batch.blobs;
    int b = last_at_most([=](int k) { return (i64)blobs[k].first_task; }, batch.n_blobs, task);
    return make_int2(b, task - blobs[b].first_task);
}

KERNEL_OF(2) draw_blobs(Batch* table) {
    __shared__ Workspace work;
    __shared__ Slice s;
    const Batch& batch = *table;
    for (int task = blockIdx.x; task < batch.n_tasks; task += gridDim.x) {
        int2 at = task_of(batch, task);
        const Blob& blob = blob_of(batch, at.x);
        State& state = state_of(batch, at.x);
        if (at.y >= state.size[0]) continue;
        int z = state.start[0] + at.y;
        __syncthreads();  // the last slice is drawn
        if (threadIdx.x == 0) s = slice_of(item_of(batch, blob.item), blob, state, z);
        __syncthreads();
        Extent found = {NOTHING, -1, NOTHING, -1};
        bool fits = s.nodes_x <= ROW_NODES && s.nodes_y * s.nodes_x <= PLANE_NODES && !batch.plain;
        if (fits) draw_slice(batch, s, z, work, found);
        else draw_plain(batch, s, z, found);
        if (lane_of_thread() == 0 && found.high_y >= 0) {
            atomicMin(&state.low[0], z);
            atomicMax(&state.high[0], z);
            atomicMin(&state.low[1], found.low_y);
            atomicMax(&state.high[1], found.high_y);
            atomicMin(&state.low[2], found.low_x);
            atomicMax(&state.high[2], found.high_x);
        }
    }
}
