# Loops over the rows that ids name: gather, scatter_add; and over all rows of an array: all_finite, fill.

# An output that does not fit into the caches is stored past them: 300 floats x 65536 in 3.3 ms instead of 3.7, x 1 M in
# 49 ms instead of 60. A smaller one stays in the cache for its next reader, and is made faster: 64 x 65536 in 0.65 ms
# instead of 0.89. Both are equal at about 64 MB (2 cores of an EPYC 9005, 32 MiB L3).
STREAM_FLOATS = (48 << 20) // 4                  # for tests
cdef int64_t stream_floats = STREAM_FLOATS

# Floats per span without a look at pending signals: about 50 ms at 5 GB/s.
cdef int64_t SPAN_FLOATS = 1 << 26

# How many floats are asked for ahead of use, in whole rows. 1024 to 8192 are within 10 % of each other for 16 to 300 floats
# a row, with one exception: streamed rows of 128 floats take 26 ms with 2048 and 18 ms with 4096.
cdef enum:
    AHEAD_FLOATS = 2048
    STREAM_AHEAD_FLOATS = 4096


cdef inline int64_t _rows_ahead(int64_t dim, int64_t floats) noexcept nogil:
    return max(4, min(128, floats // max(dim, 1)))


cdef void _gather_span(const pe_kernels *k, Column column, const ids_t *ids, int64_t lo, int64_t hi, float *out_nd,
                       bint stream, bint cold) noexcept nogil:
    cdef Ahead pages
    cdef int64_t i, d = column.dim, stride = column.stride
    cdef int64_t ahead = _rows_ahead(d, STREAM_AHEAD_FLOATS if stream else AHEAD_FLOATS)
    cdef const float *table = column.data
    _ahead_begin(&pages, cold, lo, hi)
    for i in range(lo, min(lo + ahead, hi)):
        pe_prefetch_read(table + ids[i] * stride, d)
    for i in range(lo, hi):
        if i >= pages.next:
            _readahead(&pages, i, table, stride, d, ids)
        if i + ahead < hi:
            pe_prefetch_read(table + ids[i + ahead] * stride, d)
        if stream:
            k.stream_row(out_nd + i * d, table + ids[i] * stride, d)
        else:
            k.copy_row(out_nd + i * d, table + ids[i] * stride, d)
    _ahead_end(&pages, cold, column.pages)
    if stream:
        pe_stream_fence()


cdef void _gather_part(const pe_kernels *k, Column column, const void *ids, bint wide, int64_t lo, int64_t hi,
                       float *out_nd, bint stream, bint cold) noexcept nogil:
    if wide:
        _gather_span(k, column, <const int64_t *>ids, lo, hi, out_nd, stream, cold)
    else:
        _gather_span(k, column, <const int32_t *>ids, lo, hi, out_nd, stream, cold)


def gather(Column column not None, cnp.ndarray ids not None, cnp.ndarray out, int threads):
    """Copy the rows that ids name; into `out` if it is given, else into a fresh array of ids.shape + (dim,)."""
    cdef bint wide = _is_int64(ids)
    cdef int64_t n = cnp.PyArray_SIZE(ids), d = column.dim, lo, hi, span = max(1, SPAN_FLOATS // max(d, 1))
    cdef int t, axis, ndim = cnp.PyArray_NDIM(ids)
    cdef cnp.npy_intp shape[65]
    cdef const pe_kernels *k = kernels
    _check_ids(ids, wide, column.rows, threads)
    if out is None:
        if ndim > 63:
            raise ValueError("ids have too many dimensions")
        for axis in range(ndim):
            shape[axis] = cnp.PyArray_DIM(ids, axis)
        shape[ndim] = d
        out = cnp.PyArray_EMPTY(ndim + 1, shape, cnp.NPY_FLOAT32, 0)
    cdef float *out_nd = _floats_out(out, n * d, column)
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    cdef bint stream = n * d >= stream_floats, cold
    if n * d == 0:
        return out
    cold = _batch_is_cold(column, ids_n, wide, n)
    if cold:
        span = COLD_SPAN_ROWS
    if threads == 1 and n <= span:
        with nogil:
            _gather_part(k, column, ids_n, wide, 0, n, out_nd, stream, cold)
        return out
    for lo in range(0, n, span):
        hi = min(lo + span, n)
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                _gather_part(k, column, ids_n, wide, lo + _split(hi - lo, t, threads), lo + _split(hi - lo, t + 1, threads),
                             out_nd, stream, cold)
        PyErr_CheckSignals()
    return out


cdef void _scatter_span(const pe_kernels *k, Column column, const ids_t *ids, int64_t lo, int64_t hi,
                        const float *values_nd, float alpha, bint cold) noexcept nogil:
    cdef Ahead pages
    cdef int64_t i, row, stripe, d = column.dim, stride = column.stride, ahead = _rows_ahead(d, AHEAD_FLOATS)
    _ahead_begin(&pages, cold, lo, hi)
    for i in range(lo, hi):
        if i >= pages.next:
            _readahead(&pages, i, column.data, stride, d, ids)
        if i + ahead < hi:
            pe_prefetch_write(column.data + ids[i + ahead] * stride, d)
        row = ids[i]
        stripe = pe_stripe_of(row)
        pe_stripe_lock(stripe)
        k.axpy_row(column.data + row * stride, values_nd + i * d, alpha, d)
        pe_stripe_unlock(stripe)
    _ahead_end(&pages, cold, column.pages)


cdef void _scatter_part(const pe_kernels *k, Column column, const void *ids, bint wide, int64_t lo, int64_t hi,
                        const float *values_nd, float alpha, bint cold) noexcept nogil:
    if wide:
        _scatter_span(k, column, <const int64_t *>ids, lo, hi, values_nd, alpha, cold)
    else:
        _scatter_span(k, column, <const int32_t *>ids, lo, hi, values_nd, alpha, cold)


def scatter_add(Column column not None, Batch batch not None, float alpha, int threads):
    """Add alpha * value to the row of every id, under the lock of the row, so that concurrent callers lose no addition.

    The values are the gradients of the batch, which need not be grouped. With duplicate ids and several threads the order
    of the additions, and so their rounding, is not fixed.
    """
    cdef Batch b = batch
    cdef int t
    cdef const pe_kernels *k = kernels
    _require_writable(column)
    if b.grad is None or b.bag_of is not None:
        raise ValueError("scatter_add takes a value for each id")
    _require_of_table(b, column)
    _check(b, threads)
    if b.n * b.dim == 0:
        return
    cdef bint cold = _batch_is_cold(column, b.ids_n, b.wide, b.n)
    if threads == 1:
        with nogil:
            _scatter_part(k, column, b.ids_n, b.wide, 0, b.n, b.grad_nd, alpha, cold)
    else:
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                _scatter_part(k, column, b.ids_n, b.wide, _split(b.n, t, threads), _split(b.n, t + 1, threads), b.grad_nd,
                              alpha, cold)


cdef inline int _require_writable(Column column) except -1:
    if not column.writable:
        raise ValueError("the column is read-only")
    return 0


cdef enum:
    FINITE_SPAN = 1 << 14                         # floats searched at once: 64 KiB, which a thread takes from its cache


cdef struct Span:
    # A part of an array, and the largest magnitude in it.
    const float *data
    int64_t size, array
    float largest


def all_finite(cnp.ndarray values not None, int threads):
    """True if no element of a C-contiguous float32 array is NaN or infinite."""
    cdef float largest
    _largest_each([values], &largest, threads)
    return largest < INFINITY


cdef int _largest_each(list arrays, float *largest_a, int threads) except -1:
    """largest_a[i] = the largest magnitude in arrays[i]: NaN if it has one, 1 if it is None."""
    cdef int64_t at, a, spans = 0, span, floats = 0, count = len(arrays)
    cdef const pe_kernels *k = kernels
    cdef cnp.ndarray values
    for a in range(count):
        values, largest_a[a] = arrays[a], 1
        if values is not None:
            _floats(values, cnp.PyArray_SIZE(values))
            floats += cnp.PyArray_SIZE(values)
            spans += cnp.PyArray_SIZE(values) // FINITE_SPAN + 1
    if floats <= FINITE_SPAN:                     # a list of spans would take longer than the search
        for a in range(count):
            values = arrays[a]
            if values is not None:
                largest_a[a] = k.largest_span(<const float *>cnp.PyArray_DATA(values), cnp.PyArray_SIZE(values))
        return 0
    cdef Span *all_spans = <Span *>malloc(spans * sizeof(Span))
    if all_spans is NULL:
        raise MemoryError
    span = 0
    for a in range(count):
        values = arrays[a]
        if values is None:
            continue
        largest_a[a] = 0
        for at in range(0, cnp.PyArray_SIZE(values) + 1, FINITE_SPAN):
            all_spans[span].array, all_spans[span].data = a, <const float *>cnp.PyArray_DATA(values) + at
            all_spans[span].size = min(cnp.PyArray_SIZE(values) - at, <int64_t>FINITE_SPAN)
            span += 1
    with nogil:
        for span in prange(spans, num_threads=threads, schedule="static", use_threads_if=threads > 1):
            all_spans[span].largest = k.largest_span(all_spans[span].data, all_spans[span].size)
    for span in range(spans):
        a = all_spans[span].array
        if not all_spans[span].largest <= largest_a[a]:     # true for NaN, which then stays
            if largest_a[a] == largest_a[a]:
                largest_a[a] = all_spans[span].largest
    free(all_spans)
    return 0


# Blocks that one thread makes before it copies them into rows: 16 KiB, well inside the L1 cache.
cdef enum:
    FILL_BLOCKS = 64


cdef void _fill_part(const pe_kernels *k, Column column, bint normal, uint64_t seed, int64_t first_row, int64_t row,
                     int64_t last, float a, float b, bint stream) noexcept nogil:
    """Write rows row .. last - 1 of the column, which are rows first_row + row .. of the stream, see `fill`."""
    cdef float made[FILL_BLOCKS * PE_BLOCK]
    cdef void (*copy)(float *dst_d, const float *src_d, int64_t d) noexcept nogil
    copy = k.stream_row if stream else k.copy_row
    cdef int64_t d = column.dim, at, end = (first_row + last) * d, block, blocks, col, take, offset
    at = (first_row + row) * d
    col = 0
    while at < end:
        block = at // PE_BLOCK
        offset = at - block * PE_BLOCK           # the first elements of the first block belong to another part
        blocks = min(FILL_BLOCKS, (end - 1) // PE_BLOCK + 1 - block)
        if normal:
            k.normal_blocks(made, seed, <uint64_t>block, blocks, a, b)
        else:
            k.uniform_blocks(made, seed, <uint64_t>block, blocks, a, b)
        take = min(blocks * PE_BLOCK, end - block * PE_BLOCK)
        at = block * PE_BLOCK + take
        while offset < take:                     # the rest of this row, or as much of it as was made
            if take - offset < d - col:
                copy(column.data + row * column.stride + col, made + offset, take - offset)
                col += take - offset
                break
            copy(column.data + row * column.stride + col, made + offset, d - col)
            offset += d - col
            row += 1
            col = 0
    if stream:
        pe_stream_fence()


def fill(Column column not None, str kind, uint64_t seed, int64_t first_row, float a, float b, int threads):
    """Write random rows: kind "uniform" (low a, width b) or "normal" (mean a, standard deviation b).

    Element c of row r is value (first_row + r) * dim + c of the stream of the seed, whatever the number of threads and however
    a table is cut into calls.
    """
    cdef bint normal = kind == "normal"
    cdef int64_t rows = column.rows, lo, hi, span = max(threads, SPAN_FLOATS // max(column.dim, 1))
    cdef bint stream = rows * column.dim >= stream_floats
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    if kind != "normal" and kind != "uniform":
        raise ValueError(f"unknown kind {kind!r}")
    _require_writable(column)
    if column.dim == 0:
        return
    for lo in range(0, rows, span):
        hi = min(lo + span, rows)
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                if t:
                    pe_leave_cpu(caller)
                _fill_part(k, column, normal, seed, first_row, lo + _split(hi - lo, t, threads),
                           lo + _split(hi - lo, t + 1, threads), a, b, stream)
        PyErr_CheckSignals()
