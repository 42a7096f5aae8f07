/* The table of row kernels: what each one computes, and the contract that all of them keep.
 *
 * A kernel works on one row (or one span, or the rows of one sum) of float32. It allocates nothing, knows no thread, and cannot fail.
 * Legend: d floats in a row; *_d points to d floats, *_nd to n rows; no two pointers of a call overlap.
 *
 * Numerics contract. Every level (baseline, v3, v4) is the same C, compiled without contraction of a*b+c and without
 * -ffast-math, so every level gives the same bits, as does tests/reference/kernels.py.
 */
#ifndef PYEMBED_KERNELS_H
#define PYEMBED_KERNELS_H

#include <stdint.h>

/* Hyper-parameters of one step, already rounded to float32. A rule reads those that it names. */
typedef struct {
    float lr;           /* the step; Adam's carries both bias corrections. Rows may differ in it alone: frequency_power */
    float eps;
    float momentum;     /* SGD, LARS: what a buffer keeps */
    float one_minus_b1; /* what a gradient adds to a first moment: Adam, LAMB 1 - beta1; SGD 1 - dampening */
    float one_minus_b2; /* what a square adds to a second moment: Adam, LAMB 1 - beta2; RMSprop 1 - alpha */
    float correction;   /* LAMB: sqrt(1 - beta2^t) / (1 - beta1^t); LARS: eta */
    float decay;        /* LAMB, LARS: weight decay, which is part of their norms */
    float beta;         /* FTRL */
    float l1;
    float l2;
} pe_hyper;

/* col[0] is the weight, col[1..] the state columns of the rule, all of the same row: d floats each, or one. */
typedef void (*pe_update_row)(float *const *col, const float *grad_d, int64_t d, const pe_hyper *h);

/* A rule by its name. */
typedef struct {
    const char *name;
    pe_update_row row;
} pe_rule;

#define PE_MAX_RULES 32

/* The rows of one sum, in order: row ids_n[r] begins at base + ids_n[r] * stride floats. A sum is the one place where a
 * kernel loops over rows, because it must stay in registers (docs/decisions/0004). */
typedef struct {
    const float *base;
    int64_t stride;
    const void *ids_n;   /* int64 if wide, else int32 */
    int wide;
    const float *coef_n; /* what each row is multiplied with, or NULL */
    int64_t skip;        /* an id that is not taken, or -1 */
    int64_t n;
    int64_t beyond;      /* how many ids follow the n that are summed: their rows come next */
    int64_t ahead;       /* how many rows ahead memory is asked for */
} pe_sum;

/* What a row missed: n steps without a gradient, each of which multiplies the weight with `keep` and then takes a step of
 * momentum. In closed form, by doubling: weight = kept * weight - lr * moved * buffer, buffer = left * buffer. No division,
 * so none of the cases (keep = momentum, keep = 1) is special. */
typedef struct {
    double kept, left, moved;
} pe_missed;

static inline pe_missed pe_miss(double keep, double momentum, int64_t n) {
    pe_missed m = {1.0, 1.0, 0.0};
    int bits = 0;
    while (n >> bits) bits++;
    for (int bit = bits - 1; bit >= 0; bit--) {
        m.moved *= m.kept + m.left;
        m.kept *= m.kept;
        m.left *= m.left;
        if (n >> bit & 1) {
            m.left *= momentum;
            m.moved = keep * m.moved + m.left;
            m.kept *= keep;
        }
    }
    return m;
}

#define PE_BLOCK 64 /* floats of one block of a random stream */

typedef struct {
    const char *name;
    void (*copy_row)(float *dst_d, const float *src_d, int64_t d);
    void (*stream_row)(float *dst_d, const float *src_d, int64_t d); /* as copy, past the caches; see pe_stream_fence */
    /* acc += each row of s, in order; how many were taken */
    int64_t (*add_rows)(float *acc_d, const pe_sum *s, int64_t d);
    void (*axpy_row)(float *acc_d, const float *src_d, float alpha, int64_t d);  /* acc += alpha * src */
    void (*scale_row)(float *dst_d, float alpha, int64_t d);                     /* dst *= alpha */
    void (*divide_row)(float *dst_d, float by, int64_t d);                       /* dst /= by */
    void (*clamp_row)(float *dst_d, float most, int64_t d);                      /* into -most..most; NaN stays */
    void (*max_row)(float *best_d, const float *src_d, int64_t d);               /* best = src > best ? src : best */
    /* as max_row, and where src wins, which = id */
    void (*max_which_row)(float *best_d, int64_t *which_d, const float *src_d, int64_t id, int64_t d);
    float (*dot_row)(const float *a_d, const float *b_d, int64_t d);             /* 16 lanes and a tree */
    double (*squares_row)(const float *src_d, int64_t d);                        /* sum of squares in double, 16 lanes */
    double (*norm_row)(const float *src_d, double p, int64_t d);                 /* p-norm in double, 16 lanes; NaN if any */
    float (*largest_span)(const float *src_d, int64_t d);                        /* the largest |x|; NaN if any */
    pe_rule rules[PE_MAX_RULES];                                                 /* ends with a name that is NULL */
    /* Blocks from `block` on of the stream that `seed` names: PE_BLOCK floats each, a function of (seed, block) alone. */
    void (*uniform_blocks)(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float low, float width);
    void (*normal_blocks)(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float mean, float std);
} pe_kernels;

extern const pe_kernels pe_kernels_baseline;
#if defined(__x86_64__) && defined(__GNUC__)
#define PE_HAVE_V3 1
#define PE_HAVE_V4 1
extern const pe_kernels pe_kernels_v3, pe_kernels_v4;
#endif

/* The kernels of a level by name: NULL if the name is unknown or this processor lacks the level. */
const pe_kernels *pe_kernels_named(const char *name);
/* The best level of this processor. */
const pe_kernels *pe_kernels_best(void);

/* The order of streamed stores before the stores that follow. */
static inline void pe_stream_fence(void) {
#if defined(__x86_64__) && defined(__GNUC__)
    __builtin_ia32_sfence();
#endif
}

/* Prefetch every cache line of a row, to read it or to write it. A row may begin within a line. The empty asm is for GCC, which
 * takes a function that only prefetches for one without effect, and drops calls of it that it has not inlined yet. */
static inline void pe_prefetch_read(const float *src_d, int64_t d) {
#ifdef __GNUC__
    const char *p = (const char *)((uintptr_t)src_d & ~(uintptr_t)63), *end = (const char *)(src_d + d);
    for (; p < end; p += 64) __builtin_prefetch(p, 0, 3);
    __asm__ volatile("");
#endif
}
static inline void pe_prefetch_write(const float *src_d, int64_t d) {
#ifdef __GNUC__
    const char *p = (const char *)((uintptr_t)src_d & ~(uintptr_t)63), *end = (const char *)(src_d + d);
    for (; p < end; p += 64) __builtin_prefetch(p, 1, 3);
    __asm__ volatile("");
#endif
}

/* The cache line of p, to be written. */
static inline void pe_prefetch_line(const void *p) {
#ifdef __GNUC__
    __builtin_prefetch(p, 1, 3);
#endif
}

#endif
