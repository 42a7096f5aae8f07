/* Sums of rows: the one kernel that loops over rows, because the sum must stay in registers while they pass; through
 * memory it takes twice the time (docs/decisions/0004). Included by rows.inc.h, under each level's target.
 *
 * Up to 16 vectors of a sum are made at once, and the same part of a row further on is asked for. The compiler would
 * spill an array of floats, so these are vectors by name; elsewhere one float at a time. Neither changes the order in
 * which an element is summed.
 */
#ifdef __GNUC__
typedef float pe_vector __attribute__((vector_size(PE_VECTOR_BYTES), aligned(4), may_alias));
#else
typedef float pe_vector;
#endif
#define PE_VECTOR ((int64_t)(sizeof(pe_vector) / sizeof(float)))
#define PE_FOR_TILE _Pragma("GCC unroll 16") for (int64_t j = 0; j < vectors; j++)

PE_INLINE int64_t summed_id(const void *ids_n, int64_t r, int wide) {
    return wide ? ((const int64_t *)ids_n)[r] : ((const int32_t *)ids_n)[r];
}

/* Floats at .. at + vectors * PE_VECTOR of the sum; how many rows were taken. */
PE_INLINE int64_t add_tile(float *acc_d, const pe_sum *s, int64_t at, int64_t vectors, int wide, int weighted) {
    const void *ids_n = s->ids_n;
    const int64_t n = s->n, ahead = s->ahead, prefetched = s->n + s->beyond - ahead, skip = s->skip, stride = s->stride;
    const float *base = s->base + at;
    pe_vector sum[16];
    int64_t taken = 0;
    PE_FOR_TILE sum[j] = ((const pe_vector *)(acc_d + at))[j];
    for (int64_t r = 0; r < n; r++) {
        if (r < prefetched) {
            const float *coming = base + summed_id(ids_n, r + ahead, wide) * stride;
            PE_FOR_TILE if (j * PE_VECTOR % 16 == 0) __builtin_prefetch(coming + j * PE_VECTOR, 0, 3);
            __builtin_prefetch(coming + vectors * PE_VECTOR - 1, 0, 3);
        }
        const int64_t id = summed_id(ids_n, r, wide);
        if (id == skip) continue;
        const pe_vector *row = (const pe_vector *)(base + id * stride);
        if (weighted) {
            PE_FOR_TILE sum[j] += s->coef_n[r] * row[j];
        } else {
            PE_FOR_TILE sum[j] += row[j];
        }
        taken++;
    }
    PE_FOR_TILE ((pe_vector *)(acc_d + at))[j] = sum[j];
    return taken;
}

PE_INLINE int64_t add_tiles(float *acc_d, const pe_sum *s, int64_t d, int wide, int weighted) {
    int64_t at = 0, taken = 0;
#define PE_TILES_OF(vectors) \
    for (; at + vectors * PE_VECTOR <= d; at += vectors * PE_VECTOR) taken = add_tile(acc_d, s, at, vectors, wide, weighted);
    PE_TILES_OF(16)
    PE_TILES_OF(8)
    PE_TILES_OF(4)
    PE_TILES_OF(1)
    if (at == d) return taken;
    taken = 0;
    for (int64_t r = 0; r < s->n; r++) { /* less than a vector */
        if (r + s->ahead < s->n + s->beyond)
            __builtin_prefetch(s->base + summed_id(s->ids_n, r + s->ahead, wide) * s->stride + at, 0, 3);
        const int64_t id = summed_id(s->ids_n, r, wide);
        if (id == s->skip) continue;
        const float *row_d = s->base + id * s->stride;
        for (int64_t i = at; i < d; i++) acc_d[i] += weighted ? s->coef_n[r] * row_d[i] : row_d[i];
        taken++;
    }
    return taken;
}

static int64_t add_rows(float *acc_d, const pe_sum *s, int64_t d) {
    if (s->coef_n) return s->wide ? add_tiles(acc_d, s, d, 1, 1) : add_tiles(acc_d, s, d, 0, 1);
    return s->wide ? add_tiles(acc_d, s, d, 1, 0) : add_tiles(acc_d, s, d, 0, 0);
}
