# Loops over bags: runs of consecutive positions, described by starts_b1 (bag b holds positions starts_b1[b] up to
# starts_b1[b + 1] - 1). Legend as in _core.pyx, and b bags.

cdef enum:
    BAG_SUM
    BAG_MEAN
    BAG_MAX

BAG_MODES = {"sum": BAG_SUM, "mean": BAG_MEAN, "max": BAG_MAX}


cdef struct Bags:
    int64_t b
    const int64_t *starts
    const float *weight_n                         # per-sample weights, or NULL
    int64_t skip_row                              # the padding row, or -1
    int mode


cdef inline void _zero(float *out_d, int64_t d) noexcept nogil:
    cdef int64_t i
    for i in range(d):
        out_d[i] = 0


cdef inline int64_t _add_bag(const pe_kernels *k, const Bags *bags, Column column, const ids_t *ids, int64_t bag, int64_t end,
                             int64_t ahead, float *out_d) noexcept nogil:
    """Sum a bag in order, and return the number of rows. The sum starts at zero, so a single -0.0 gives 0.0, as in torch."""
    cdef pe_sum s
    cdef int64_t first = bags.starts[bag]
    s.base, s.stride, s.skip, s.ahead = column.data, column.stride, bags.skip_row, ahead
    s.ids_n, s.wide, s.coef_n = ids + first, ids_t is int64_t, NULL
    if bags.weight_n is not NULL:
        s.coef_n = bags.weight_n + first
    s.n = bags.starts[bag + 1] - first
    s.beyond = end - first - s.n
    _zero(out_d, column.dim)
    return k.add_rows(out_d, &s, column.dim)


cdef int64_t _max_bag(const pe_kernels *k, const Bags *bags, Column column, const ids_t *ids, int64_t bag, int64_t end,
                      int64_t ahead, float *out_d, int64_t *which_d) noexcept nogil:
    """The maximum of a bag, and in which_d, if it is not NULL, the id that gave each element. Returns the number of rows."""
    cdef int64_t p, i, d = column.dim, stride = column.stride, taken = 0
    cdef const float *row_d
    for p in range(bags.starts[bag], bags.starts[bag + 1]):
        if p + ahead < end:
            pe_prefetch_read(column.data + ids[p + ahead] * stride, d)
        if ids[p] == bags.skip_row:
            continue
        row_d = column.data + ids[p] * stride
        if taken == 0:
            k.copy_row(out_d, row_d, d)
            if which_d is not NULL:
                for i in range(d):
                    which_d[i] = ids[p]
        elif which_d is not NULL:
            k.max_which_row(out_d, which_d, row_d, ids[p], d)
        else:
            k.max_row(out_d, row_d, d)
        taken += 1
    if taken == 0:
        _zero(out_d, d)
        if which_d is not NULL:
            for i in range(d):
                which_d[i] = -1
    return taken


cdef void _bag_span(const pe_kernels *k, const Bags *bags, Column column, const ids_t *ids, int64_t lo, int64_t hi,
                    float *out_bd, int64_t *which_bd, bint cold) noexcept nogil:
    cdef Ahead pages
    cdef int64_t bag, p, d = column.dim, taken, ahead = _rows_ahead(d, 2048), end = bags.starts[hi]
    for p in range(bags.starts[lo], min(bags.starts[lo] + ahead, end)):
        pe_prefetch_read(column.data + ids[p] * column.stride, d)
    _ahead_begin(&pages, cold, bags.starts[lo], end)
    for bag in range(lo, hi):
        if bags.starts[bag] >= pages.next:
            _readahead(&pages, bags.starts[bag], column.data, column.stride, d, ids)
        if bags.mode == BAG_MAX:
            _max_bag(k, bags, column, ids, bag, end, ahead, out_bd + bag * d,
                     NULL if which_bd is NULL else which_bd + bag * d)
            continue
        taken = _add_bag(k, bags, column, ids, bag, end, ahead, out_bd + bag * d)
        if bags.mode == BAG_MEAN and taken > 1:
            k.divide_row(out_bd + bag * d, <float>taken, d)
    _ahead_end(&pages, cold, column.pages)


cdef void _bag_part(const pe_kernels *k, const Bags *bags, Column column, const void *ids, bint wide, int t, int threads,
                    float *out_bd, int64_t *which_bd, bint cold) noexcept nogil:
    cdef int64_t lo = _bag_begin(bags, t, threads), hi = _bag_begin(bags, t + 1, threads)
    if wide:
        _bag_span(k, bags, column, <const int64_t *>ids, lo, hi, out_bd, which_bd, cold)
    else:
        _bag_span(k, bags, column, <const int32_t *>ids, lo, hi, out_bd, which_bd, cold)


cdef int64_t _bag_begin(const Bags *bags, int t, int threads) noexcept nogil:
    """The first bag of thread t: about equal numbers of positions and bags for each."""
    cdef int64_t lo = 0, hi = bags.b, mid, target = _split(bags.starts[bags.b] + bags.b, t, threads)
    while lo < hi:
        mid = (lo + hi) // 2
        if bags.starts[mid] + mid < target:
            lo = mid + 1
        else:
            hi = mid
    return lo if t < threads else bags.b


