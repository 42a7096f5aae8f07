# Loops over the unique rows of a grouped batch: sum, add, renorm. Each thread owns a run of unique rows, so no lock is needed.
# _core_parts/batches.pxi defines a batch, _core.pyx has the legend.

cdef int64_t _run_at(Batch b, int64_t position) noexcept nogil:
    """The first unique row whose gradients begin at this position or after it."""
    cdef int64_t lo = 0, hi = b.u, mid
    if b.starts_u1 is NULL:
        return position
    while lo < hi:
        mid = (lo + hi) // 2
        if b.starts_u1[mid] < position:
            lo = mid + 1
        else:
            hi = mid
    return lo


cdef int64_t _run_begin(Batch b, int t, int threads) noexcept nogil:
    """The first unique row of thread t. Runs have about equal numbers of gradients, however often a row occurs."""
    return _run_at(b, _split(b.n, t, threads))


cdef inline const float *_at(Batch b, int64_t p) noexcept nogil:
    """The gradient of position p."""
    return b.grad_nd + (p if b.bag_n is NULL else b.bag_n[p]) * b.dim


cdef enum:
    SUM_AHEAD = 8                                 # gradients


cdef inline void _add_gradients(const pe_kernels *k, Batch b, const int64_t *which_n, const float *coef_n, int64_t n,
                                float *sum_d) noexcept nogil:
    """Add the gradients whose numbers are in which_n to sum_d, in order."""
    cdef pe_sum s
    s.base, s.stride, s.ids_n, s.wide, s.coef_n, s.skip = b.grad_nd, b.dim, which_n, True, coef_n, -1
    s.n, s.beyond, s.ahead = n, 0, SUM_AHEAD
    k.add_rows(sum_d, &s, b.dim)


cdef enum:
    HELD = 64                                     # positions whose bag and coefficient are gathered at once


cdef void _add_bag_gradients(const pe_kernels *k, Batch b, int64_t first, int64_t last, float *sum_d) noexcept nogil:
    """Add the gradients of the positions order[first] .. order[last - 1] to sum_d, each times its coefficient."""
    cdef int64_t bag[HELD]
    cdef float coef[HELD]
    cdef int64_t q, p, held = 0
    for q in range(first, last):
        p = b.order_n[q]
        bag[held] = b.bag_n[p]
        if b.coef_n is not NULL:
            coef[held] = b.coef_n[p]
        held += 1
        if held == HELD or q == last - 1:
            _add_gradients(k, b, bag, coef if b.coef_n is not NULL else NULL, held, sum_d)
            held = 0


cdef inline const float *_row_gradient(const pe_kernels *k, Batch b, int64_t u, float *sum_d) noexcept nogil:
    """The gradient of unique row u: a pointer to its only gradient, or to sum_d with the sum in position order."""
    cdef int64_t first, last
    cdef const float *only
    if b.starts_u1 is NULL:
        return b.grad_nd + u * b.dim
    first, last = b.starts_u1[u], b.starts_u1[u + 1]
    only = _at(b, b.order_n[first])
    if last - first == 1 and b.coef_n is NULL:
        return only
    k.copy_row(sum_d, only, b.dim)
    if b.coef_n is not NULL:
        k.scale_row(sum_d, b.coef_n[b.order_n[first]], b.dim)
    if b.bag_n is NULL:
        _add_gradients(k, b, b.order_n + first + 1, NULL, last - first - 1, sum_d)
    else:
        _add_bag_gradients(k, b, first + 1, last, sum_d)
    if b.scale_by_count and last - first > 1:
        k.scale_row(sum_d, 1.0 / <float>(last - first), b.dim)
    return sum_d


cdef inline void _prefetch_gradient(Batch b, int64_t u) noexcept nogil:
    """Prefetch the first gradients of unique row u. The kernel prefetches the later ones while it sums."""
    cdef int64_t q
    if b.starts_u1 is NULL:
        pe_prefetch_read(b.grad_nd + u * b.dim, b.dim)
        return
    for q in range(b.starts_u1[u], min(b.starts_u1[u + 1], b.starts_u1[u] + SUM_AHEAD)):
        pe_prefetch_read(_at(b, b.order_n[q]), b.dim)


cdef float *_scratch(int64_t d, int threads) except NULL:
    """One row of floats for each thread, on cache lines of its own."""
    cdef float *rows = <float *>malloc((d + 16) * threads * sizeof(float))
    if rows is NULL:
        raise MemoryError
    return rows


cdef void _sum_run(const pe_kernels *k, Batch b, int64_t lo, int64_t hi, float *out_ud) noexcept nogil:
    cdef int64_t u
    cdef const float *g
    for u in range(lo, hi):
        if u + 16 < hi:
            _prefetch_gradient(b, u + 16)
        g = _row_gradient(k, b, u, out_ud + u * b.dim)
        if g != out_ud + u * b.dim:
            k.copy_row(out_ud + u * b.dim, g, b.dim)


cdef void _squares_run(const pe_kernels *k, Batch b, int64_t lo, int64_t hi, double *squares_u) noexcept nogil:
    cdef int64_t u
    for u in range(lo, hi):
        squares_u[u] = 0 if b.rows_u[u] == b.skip_row else k.squares_row(b.grad_nd + u * b.dim, b.dim)


