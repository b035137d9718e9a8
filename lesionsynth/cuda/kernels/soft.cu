// soft.cu: how near a voxel of a lesion is to the way out, for lesions with a soft edge.  Twin: cpu/soft_edge.py
//
//     d2 = min over dz of (t_z(dz) + min over dy of (t_y(dy) + min over dx of t_x(dx))),  t_i(k) = (k s_i)^2,
//
// over voxels of the volume that are not the lesion's.  Rounding keeps the order of numbers, so minima may be taken axis
// by axis: along x from the lesion's bits and along y here, into field0, which nobody needs once b2 is in field1; along
// z where the lesion is injected.
constexpr int MOST_EDGE = 64;  // voxels of an edge; MOST_EDGE of plan.py
constexpr int NO_WAY = 255;    // steps where there is no way out, or one that is farther than the edge

struct EdgeMemory {
    u8 steps[EDGE_ROWS + 2 * MOST_EDGE][WARP];  // along x
};

__device__ __forceinline__ float squared(int steps, float step) {
    float distance = (float)steps * step;
    return distance * distance;
}

// Steps along an axis that may be shorter than the edge.
__device__ __forceinline__ int reach_of(float edge, float step) { return imin((int)(edge / step), MOST_EDGE); }

// The ways out among the 32 voxels from x on; a whole warp calls this.
__device__ u32 ways_out(const Batch& batch, Members& members, int z, int y, int x) {
    if (x < 0 || x >= batch.width) return 0;
    int n = batch.width - x;
    return ~members.at(z, y, x) & (n < WARP ? (1u << n) - 1u : ALL_LANES);
}

// Steps to the nearest of them along the row, a lane for each of the 32 voxels from x on.
__device__ int steps_along_x(const Batch& batch, Members& members, int z, int y, int x, int reach) {
    int lane = lane_of_thread();
    u32 here = ways_out(batch, members, z, y, x), right = here >> lane, left = here << (WARP - 1 - lane);
    int steps = imin(right ? __ffs(right) - 1 : NO_WAY, left ? __clz(left) : NO_WAY);
    for (int x1 = WARP; x1 - WARP < reach; x1 += WARP) {
        right = ways_out(batch, members, z, y, x + x1);
        left = ways_out(batch, members, z, y, x - x1);
        if (right) steps = imin(steps, x1 - lane + __ffs(right) - 1);
        if (left) steps = imin(steps, x1 + lane - (WARP - 1) + __clz(left));
    }
    return steps;
}

__device__ void edge_tile(const Batch& batch, const Lesion& l, i64 number, EdgeMemory& memory) {
    const Item& item = item_of(batch, blob_of(batch, l.root).item);
    int words = words_of(l), chunks = edge_chunks(l), lane = lane_of_thread();
    int chunk = (int)(number % chunks), word = (int)(number / chunks % words), z = (int)(number / chunks / words);
    int x = ((l.start[2] >> 5) + word) * WARP, column = x + lane - l.start[2];
    int first = l.start[1] + chunk * EDGE_ROWS, end = imin(first + EDGE_ROWS, l.start[1] + l.size[1]);
    float step_y = (float)item.scale[1], step_x = (float)item.scale[2];
    int reach_y = reach_of(item.edge, step_y), reach_x = reach_of(item.edge, step_x);
    int low = imax(first - reach_y, 0), high = imin(end + reach_y, batch.height);
    Members members(batch, l.root);
    __syncthreads();  // the last tile is done with the steps
    for (int y = low + warp_of_thread(); y < high; y += WARPS)
        memory.steps[y - low][lane] = (u8)steps_along_x(batch, members, l.start[0] + z, y, x, reach_x);
    __syncthreads();
    if (column < 0 || column >= l.size[2]) return;
    for (int y = first + warp_of_thread(); y < end; y += WARPS) {
        float least = __uint_as_float(0x7F800000u);  // infinity
        for (int k = 0; k <= reach_y; ++k) {
            float own = squared(k, step_y);
            if (own >= least) break;
            for (int at = y - k; at <= y + k; at += k ? 2 * k : 1) {
                int steps = at >= low && at < high ? memory.steps[at - low][lane] : NO_WAY;
                if (steps != NO_WAY) least = fminf(least, own + squared(steps, step_x));
            }
        }
        float* row = (float*)field_of(batch, l, 0) + ((i64)z * l.size[1] + y - l.start[1]) * l.pitch + l.skip;
        row[column] = least;
    }
}

KERNEL_OF(4) edge_in_plane(const Batch* table) {
    __shared__ EdgeMemory memory;
    const Batch& batch = *table;
    i64 tiles = tiles_in(batch, SOFTENING);
    for (i64 t = blockIdx.x; t < tiles; t += gridDim.x) {
        Tile tile = tile_of(batch, SOFTENING, t);
        edge_tile(batch, lesion_of(batch, tile.root), tile.number, memory);
    }
}

// e of a voxel in slice z of the box: 0 at the way out, 1 from the width of the edge on.  `in_plane` is its distance
// there.
__device__ float edge_of(const Batch& batch, const Item& item, const Lesion& l, const float* in_plane, int z) {
    float step = (float)item.scale[0], least = *in_plane;
    i64 plane = (i64)l.size[1] * l.pitch;
    for (int k = 1, reach = reach_of(item.edge, step); k <= reach; ++k) {
        float own = squared(k, step);
        if (own >= least) break;
        for (int at = z - k; at <= z + k; at += 2 * k) {
            if (l.start[0] + at < 0 || l.start[0] + at >= batch.depth) continue;
            bool beyond = at < 0 || at >= l.size[0];  // the box, where every voxel is a way out
            least = fminf(least, beyond ? own : own + in_plane[(at - z) * plane]);
        }
    }
    return fminf(__fdiv_rn(__fsqrt_rn(least), item.edge), 1.0f);
}
