# From a batch's ids to its unique rows, and the loops over unique rows: sum, add, update.
#
# A batch is grouped by a stable radix sort of (row, position). Three arrays describe the result:
#   rows_u     unique rows, ascending
#   starts_u1  group u holds order_n[starts_u1[u]] .. order_n[starts_u1[u + 1] - 1]
#   order_n    positions in the batch, ascending within a group
# So duplicates are summed in position order whatever the number of threads, and a thread that owns a run of unique
# rows needs no lock. A batch whose ids are unique and ascending already needs no grouping: starts and order are None.

cdef enum:
    DIGIT_BITS = 11                               # 2048 counters: 16 KiB, inside the L1 cache


cdef void _count_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[<uint64_t>ids[i] & mask] += 1


cdef void _place_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int position_bits, int64_t *cursor,
                     uint64_t *keys) noexcept nogil:
    cdef int64_t i, digit
    for i in range(lo, hi):
        digit = <int64_t>(<uint64_t>ids[i] & mask)
        keys[cursor[digit]] = (<uint64_t>ids[i] << position_bits) | <uint64_t>i
        cursor[digit] += 1


cdef void _count_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[(keys[i] >> shift) & mask] += 1


cdef void _place_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *cursor,
                      uint64_t *placed) noexcept nogil:
    cdef int64_t i, digit
    for i in range(lo, hi):
        digit = <int64_t>((keys[i] >> shift) & mask)
        placed[cursor[digit]] = keys[i]
        cursor[digit] += 1


cdef void _count_part(const void *ids, bint wide, const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask,
                      int64_t *count) noexcept nogil:
    cdef int64_t digit
    for digit in range(<int64_t>mask + 1):
        count[digit] = 0
    if keys is not NULL:
        _count_keys(keys, lo, hi, shift, mask, count)
    elif wide:
        _count_ids(<const int64_t *>ids, lo, hi, mask, count)
    else:
        _count_ids(<const int32_t *>ids, lo, hi, mask, count)


cdef void _place_part(const void *ids, bint wide, const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask,
                      int position_bits, int64_t *cursor, uint64_t *placed) noexcept nogil:
    if keys is not NULL:
        _place_keys(keys, lo, hi, shift, mask, cursor, placed)
    elif wide:
        _place_ids(<const int64_t *>ids, lo, hi, mask, position_bits, cursor, placed)
    else:
        _place_ids(<const int32_t *>ids, lo, hi, mask, position_bits, cursor, placed)


