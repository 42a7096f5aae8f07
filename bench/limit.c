/* The measured limit: the memory traffic of a gather and of an optimizer step, and nothing else.

   Plain loops over rows that are already checked, grouped and sorted. No id check, no bounds, no
   optimizer arithmetic. Every variant moves the same bytes; the caller keeps the fastest, so
   "limit" means the best this machine is known to do, not a data-sheet number.

   Legend: n ids a batch, u unique rows a batch, d columns, ahead = prefetch distance in rows.
   A call walks all `batches` `loops` times, each batch in its own parallel region, as a library
   call would. It refuses nothing: limit.py owns the arguments. */
#include <stdint.h>
#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define LINE 16 /* floats in a cache line */
#define MAX_DIM 4096

typedef float lane16 __attribute__((vector_size(64), aligned(4), may_alias));

static inline void copy_row(float *restrict out_d, const float *restrict row_d, int64_t dim) {
    int64_t d = 0;
    for (; d + LINE <= dim; d += LINE) *(lane16 *)(out_d + d) = *(const lane16 *)(row_d + d);
    for (; d < dim; d++) out_d[d] = row_d[d];
}

/* Past the caches: saves reading the line that is about to be overwritten. Needs dim % 4 == 0 and
   a 16-byte aligned `out`; whole lines form in the write-combining buffer either way. */
static inline void stream_row(float *restrict out_d, const float *restrict row_d, int64_t dim) {
#ifdef __SSE2__
    int64_t d = 0;
#ifdef __AVX512F__
    if (((uintptr_t)out_d & 63) == 0)
        for (; d + LINE <= dim; d += LINE) _mm512_stream_ps(out_d + d, _mm512_loadu_ps(row_d + d));
#endif
    for (; d < dim; d += 4) _mm_stream_ps(out_d + d, _mm_loadu_ps(row_d + d));
#else
    copy_row(out_d, row_d, dim);
#endif
}

static inline void prefetch_row(const float *row_d, int64_t dim) {
    for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(row_d + d, 0, 3);
}

static inline void prefetch_row_for_write(const float *row_d, int64_t dim) {
    for (int64_t d = 0; d < dim; d += LINE) __builtin_prefetch(row_d + d, 1, 3);
}

void limit_gather(float *out_nd, const float *table, int64_t stride, const int64_t *const *ids_n,
                  int64_t batches, int64_t n, int64_t dim, int threads, int64_t ahead, int stream,
                  int64_t loops) {
    for (int64_t pass = 0; pass < loops * batches; pass++) {
        const int64_t *ids = ids_n[pass % batches];
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i++) {
                const float *row_d = table + ids[i] * stride;
                if (ahead && i + ahead < n) prefetch_row(table + ids[i + ahead] * stride, dim);
                if (stream) stream_row(out_nd + i * dim, row_d, dim);
                else copy_row(out_nd + i * dim, row_d, dim);
            }
#ifdef __SSE2__
            if (stream) _mm_sfence();
#endif
        }
    }
}

/* Store constants, whole lines, plain or past the caches; n is a multiple of LINE, out_n aligned. */
void limit_fill(float *out_n, int64_t n, int threads, int stream, int64_t loops) {
    const lane16 ones = (lane16){0} + 1.0f;
    for (int64_t pass = 0; pass < loops; pass++) {
#pragma omp parallel num_threads(threads)
        {
#pragma omp for schedule(static)
            for (int64_t i = 0; i < n; i += LINE) {
                if (stream) stream_row(out_n + i, (const float *)&ones, LINE);
                else *(lane16 *)(out_n + i) = ones;
            }
#ifdef __SSE2__
            if (stream) _mm_sfence();
#endif
        }
    }
}

/* First unique row whose gradient rows start at or after position p. */
static int64_t first_row(const int64_t *starts_u, int64_t u, int64_t p) {
    int64_t low = 0, high = u;
    while (low < high) {
        int64_t middle = (low + high) / 2;
        if (starts_u[middle] < p) low = middle + 1;
        else high = middle;
    }
    return low;
}

/* Per unique row: read its gradient rows, read and write its k * d floats. `one` and `zero` arrive
   as arguments so that the compiler must do the arithmetic and the table keeps its values. */
void limit_update(float *table, int64_t stride, int64_t k, const int64_t *const *rows_u,
                  const int64_t *const *starts_u, const int64_t *const *order_n, const int64_t *us,
                  int64_t batches, int64_t n, int64_t dim, const float *grad_nd, int threads,
                  int64_t ahead, float one, float zero, int64_t loops) {
    for (int64_t pass = 0; pass < loops * batches; pass++) {
        int64_t b = pass % batches, u = us[b];
        const int64_t *rows = rows_u[b], *starts = starts_u[b], *order = order_n[b];
#pragma omp parallel for schedule(static, 1) num_threads(threads)
        for (int t = 0; t < threads; t++) {
            float sum_d[MAX_DIM];
            int64_t end = first_row(starts, u, n * (t + 1) / threads);
            for (int64_t i = first_row(starts, u, n * t / threads); i < end; i++) {
                if (ahead && i + ahead < end)
                    prefetch_row_for_write(table + rows[i + ahead] * stride, k * dim);
                int64_t first = starts[i], last = starts[i + 1];
                for (int64_t p = first; ahead && p < last && p + ahead < n; p++)
                    prefetch_row(grad_nd + order[p + ahead] * dim, dim);
                const float *grad_d = grad_nd + order[first] * dim;
                if (last - first > 1) {
                    memcpy(sum_d, grad_d, sizeof(float) * (size_t)dim);
                    for (int64_t p = first + 1; p < last; p++)
                        for (int64_t d = 0; d < dim; d++) sum_d[d] += grad_nd[order[p] * dim + d];
                    grad_d = sum_d;
                }
                float *restrict row = table + rows[i] * stride;
                for (int64_t c = 0; c < k; c++)
                    for (int64_t d = 0; d < dim; d++)
                        row[c * dim + d] = row[c * dim + d] * one + grad_d[d] * zero;
            }
        }
    }
}