def reduce_bags(Column column not None, cnp.ndarray ids not None, cnp.ndarray starts not None, cnp.ndarray weights, str mode,
                int64_t skip_row, cnp.ndarray out not None, cnp.ndarray which, int threads):
    """out[b] = sum, mean or maximum of the rows of bag b, without skip_row; zeros for a bag without rows.

    `starts` is int64, ascending from 0 to the number of ids. For the maximum, `which` receives the id that gave each element,
    or -1.
    """
    cdef bint wide = _is_int64(ids)
    cdef Bags bags
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    cdef int64_t n = cnp.PyArray_SIZE(ids), i
    cdef int64_t *which_bd = NULL
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    bags.b, bags.mode, bags.skip_row = cnp.PyArray_SIZE(starts) - 1, BAG_MODES[mode], skip_row
    if not _is_int64(starts) or bags.b < 0:
        raise TypeError("starts is int64, one more than there are bags")
    bags.starts = <const int64_t *>cnp.PyArray_DATA(starts)
    if bags.starts[0] != 0 or bags.starts[bags.b] != n:
        raise ValueError("starts must go from 0 to the number of ids")
    for i in range(bags.b):
        if bags.starts[i] > bags.starts[i + 1]:
            raise ValueError("starts must ascend")
    bags.weight_n = NULL
    if weights is not None:
        bags.weight_n = _floats(weights, n)
    cdef float *out_bd = _floats_out(out, bags.b * column.dim, column)
    if which is not None:
        if not _is_int64(which) or cnp.PyArray_SIZE(which) != bags.b * column.dim:
            raise TypeError("which is int64, of the shape of out")
        which_bd = <int64_t *>cnp.PyArray_DATA(which)
    _check_ids(ids, wide, column.rows, threads)
    cdef bint cold = _batch_is_cold(column, ids_n, wide, n)
    if threads == 1:
        with nogil:
            _bag_part(k, &bags, column, ids_n, wide, 0, 1, out_bd, which_bd, cold)
    else:
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                if t:
                    pe_leave_cpu(caller)
                _bag_part(k, &bags, column, ids_n, wide, t, threads, out_bd, which_bd, cold)


def bag_dots(Column column not None, cnp.ndarray ids not None, cnp.ndarray bag_of not None, cnp.ndarray grad not None,
             int64_t skip_row, cnp.ndarray out not None, int threads):
    """out[p] = grad[bag_of[p]] . row ids[p], and 0 for skip_row: the gradient of per-sample weights."""
    cdef int64_t n = cnp.PyArray_SIZE(ids), p, d = column.dim
    cdef const pe_kernels *k = kernels
    if not _is_int64(ids) or not _is_int64(bag_of) or cnp.PyArray_SIZE(bag_of) != n:
        raise TypeError("ids and bag_of are int64 and of one size")
    cdef const float *grad_bd = _floats(grad, cnp.PyArray_SIZE(grad))
    cdef float *out_n = _floats_out(out, n, column)
    cdef const int64_t *ids_n = <const int64_t *>cnp.PyArray_DATA(ids)
    cdef const int64_t *bag_n = <const int64_t *>cnp.PyArray_DATA(bag_of)
    _check_ids(ids, True, column.rows, threads)
    with nogil:
        for p in prange(n, num_threads=threads, schedule="static", use_threads_if=threads > 1):
            if ids_n[p] == skip_row:
                out_n[p] = 0
            else:
                out_n[p] = k.dot_row(grad_bd + bag_n[p] * d, column.data + ids_n[p] * column.stride, d)


def sum_elements(cnp.ndarray starts not None, cnp.ndarray positions not None, cnp.ndarray grad not None,
                 cnp.ndarray out not None, int threads):
    """out[u, p % d] += grad.flat[p] for the positions p of group u, in order: the gradient of a maximum."""
    cdef int64_t u, q, d = cnp.PyArray_DIM(out, 1), groups = cnp.PyArray_DIM(out, 0)
    if not _is_int64(starts) or not _is_int64(positions):
        raise TypeError("groups are int64")
    cdef const float *grad_n = _floats(grad, cnp.PyArray_SIZE(grad))
    cdef float *out_ud = _floats_out(out, groups * d, None)
    cdef const int64_t *starts_u1 = <const int64_t *>cnp.PyArray_DATA(starts)
    cdef const int64_t *position_n = <const int64_t *>cnp.PyArray_DATA(positions)
    with nogil:
        for u in prange(groups, num_threads=threads, schedule="static", use_threads_if=threads > 1):
            _sum_elements(position_n, starts_u1[u], starts_u1[u + 1], grad_n, out_ud + u * d, d)


cdef void _sum_elements(const int64_t *position_n, int64_t lo, int64_t hi, const float *grad_n, float *out_d,
                        int64_t d) noexcept nogil:
    cdef int64_t q
    for q in range(lo, hi):
        out_d[position_n[q] % d] += grad_n[position_n[q]]
