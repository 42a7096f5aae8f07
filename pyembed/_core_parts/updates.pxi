# Loops over the unique rows of a batch: sum, add, renorm. A thread owns a run of unique rows, so none needs a lock.
# Groups as in _core_parts/groups.pxi; legend as in _core.pyx.

cdef struct Batch:
    # A grouped batch as the loops below see it. starts and order are NULL if gradient u belongs to row u. In a batch of bags,
    # position p takes gradient bag_n[p], times coef_n[p] if there are coefficients; both are NULL otherwise.
    int64_t u
    const int64_t *bag_n
    const float *coef_n
    const int64_t *rows
    const int64_t *starts
    const int64_t *order
    const float *grad_nd
    int64_t d
    int64_t skip_row                              # the padding row, or -1
    bint scale_by_count                           # divide a row's sum by how often the row occurs


cdef int _batch(Batch *b, cnp.ndarray rows, cnp.ndarray starts, cnp.ndarray order, cnp.ndarray grad, int64_t d,
                int64_t table_rows, cnp.ndarray bag_of, cnp.ndarray coef) except -1:
    """bag_of: int64, the gradient row of each position, all within grad (the caller made it); coef: float32 or None."""
    cdef int64_t n
    if not (_is_int64(rows) and (starts is None or (_is_int64(starts) and _is_int64(order)))):
        raise TypeError("groups are int64")
    b.u = cnp.PyArray_SIZE(rows)
    b.rows = <const int64_t *>cnp.PyArray_DATA(rows)
    b.starts = b.order = NULL
    n = b.u
    if starts is not None:
        if cnp.PyArray_SIZE(starts) != b.u + 1:
            raise ValueError("starts must have one element more than rows")
        n = cnp.PyArray_SIZE(order)
        b.starts = <const int64_t *>cnp.PyArray_DATA(starts)
        b.order = <const int64_t *>cnp.PyArray_DATA(order)
    if b.u and not 0 <= b.rows[0] <= b.rows[b.u - 1] < table_rows:
        raise ValueError(f"the groups are not of this table: rows {b.rows[0]}..{b.rows[b.u - 1]} of {table_rows}")
    b.bag_n, b.coef_n = NULL, NULL
    if bag_of is not None:
        if not _is_int64(bag_of) or cnp.PyArray_SIZE(bag_of) != n or starts is None:
            raise ValueError("bag_of must be int64, one for each position")
        b.bag_n = <const int64_t *>cnp.PyArray_DATA(bag_of)
        if coef is not None:
            b.coef_n = _floats(coef, n)
    b.grad_nd = _floats(grad, cnp.PyArray_SIZE(grad) if bag_of is not None else n * d)
    b.d = d
    b.skip_row = -1
    b.scale_by_count = False
    return 0


cdef int64_t _run_at(const Batch *b, int64_t position) noexcept nogil:
    """The first unique row whose gradients begin at this position or after it."""
    cdef int64_t lo = 0, hi = b.u, mid
    if b.starts is NULL:
        return position
    while lo < hi:
        mid = (lo + hi) // 2
        if b.starts[mid] < position:
            lo = mid + 1
        else:
            hi = mid
    return lo


cdef inline int64_t _positions(const Batch *b) noexcept nogil:
    return b.u if b.starts is NULL else b.starts[b.u]


cdef int64_t _run_begin(const Batch *b, int t, int threads) noexcept nogil:
    """The first unique row of thread t: runs of about equal numbers of gradients, so that a hot row costs one thread."""
    return _run_at(b, _split(_positions(b), t, threads))


cdef inline const float *_at(const Batch *b, int64_t p) noexcept nogil:
    """The gradient of position p."""
    return b.grad_nd + (p if b.bag_n is NULL else b.bag_n[p]) * b.d


cdef enum:
    SUM_AHEAD = 8                                 # gradients


cdef inline void _add_gradients(const pe_kernels *k, const Batch *b, const int64_t *which_n, const float *coef_n, int64_t n,
                                float *sum_d) noexcept nogil:
    """sum += the gradients which_n, in order."""
    cdef pe_sum s
    s.base, s.stride, s.ids_n, s.wide, s.coef_n, s.skip = b.grad_nd, b.d, which_n, True, coef_n, -1
    s.n, s.beyond, s.ahead = n, 0, SUM_AHEAD
    k.add_rows(sum_d, &s, b.d)