def global_norm(Batch batch not None, bint skip_nonfinite, int threads):
    """The 2-norm of the gradients of unique rows, taken as one vector, without the padding row and the skipped rows."""
    cdef Batch b = batch
    cdef int t
    cdef int64_t u
    cdef double total = 0
    cdef const pe_kernels *k = kernels
    cdef cnp.npy_intp size = b.u
    _require_gradients(b)
    if not b.unique:
        raise ValueError("sum the gradients of the batch first")
    cdef cnp.ndarray squares = cnp.PyArray_EMPTY(1, &size, cnp.NPY_DOUBLE, 0)
    cdef double *squares_u = <double *>cnp.PyArray_DATA(squares)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _squares_run(k, b, _split(b.u, t, threads), _split(b.u, t + 1, threads), squares_u)
        for u in range(b.u):                      # in order: the same bits for any number of threads
            if not skip_nonfinite or squares_u[u] - squares_u[u] == 0:
                total += squares_u[u]
    return sqrt(total)


def sum_groups(Batch batch not None, int threads):
    """The gradient of each unique row, summed in position order: float32 (u, dim)."""
    cdef Batch b = batch
    cdef int t
    cdef const pe_kernels *k = kernels
    cdef cnp.npy_intp shape[2]
    _require_gradients(b)
    if b.unique:
        return b.grad
    shape[0], shape[1] = b.u, b.dim
    cdef cnp.ndarray sums = cnp.PyArray_EMPTY(2, shape, cnp.NPY_FLOAT32, 0)
    cdef float *sums_ud = <float *>cnp.PyArray_DATA(sums)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _sum_run(k, b, _run_begin(b, t, threads), _run_begin(b, t + 1, threads), sums_ud)
    return sums


cdef void _add_run(const pe_kernels *k, Batch b, int64_t lo, int64_t hi, Column column, float alpha,
                   float *sum_d, bint cold) noexcept nogil:
    cdef Ahead pages
    cdef int64_t u
    _ahead_begin(&pages, cold, lo, hi)
    for u in range(lo, hi):
        if u >= pages.next:
            _readahead(&pages, u, column.data, column.stride, b.dim, b.rows_u)
        if u + 16 < hi:
            _prefetch_gradient(b, u + 16)
            pe_prefetch_write(column.data + b.rows_u[u + 16] * column.stride, b.dim)
        if b.rows_u[u] != b.skip_row:
            k.axpy_row(column.data + b.rows_u[u] * column.stride, _row_gradient(k, b, u, sum_d), alpha, b.dim)
    _ahead_end(&pages, cold, column.pages)


def add_groups(Column column not None, Batch batch not None, float alpha, int threads):
    """row += alpha * (sum of its gradients in position order): the same bits for any number of threads."""
    cdef Batch b = batch
    cdef int t
    cdef const pe_kernels *k = kernels
    _require_writable(column)
    _require_gradients(b)
    _require_of_table(b, column)
    cdef float *sums = _scratch(b.dim, threads)
    cdef bint cold = _batch_is_cold(column, b.rows_u, True, b.u)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _add_run(k, b, _run_begin(b, t, threads), _run_begin(b, t + 1, threads), column, alpha,
                     sums + t * (b.dim + 16), cold)
    free(sums)


cdef enum:
    UPDATE_AHEAD = 16                             # rows: Adam on 1 M ids takes 48 ms with 4, 47 with 12, 41 with 16 to 48


cdef void _renorm_run(const pe_kernels *k, Column column, const int64_t *rows, int64_t lo, int64_t hi, double max_norm,
                      double p, int64_t *clipped, int64_t *nans) noexcept nogil:
    # 16 norms first, then 16 comparisons: a mispredicted comparison right after its norm would wait for the norm's long chain.
    cdef double norm[16]
    cdef int64_t first, u
    for first in range(lo, hi, 16):
        for u in range(first, min(first + 16, hi)):
            if u + UPDATE_AHEAD < hi:
                pe_prefetch_write(column.data + rows[u + UPDATE_AHEAD] * column.stride, column.dim)
            norm[u - first] = k.norm_row(column.data + rows[u] * column.stride, p, column.dim)
        for u in range(first, min(first + 16, hi)):
            if norm[u - first] > max_norm:
                k.scale_row(column.data + rows[u] * column.stride, <float>(max_norm / (norm[u - first] + 1e-7)), column.dim)
                clipped[0] += 1
            elif norm[u - first] != norm[u - first]:
                nans[0] += 1


def renorm(Column column not None, Batch batch not None, double max_norm, double p, int threads):
    """Scale the unique rows of a batch down to a p-norm of max_norm; return the numbers of scaled rows and of rows with NaN."""
    cdef Batch b = batch
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    cdef cnp.ndarray counts = cnp.PyArray_ZEROS(2, [threads, 16], cnp.NPY_INT64, 0)
    cdef int64_t *counts_t = <int64_t *>cnp.PyArray_DATA(counts)
    _require_writable(column)
    _require_grouped(b)
    _require_of_table(b, column)
    if _batch_is_cold(column, b.rows_u, True, b.u):
        _readahead_all(column, b.unique_rows, column.dim)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            if t:
                pe_leave_cpu(caller)
            _renorm_run(k, column, b.rows_u, _split(b.u, t, threads), _split(b.u, t + 1, threads), max_norm, p,
                        counts_t + 16 * t, counts_t + 16 * t + 1)
    return int((<object>counts)[:, 0].sum()), int((<object>counts)[:, 1].sum())