cdef uint64_t *_sort(const void *ids, bint wide, int64_t n, int row_bits, int position_bits, uint64_t *keys,
                     uint64_t *other, int64_t *counts, int threads) noexcept nogil:
    """Stable radix sort by row, lowest digit first. Returns which of both buffers holds the sorted (row, position)."""
    cdef int passes = max(1, (row_bits + DIGIT_BITS - 1) // DIGIT_BITS)
    cdef int digit_bits = max(1, (row_bits + passes - 1) // passes), p, t, shift
    cdef uint64_t mask = (<uint64_t>1 << digit_bits) - 1
    cdef int64_t digits = <int64_t>mask + 1, digit, total, here
    cdef const uint64_t *source = NULL            # the first pass reads the ids themselves
    cdef uint64_t *target = keys
    for p in range(passes):
        shift = position_bits + p * digit_bits
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _count_part(ids, wide, source, _split(n, t, threads), _split(n, t + 1, threads), shift, mask,
                        counts + t * digits)
        total = 0
        for digit in range(digits):
            for t in range(threads):
                here = counts[t * digits + digit]
                counts[t * digits + digit] = total
                total += here
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _place_part(ids, wide, source, _split(n, t, threads), _split(n, t + 1, threads), shift, mask, position_bits,
                        counts + t * digits, target)
        source = target
        target = other if target == keys else keys
    return <uint64_t *>source


cdef inline bint _begins(const uint64_t *sorted_keys, int64_t i, int position_bits) noexcept nogil:
    return i == 0 or sorted_keys[i] >> position_bits != sorted_keys[i - 1] >> position_bits


cdef int64_t _count_groups(const uint64_t *sorted_keys, int64_t lo, int64_t hi, int position_bits) noexcept nogil:
    cdef int64_t i, u = 0
    for i in range(lo, hi):
        u += _begins(sorted_keys, i, position_bits)
    return u


cdef void _write_groups(const uint64_t *sorted_keys, int64_t lo, int64_t hi, int position_bits, int64_t u, int64_t *rows_u,
                        int64_t *starts_u1, int64_t *order_n) noexcept nogil:
    cdef int64_t i
    cdef uint64_t mask = (<uint64_t>1 << position_bits) - 1
    for i in range(lo, hi):
        order_n[i] = <int64_t>(sorted_keys[i] & mask)
        if _begins(sorted_keys, i, position_bits):
            rows_u[u] = <int64_t>(sorted_keys[i] >> position_bits)
            starts_u1[u] = i
            u += 1


cdef cnp.ndarray _int64s(int64_t n):
    cdef cnp.npy_intp shape = n
    return cnp.PyArray_EMPTY(1, &shape, cnp.NPY_INT64, 0)


# One scratch buffer is kept between calls: given back to the system it costs a page fault for every 4 KiB of the next
# batch, 0.8 ms instead of 0.12 ms for 65536 ids. Taken and given back under the GIL.
cdef void *spare = NULL
cdef size_t spare_size = 0
cdef size_t MAX_SPARE = 32 << 20


cdef void *_take(size_t size) noexcept:
    global spare, spare_size
    cdef void *taken = spare
    if spare_size < size:
        return malloc(size)
    spare, spare_size = NULL, 0
    return taken


cdef void _give_back(void *buffer, size_t size) noexcept:
    global spare, spare_size
    if spare_size >= size or size > MAX_SPARE:
        free(buffer)
        return
    free(spare)
    spare, spare_size = buffer, size


cdef inline int _bits(int64_t below) noexcept nogil:
    """Bits that hold every integer 0 .. below - 1."""
    cdef int bits = 0
    while bits < 63 and (<int64_t>1 << bits) < below:
        bits += 1
    return bits


def group(cnp.ndarray ids not None, int64_t rows, int threads):
    """Unique rows of a batch: (rows_u, starts_u1, order_n), int64; see the top of this part."""
    cdef bint wide = _is_int64(ids)
    cdef int64_t n = cnp.PyArray_SIZE(ids), u = 0, here
    cdef int row_bits = _bits(rows), position_bits = _bits(n), t
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    _check_ids(ids, wide, rows, threads)
    if row_bits + position_bits > 64:
        raise ValueError(f"{n} ids into {rows} rows do not fit into a 64-bit key: split the batch")
    cdef size_t keys_size = (2 * n + 1) * sizeof(uint64_t)
    cdef uint64_t *keys = <uint64_t *>_take(keys_size)
    cdef int64_t *counts = <int64_t *>malloc(<size_t>(1 << DIGIT_BITS) * threads * sizeof(int64_t))
    cdef uint64_t *sorted_keys
    cdef int64_t *rows_u
    cdef int64_t *starts_u1
    cdef int64_t *order_n
    try:
        if keys is NULL or counts is NULL:
            raise MemoryError
        with nogil:
            sorted_keys = _sort(ids_n, wide, n, row_bits, position_bits, keys, keys + n, counts, threads)
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
                counts[t] = _count_groups(sorted_keys, _split(n, t, threads), _split(n, t + 1, threads), position_bits)
            for t in range(threads):
                here = counts[t]
                counts[t] = u
                u += here
        rows_array, starts_array, order_array = _int64s(u), _int64s(u + 1), _int64s(n)
        rows_u = <int64_t *>cnp.PyArray_DATA(rows_array)
        starts_u1 = <int64_t *>cnp.PyArray_DATA(starts_array)
        order_n = <int64_t *>cnp.PyArray_DATA(order_array)
        with nogil:
            starts_u1[u] = n
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
                _write_groups(sorted_keys, _split(n, t, threads), _split(n, t + 1, threads), position_bits, counts[t],
                              rows_u, starts_u1, order_n)
        if u and rows_u[u - 1] >= rows:           # another thread changed the ids after they were checked
            raise RuntimeError("the ids changed while they were grouped")
    finally:
        _give_back(keys, keys_size)
        free(counts)
    return rows_array, starts_array, order_array


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


cdef int64_t _run_begin(const Batch *b, int t, int threads) noexcept nogil:
    """The first unique row of thread t: runs of about equal numbers of gradients, so that a hot row costs one thread."""
    cdef int64_t lo = 0, hi = b.u, mid, target
    if b.starts is NULL or t == 0 or t == threads:
        return _split(b.u, t, threads)
    target = _split(b.starts[b.u], t, threads)
    while lo < hi:
        mid = (lo + hi) // 2
        if b.starts[mid] < target:
            lo = mid + 1
        else:
            hi = mid
    return lo


cdef inline const float *_at(const Batch *b, int64_t p) noexcept nogil:
    """The gradient of position p."""
    return b.grad_nd + (p if b.bag_n is NULL else b.bag_n[p]) * b.d


cdef inline const float *_row_gradient(const pe_kernels *k, const Batch *b, int64_t u, float *sum_d) noexcept nogil:
    """The gradient of unique row u: its only one where it lies, or the sum in position order in sum_d."""
    cdef int64_t p, first, last
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
    for p in range(first + 1, last):
        pe_prefetch_read(_at(b, b.order[min(p + 8, last - 1)]), b.d)
        if b.coef_n is NULL:
            k.add_row(sum_d, _at(b, b.order[p]), b.d)
        else:
            k.axpy_row(sum_d, _at(b, b.order[p]), b.coef_n[b.order[p]], b.d)
    if b.scale_by_count and last - first > 1:
        k.scale_row(sum_d, 1.0 / <float>(last - first), b.d)
    return sum_d


cdef inline void _prefetch_gradient(const Batch *b, int64_t u) noexcept nogil:
    if b.starts is NULL:
        pe_prefetch_read(b.grad_nd + u * b.d, b.d)
    else:
        pe_prefetch_read(_at(b, b.order[b.starts[u]]), b.d)


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
                   float *sum_d) noexcept nogil:
    cdef int64_t u
    for u in range(lo, hi):
        if u + 16 < hi:
            _prefetch_gradient(b, u + 16)
            pe_prefetch_write(column.data + b.rows[u + 16] * column.stride, b.d)
        if b.rows[u] != b.skip_row:
            k.axpy_row(column.data + b.rows[u] * column.stride, _row_gradient(k, b, u, sum_d), alpha, b.d)


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
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _add_run(k, &b, _run_begin(&b, t, threads), _run_begin(&b, t + 1, threads), column, alpha,
                     sums + t * (b.d + 16))
    free(sums)


cdef enum:
    MAX_COLUMNS = 4
    UPDATE_AHEAD = 16                             # rows: Adam on 1 M ids takes 48 ms with 4, 47 with 12, 41 with 16 to 48


cdef struct Rule:
    pe_update_row row
    pe_hyper hyper
    int columns
    float *data[MAX_COLUMNS]
    int64_t stride[MAX_COLUMNS]


cdef void _update_run(const pe_kernels *k, const Batch *b, const Rule *rule, int64_t lo, int64_t hi, float *sum_d) noexcept nogil:
    cdef int64_t u, row
    cdef int c
    cdef float *col[MAX_COLUMNS]
    for u in range(lo, hi):
        if u + UPDATE_AHEAD < hi:
            row = b.rows[u + UPDATE_AHEAD]
            for c in range(rule.columns):
                pe_prefetch_write(rule.data[c] + row * rule.stride[c], b.d)
            _prefetch_gradient(b, u + UPDATE_AHEAD)
        row = b.rows[u]
        if row == b.skip_row:
            continue
        for c in range(rule.columns):
            col[c] = rule.data[c] + row * rule.stride[c]
        rule.row(col, _row_gradient(k, b, u, sum_d), b.d, &rule.hyper)


def update(tuple columns not None, rows, starts, order, cnp.ndarray grad not None, str name, tuple hyper not None,
           int64_t skip_row, bint scale_by_count, int threads, bag_of=None, coef=None):
    """One optimizer step over the unique rows: sum, scale and update in one pass.

    `columns`: the weight and the rule's state columns; `name`: "sgd", "adagrad", "adam";
    `hyper`: (lr, eps, 1 - beta1, 1 - beta2), see pe_hyper.
    """
    cdef Batch b
    cdef Rule rule
    cdef Column column
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    index, state = RULES[name]
    rule.columns = 1 + len(state)
    rule.row = k.update[<int>index]
    rule.hyper.lr, rule.hyper.eps, rule.hyper.one_minus_b1, rule.hyper.one_minus_b2 = hyper
    if len(columns) != rule.columns:
        raise ValueError(f"{name} takes {rule.columns} columns, not {len(columns)}")
    for t in range(rule.columns):
        column = columns[t]
        _require_writable(column)
        if column.dim != (<Column>columns[0]).dim or column.rows != (<Column>columns[0]).rows:
            raise ValueError("the columns of a rule have one shape")
        rule.data[t], rule.stride[t] = column.data, column.stride
    column = columns[0]
    _batch(&b, rows, starts, order, grad, column.dim, column.rows, bag_of, coef)
    b.skip_row, b.scale_by_count = skip_row, scale_by_count
    cdef float *sums = _scratch(b.d, threads)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            if t:
                pe_leave_cpu(caller)
            _update_run(k, &b, &rule, _run_begin(&b, t, threads), _run_begin(&b, t + 1, threads), sums + t * (b.d + 16))
    free(sums)


cdef void _renorm_run(const pe_kernels *k, Column column, const int64_t *rows_u, int64_t lo, int64_t hi, double max_norm,
                      double p, int64_t *clipped, int64_t *nans) noexcept nogil:
    # 16 norms first, then 16 comparisons: one right after its norm would stall on the norm's long chain whenever it is
    # predicted wrong.
    cdef double norm[16]
    cdef int64_t u, block, end
    for block in range(lo, hi, 16):
        end = min(block + 16, hi)
        for u in range(block, end):
            if u + UPDATE_AHEAD < hi:
                pe_prefetch_write(column.data + rows_u[u + UPDATE_AHEAD] * column.stride, column.dim)
            norm[u - block] = k.norm_row(column.data + rows_u[u] * column.stride, p, column.dim)
        for u in range(block, end):
            if norm[u - block] > max_norm:
                k.scale_row(column.data + rows_u[u] * column.stride, <float>(max_norm / (norm[u - block] + 1e-7)), column.dim)
                clipped[0] += 1
            elif norm[u - block] != norm[u - block]:
                nans[0] += 1


def renorm(Column column not None, cnp.ndarray rows not None, double max_norm, double p, int threads):
    """Scale unique rows whose p-norm exceeds max_norm down to it; (rows scaled, rows with NaN, which stay as they are)."""
    cdef int64_t u = cnp.PyArray_SIZE(rows)
    cdef int t
    cdef const pe_kernels *k = kernels
    cdef cnp.ndarray counts = cnp.PyArray_ZEROS(2, [threads, 16], cnp.NPY_INT64, 0)
    cdef int64_t *counts_t = <int64_t *>cnp.PyArray_DATA(counts)
    _require_writable(column)
    if not _is_int64(rows):
        raise TypeError("rows are int64")
    _check_ids(rows, True, column.rows, threads)
    cdef const int64_t *rows_u = <const int64_t *>cnp.PyArray_DATA(rows)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _renorm_run(k, column, rows_u, _split(u, t, threads), _split(u, t + 1, threads), max_norm, p,
                        counts_t + 16 * t, counts_t + 16 * t + 1)
    return int((<object>counts)[:, 0].sum()), int((<object>counts)[:, 1].sum())


# name → (index in pe_kernels.update, names of the state columns); the weight comes first
RULES = {"sgd": (0, ()), "adagrad": (1, ("sum",)), "adam": (2, ("exp_avg", "exp_avg_sq"))}