cdef enum:
    HELD = 64                                     # positions whose bag and coefficient are looked up at once


cdef void _add_bag_gradients(const pe_kernels *k, const Batch *b, int64_t first, int64_t last, float *sum_d) noexcept nogil:
    """sum += the gradients of the bags of order[first] .. order[last - 1], each times its coefficient."""
    cdef int64_t bag[HELD]
    cdef float coef[HELD]
    cdef int64_t q, p, held = 0
    for q in range(first, last):
        p = b.order[q]
        bag[held] = b.bag_n[p]
        if b.coef_n is not NULL:
            coef[held] = b.coef_n[p]
        held += 1
        if held == HELD or q == last - 1:
            _add_gradients(k, b, bag, coef if b.coef_n is not NULL else NULL, held, sum_d)
            held = 0


cdef inline const float *_row_gradient(const pe_kernels *k, const Batch *b, int64_t u, float *sum_d) noexcept nogil:
    """The gradient of unique row u: its only one where it lies, or the sum in position order in sum_d."""
    cdef int64_t first, last
    cdef const float *only
    if b.starts is NULL:
        return b.grad_nd + u * b.d
    first, last = b.starts[u], b.starts[u + 1]
    only = _at(b, b.order[first])
    if last - first == 1 and b.coef_n is NULL:
        return only
    k.copy_row(sum_d, only, b.d)
    if b.coef_n is not NULL:
        k.scale_row(sum_d, b.coef_n[b.order[first]], b.d)
    if b.bag_n is NULL:
        _add_gradients(k, b, b.order + first + 1, NULL, last - first - 1, sum_d)
    else:
        _add_bag_gradients(k, b, first + 1, last, sum_d)
    if b.scale_by_count and last - first > 1:
        k.scale_row(sum_d, 1.0 / <float>(last - first), b.d)
    return sum_d


cdef inline void _prefetch_gradient(const Batch *b, int64_t u) noexcept nogil:
    """Ask for the gradients of unique row u. Of many, the later ones are asked for while the first are summed."""
    cdef int64_t q
    if b.starts is NULL:
        pe_prefetch_read(b.grad_nd + u * b.d, b.d)
        return
    for q in range(b.starts[u], min(b.starts[u + 1], b.starts[u] + SUM_AHEAD)):
        pe_prefetch_read(_at(b, b.order[q]), b.d)


cdef float *_scratch(int64_t d, int threads) except NULL:
    """One row of floats for each thread, on cache lines of its own."""
    cdef float *rows = <float *>malloc((d + 16) * threads * sizeof(float))
    if rows is NULL:
        raise MemoryError
    return rows


cdef void _sum_run(const pe_kernels *k, const Batch *b, int64_t lo, int64_t hi, float *out_ud) noexcept nogil:
    cdef int64_t u
    cdef const float *g
    for u in range(lo, hi):
        if u + 16 < hi:
            _prefetch_gradient(b, u + 16)
        g = _row_gradient(k, b, u, out_ud + u * b.d)
        if g != out_ud + u * b.d:
            k.copy_row(out_ud + u * b.d, g, b.d)


cdef void _squares_run(const pe_kernels *k, const Batch *b, int64_t lo, int64_t hi, double *squares_u) noexcept nogil:
    cdef int64_t u
    for u in range(lo, hi):
        squares_u[u] = 0 if b.rows[u] == b.skip_row else k.squares_row(b.grad_nd + u * b.d, b.d)


def global_norm(rows, cnp.ndarray grad not None, int64_t skip_row, bint skip_nonfinite, int threads):
    """The 2-norm of the gradients of unique rows as one vector, without skip_row, and without those that are not finite."""
    cdef Batch b
    cdef int t
    cdef int64_t u
    cdef double total = 0
    cdef const pe_kernels *k = kernels
    cdef cnp.npy_intp size = cnp.PyArray_SIZE(rows)
    cdef cnp.ndarray squares = cnp.PyArray_EMPTY(1, &size, cnp.NPY_DOUBLE, 0)
    cdef double *squares_u = <double *>cnp.PyArray_DATA(squares)
    _batch(&b, rows, None, None, grad, cnp.PyArray_DIM(grad, 1), (<int64_t>1 << 62), None, None)
    b.skip_row = skip_row
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _squares_run(k, &b, _split(b.u, t, threads), _split(b.u, t + 1, threads), squares_u)
        for u in range(b.u):                      # in order: the same bits for any number of threads
            if not skip_nonfinite or squares_u[u] - squares_u[u] == 0:
                total += squares_u[u]
    return sqrt(total)


