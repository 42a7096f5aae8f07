/* Counter-based random floats: a block of PE_BLOCK values is a function of (seed, block) and of nothing else, so
 * any thread may make any block, in any order, at any level, and the bits are the same.
 *
 * Generator: Threefry4x32 with 13 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
 * It adds, rotates and xors, which every vector unit does; Philox multiplies 32 by 32 bits to 64, which compilers do
 * not vectorise well (3.7 ns a float, where this takes 0.44; one core of an EPYC 9005, v3). 16 lanes run side by side;
 * lane l of block b has the counter (b low, b high, l, 0) and the key (seed low, seed high, 0, 0). Word j of lane l is
 * value 16 j + l of the block.
 */
#define PE_LANES 16

#define PE_MIX(a, b, k)                                     \
    for (int l = 0; l < PE_LANES; l++) {                    \
        a[l] += b[l];                                       \
        b[l] = (b[l] << (k) | b[l] >> (32 - (k))) ^ a[l];   \
    }
#define PE_ROUND_PAIR(k0, k1, k2, k3)  \
    PE_MIX(x0, x1, k0)                 \
    PE_MIX(x2, x3, k1)                 \
    PE_MIX(x0, x3, k2)                 \
    PE_MIX(x2, x1, k3)
#define PE_ADD_KEY(s)                          \
    for (int l = 0; l < PE_LANES; l++) {       \
        x0[l] += key[(s) % 5];                 \
        x1[l] += key[(s + 1) % 5];             \
        x2[l] += key[(s + 2) % 5];             \
        x3[l] += key[(s + 3) % 5] + (s);       \
    }

/* Not inlined: GCC 12 takes the words apart otherwise, and a uniform takes 0.46 ns instead of 0.25 (v4). */
PE_NOINLINE void threefry_block(uint32_t word[4][PE_LANES], uint64_t seed, uint64_t block) {
    const uint32_t key0 = (uint32_t)seed, key1 = (uint32_t)(seed >> 32);
    const uint32_t key[5] = {key0, key1, 0, 0, 0x1BD11BDAu ^ key0 ^ key1};
    uint32_t x0[PE_LANES], x1[PE_LANES], x2[PE_LANES], x3[PE_LANES];
    for (int l = 0; l < PE_LANES; l++) {
        x0[l] = (uint32_t)block + key0;
        x1[l] = (uint32_t)(block >> 32) + key1;
        x2[l] = (uint32_t)l;
        x3[l] = 0;
    }
    PE_ROUND_PAIR(10, 26, 11, 21)
    PE_ROUND_PAIR(13, 27, 23, 5)
    PE_ADD_KEY(1)
    PE_ROUND_PAIR(6, 20, 17, 11)
    PE_ROUND_PAIR(25, 10, 18, 20)
    PE_ADD_KEY(2)
    PE_ROUND_PAIR(10, 26, 11, 21)
    PE_ROUND_PAIR(13, 27, 23, 5)
    PE_ADD_KEY(3)
    PE_MIX(x0, x1, 6)
    PE_MIX(x2, x3, 20)
    memcpy(word[0], x0, sizeof x0);
    memcpy(word[1], x1, sizeof x1);
    memcpy(word[2], x2, sizeof x2);
    memcpy(word[3], x3, sizeof x3);
}

/* low + width * k / 2^24, k an integer in 0 .. 2^24 - 1 */
PE_INLINE void uniform_block(float *restrict dst, uint64_t seed, uint64_t block, float low, float width) {
    uint32_t word[4][PE_LANES];
    threefry_block(word, seed, block);
    const uint32_t *flat = &word[0][0];
    for (int i = 0; i < PE_BLOCK; i++) dst[i] = low + width * ((float)(int32_t)(flat[i] >> 8) * 0x1p-24f);
}

/* Natural logarithm of u in (0, 1]: u = 2^e m with m in [sqrt(1/2), sqrt(2)), then a polynomial in m - 1
 * (coefficients of the Cephes library's logf). */
static inline float log_unit(float u) {
    int32_t bits;
    memcpy(&bits, &u, sizeof bits);
    const int32_t e = (bits - 0x3f3504f3) >> 23;
    bits -= (int32_t)((uint32_t)e << 23);
    float m;
    memcpy(&m, &bits, sizeof m);
    const float f = m - 1.0f, f2 = f * f;
    float p = 7.0376836292e-2f;
    p = p * f - 1.1514610310e-1f;
    p = p * f + 1.1676998740e-1f;
    p = p * f - 1.2420140846e-1f;
    p = p * f + 1.4249322787e-1f;
    p = p * f - 1.6668057665e-1f;
    p = p * f + 2.0000714765e-1f;
    p = p * f - 2.4999993993e-1f;
    p = p * f + 3.3333331174e-1f;
    return (p * f * f2 - 0.5f * f2 + f) + (float)e * 0.693147180559945f;
}

/* Box-Muller: of two words, one is the radius and one the angle, and they make two normals. The radius uses 31 bits,
 * so the tail reaches 6.6 standard deviations. The angle is a quadrant and a signed part of it in [-pi/4, pi/4). */
PE_INLINE void normal_block(float *restrict dst, uint64_t seed, uint64_t block, float mean, float std) {
    uint32_t word[4][PE_LANES];
    threefry_block(word, seed, block);
    for (int j = 0; j < 4; j += 2)
        for (int l = 0; l < PE_LANES; l++) {
            const float u = (float)(int32_t)(word[j][l] >> 1) * 0x1p-31f + 0x1p-32f;
            const float radius = sqrtf(-2.0f * log_unit(u)) * std;
            const uint32_t quadrant = (word[j + 1][l] + 0x20000000u) >> 30;
            const int32_t part = (int32_t)(word[j + 1][l] - (quadrant << 30));
            const float t = (float)part * 1.4629180792671596e-9f; /* pi / 2 / 2^30 */
            const float t2 = t * t;
            const float s = ((-1.9515295891e-4f * t2 + 8.3321608736e-3f) * t2 - 1.6666654611e-1f) * t2 * t + t;
            const float c = ((2.443315711809948e-5f * t2 - 1.388731625493765e-3f) * t2 + 4.166664568298827e-2f) * t2 * t2
                            - 0.5f * t2 + 1.0f;
            const float cosine = quadrant & 1 ? s : c, sine = quadrant & 1 ? c : s;
            const float cosine_signed = (quadrant + 1) & 2 ? -cosine : cosine;
            const float sine_signed = quadrant & 2 ? -sine : sine;
            dst[PE_LANES * j + l] = radius * cosine_signed + mean;
            dst[PE_LANES * (j + 1) + l] = radius * sine_signed + mean;
        }
}

static void uniform_blocks(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float low, float width) {
    for (int64_t b = 0; b < blocks; b++) uniform_block(dst + b * PE_BLOCK, seed, block + (uint64_t)b, low, width);
}

static void normal_blocks(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float mean, float std) {
    for (int64_t b = 0; b < blocks; b++) normal_block(dst + b * PE_BLOCK, seed, block + (uint64_t)b, mean, std);
}
