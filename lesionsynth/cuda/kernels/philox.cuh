// philox.cuh: Philox4x32-10 (Salmon et al., SC 2011).  Twin: cpu/philox.py
//     key = (seed, stream), counter = (x >> 2, (z << 16) | y, sample, component); word x & 3 is voxel x's.
// Golden words, Random123's known answer: counter (243f6a88 85a308d3 13198a2e 03707344), key (a4093822 299f31d0)
// give (d16cfe09 94fdcceb 5001e420 24126ea1).
enum Stream : u32 { WARP_STREAM = 1, PROBABILITY_STREAM = 2, SALT_STREAM = 3 };

struct Words {
    u32 w[4];
};

__device__ __forceinline__ Words philox4x32_10(u32 c0, u32 c1, u32 c2, u32 c3, u32 k0, u32 k1) {
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        u32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        u32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {{c0, c1, c2, c3}};
}

// A word as a uniform in [0, 1) on the grid of 2^-24, exact on every device.
__device__ __forceinline__ float uniform_of(u32 word) { return (float)(word >> 8) * 5.9604644775390625e-8f; }