def sum_groups(rows, starts, order, cnp.ndarray grad not None, cnp.ndarray out not None, bint scale_by_count, int threads,
               bag_of=None, coef=None):
    """out[u] = the gradient of unique row u, summed in position order."""
    cdef Batch b
    cdef int t
    cdef const pe_kernels *k = kernels
    cdef int64_t d = cnp.PyArray_DIM(out, 1)
    _batch(&b, rows, starts, order, grad, d, (<int64_t>1 << 62), bag_of, coef)
    b.scale_by_count = scale_by_count
    cdef float *out_ud = _floats_out(out, b.u * d, None)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _sum_run(k, &b, _run_begin(&b, t, threads), _run_begin(&b, t + 1, threads), out_ud)


cdef void _add_run(const pe_kernels *k, const Batch *b, int64_t lo, int64_t hi, Column column, float alpha,
                   float *sum_d, bint cold) noexcept nogil:
    cdef Ahead pages
    cdef int64_t u
    _ahead_begin(&pages, cold, lo, hi)
    for u in range(lo, hi):
        if u >= pages.next:
            _ask(&pages, u, column.data, column.stride, b.d, b.rows)
        if u + 16 < hi:
            _prefetch_gradient(b, u + 16)
            pe_prefetch_write(column.data + b.rows[u + 16] * column.stride, b.d)
        if b.rows[u] != b.skip_row:
            k.axpy_row(column.data + b.rows[u] * column.stride, _row_gradient(k, b, u, sum_d), alpha, b.d)
    _ahead_end(&pages, cold, column.pages)


def add_groups(Column column not None, rows, starts, order, cnp.ndarray grad not None, float alpha, int64_t skip_row,
               bint scale_by_count, int threads, bag_of=None, coef=None):
    """row += alpha * (sum of its gradients in position order): the same bits for any number of threads."""
    cdef Batch b
    cdef int t
    cdef const pe_kernels *k = kernels
    _require_writable(column)
    _batch(&b, rows, starts, order, grad, column.dim, column.rows, bag_of, coef)
    b.skip_row, b.scale_by_count = skip_row, scale_by_count
    cdef float *sums = _scratch(b.d, threads)
    cdef bint cold = _batch_is_cold(column, b.rows, True, b.u)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _add_run(k, &b, _run_begin(&b, t, threads), _run_begin(&b, t + 1, threads), column, alpha,
                     sums + t * (b.d + 16), cold)
    free(sums)


cdef enum:
    UPDATE_AHEAD = 16                             # rows: Adam on 1 M ids takes 48 ms with 4, 47 with 12, 41 with 16 to 48


cdef void _renorm_run(const pe_kernels *k, Column column, const int64_t *rows, int64_t lo, int64_t hi, double max_norm,
                      double p, int64_t *clipped, int64_t *nans) noexcept nogil:
    # 16 norms first, then 16 comparisons: one right after its norm would stall on the norm's long chain whenever it is
    # predicted wrong.
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


def renorm(Column column not None, cnp.ndarray ids not None, double max_norm, double p, int threads):
    """Scale the rows that ids name, each once, down to a p-norm of max_norm; (rows scaled, rows with NaN, left alone)."""
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    cdef cnp.ndarray counts = cnp.PyArray_ZEROS(2, [threads, 16], cnp.NPY_INT64, 0)
    cdef int64_t *counts_t = <int64_t *>cnp.PyArray_DATA(counts)
    cdef Grouping g
    _require_writable(column)
    cdef _Block block = _grouped(&g, ids, column.rows, threads)     # holds g's rows until the end
    if _batch_is_cold(column, cnp.PyArray_DATA(ids), _is_int64(ids), g.n):
        _ask_all(column, ids, column.dim)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            if t:
                pe_leave_cpu(caller)
            _renorm_run(k, column, g.rows_u, _split(g.u, t, threads), _split(g.u, t + 1, threads), max_norm, p,
                        counts_t + 16 * t, counts_t + 16 * t + 1)
    return int((<object>counts)[:, 0].sum()), int((<object>counts)[:, 1].sum())
