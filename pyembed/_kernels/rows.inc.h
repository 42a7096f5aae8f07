/* The loops, written once. Each rows_<level>.c includes this file under its own target and names the result
 * PE_LEVEL; the compiler vectorises. The one intrinsic is the streaming store, which C cannot express.
 */
#include <math.h>
#include <string.h>
#include "kernels.h"

#define PE_CAT2(a, b) a##b
#define PE_CAT(a, b) PE_CAT2(a, b)
#define PE_STR2(a) #a
#define PE_STR(a) PE_STR2(a)

#ifdef __GNUC__
#define PE_INLINE static inline __attribute__((always_inline))
#define PE_NOINLINE static __attribute__((noinline))
#else
#define PE_INLINE static inline
#define PE_NOINLINE static
#endif

/* Builtins, since -march=native makes the intrinsics of xmmintrin.h of another target than the levels are. */
#if defined(__x86_64__) && defined(__GNUC__)
typedef float pe_f4 __attribute__((vector_size(16)));
#ifdef __clang__
#define PE_STREAM(to, v) __builtin_nontemporal_store(v, (pe_f4 *)(to))
#else
#define PE_STREAM(to, v) __builtin_ia32_movntps(to, v)
#endif
#endif

#include "random.inc.h"
#include "sums.inc.h"

static void copy_row(float *restrict dst_d, const float *restrict src_d, int64_t d) {
    for (int64_t i = 0; i < d; i++) dst_d[i] = src_d[i];
}

static void stream_row(float *restrict dst_d, const float *restrict src_d, int64_t d) {
    int64_t i = 0;
#ifdef PE_STREAM
    /* movntps wants 16-byte alignment; whole lines at a time keep the write-combining buffers full. */
    if (((uintptr_t)dst_d & 15) == 0)
        for (; i + 4 <= d; i += 4) {
            pe_f4 v;
            memcpy(&v, src_d + i, sizeof v);
            PE_STREAM(dst_d + i, v);
        }
#endif
    for (; i < d; i++) dst_d[i] = src_d[i];
}

static void axpy_row(float *restrict acc_d, const float *restrict src_d, float alpha, int64_t d) {
    for (int64_t i = 0; i < d; i++) acc_d[i] += alpha * src_d[i];
}

static void scale_row(float *restrict dst_d, float alpha, int64_t d) {
    for (int64_t i = 0; i < d; i++) dst_d[i] *= alpha;
}

static void divide_row(float *restrict dst_d, float by, int64_t d) {
    for (int64_t i = 0; i < d; i++) dst_d[i] /= by;
}

/* A NaN stays one: both comparisons are false. */
static void clamp_row(float *restrict dst_d, float most, int64_t d) {
    for (int64_t i = 0; i < d; i++) {
        const float x = dst_d[i], low = x < -most ? -most : x;
        dst_d[i] = low > most ? most : low;
    }
}

static void max_row(float *restrict best_d, const float *restrict src_d, int64_t d) {
    for (int64_t i = 0; i < d; i++) best_d[i] = src_d[i] > best_d[i] ? src_d[i] : best_d[i];
}

static void max_which_row(float *restrict best_d, int64_t *restrict which_d, const float *restrict src_d, int64_t id,
                          int64_t d) {
    for (int64_t i = 0; i < d; i++) which_d[i] = src_d[i] > best_d[i] ? id : which_d[i];
    max_row(best_d, src_d, d);
}

/* Reductions: lane i mod 16 sums every sixteenth element, then the lanes are summed in halves. So the order, and the
 * bits, do not depend on the width of a vector. */
#define PE_SUM_LANES 16
#define PE_TREE(lane)                                         \
    for (int half = PE_SUM_LANES / 2; half; half /= 2)        \
        for (int l = 0; l < half; l++) lane[l] += lane[l + half];
#define PE_LANE_SUM(lane, term)                                                     \
    {                                                                               \
        int64_t at = 0;                                                             \
        for (; at + PE_SUM_LANES <= d; at += PE_SUM_LANES)                          \
            for (int l = 0; l < PE_SUM_LANES; l++) {                                \
                const int64_t i = at + l;                                           \
                lane[l] += (term);                                                  \
            }                                                                       \
        for (int64_t i = at; i < d; i++) lane[i - at] += (term);                    \
        PE_TREE(lane)                                                               \
    }

static float dot_row(const float *restrict a_d, const float *restrict b_d, int64_t d) {
    float lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, a_d[i] * b_d[i])
    return lane[0];
}

/* The sum of squares in double: it neither overflows nor loses small terms. */
static double squares_row(const float *restrict src_d, int64_t d) {
    double lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, (double)src_d[i] * (double)src_d[i])
    return lane[0];
}

/* Each norm is a function of its own, so that its lanes live in registers. */
static double norm2_row(const float *restrict src_d, int64_t d) { return sqrt(squares_row(src_d, d)); }

static double norm1_row(const float *restrict src_d, int64_t d) {
    double lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, fabs((double)src_d[i]))
    return lane[0];
}

/* The bits of the largest |x|. As integers, positive floats are ordered, and NaN is above infinity. */
PE_INLINE int32_t largest_bits(const float *restrict src_d, int64_t d) {
    int32_t largest = 0;
    for (int64_t i = 0; i < d; i++) {
        int32_t bits;
        memcpy(&bits, src_d + i, sizeof bits);
        bits &= 0x7fffffff;
        largest = bits > largest ? bits : largest;
    }
    return largest;
}

/* The largest |x|, or NaN if there is one. */
static float largest_span(const float *restrict src_d, int64_t d) {
    const int32_t bits = largest_bits(src_d, d);
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static double norm0_row(const float *restrict src_d, int64_t d) {
    double lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, (double)(src_d[i] != 0.0f))
    return lane[0];
}

/* (sum |x|^p)^(1/p); p = 0 counts what is not zero, p = inf takes the largest. NaN if a NaN is among them. */
static double norm_row(const float *src_d, double p, int64_t d) {
    if (p == 2.0) return norm2_row(src_d, d);
    if (p == 1.0) return norm1_row(src_d, d);
    const double largest = largest_span(src_d, d);
    if (largest != largest) return largest;
    if (p == 0.0) return norm0_row(src_d, d);
    if (isinf(p) || largest == 0.0 || isinf(largest)) return largest;
    double lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, pow(fabs((double)src_d[i]) / largest, p)) /* relative, so that no power overflows */
    return largest * pow(lane[0], 1.0 / p);
}

#include "rules.inc.h"

const pe_kernels PE_CAT(pe_kernels_, PE_LEVEL) = {
    .name = PE_STR(PE_LEVEL),
    .copy_row = copy_row,
    .stream_row = stream_row,
    .add_rows = add_rows,
    .axpy_row = axpy_row,
    .scale_row = scale_row,
    .divide_row = divide_row,
    .clamp_row = clamp_row,
    .max_row = max_row,
    .max_which_row = max_which_row,
    .dot_row = dot_row,
    .norm_row = norm_row,
    .largest_span = largest_span,
    .squares_row = squares_row,
    .rules = PE_RULE_TABLE,
    .uniform_blocks = uniform_blocks,
    .normal_blocks = normal_blocks,
};
