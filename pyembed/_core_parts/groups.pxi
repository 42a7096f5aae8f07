# From a batch's ids to its unique rows.
#
# A batch is grouped by a stable radix sort of (row, position). Three arrays describe the result:
#   rows_u     unique rows, ascending
#   starts_u1  group u holds order_n[starts_u1[u]] .. order_n[starts_u1[u + 1] - 1]
#   order_n    positions in the batch, ascending within a group
# So duplicates are summed in position order whatever the number of threads, and a thread that owns a run of unique
# rows needs no lock. A batch whose ids are unique and ascending already needs no grouping: starts and order are None.

cdef enum:
    DIGIT_BITS = 11                               # 2048 counters: 16 KiB, inside the L1 cache
    SHORT_DIGIT_BITS = 8                          # for batches that are no longer than the counters
    FEW = 64                                      # ids that are sorted by insertion


cdef void _count_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[<uint64_t>ids[i] & mask] += 1


# Each digit's keys go to a place of their own: two thousand places, which is more than the processor watches. The next line of
# each is asked for: inside a step 1 M keys take 2.5 ms to group instead of 4.5, and 65536 take 0.20 ms instead of 0.26.
cdef enum:
    FAR = 1 << 14                                 # keys of a thread; fewer are in the cache


cdef void _place_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int position_bits, int64_t *cursor,
                     uint64_t *keys) noexcept nogil:
    cdef int64_t i, digit
    cdef bint far = hi - lo >= FAR
    for i in range(lo, hi):
        digit = <int64_t>(<uint64_t>ids[i] & mask)
        keys[cursor[digit]] = (<uint64_t>ids[i] << position_bits) | <uint64_t>i
        cursor[digit] += 1
        if far:
            pe_prefetch_line(keys + cursor[digit] + 7)


cdef void _count_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[(keys[i] >> shift) & mask] += 1


cdef void _place_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *cursor,
                      uint64_t *placed) noexcept nogil:
    cdef int64_t i, digit
    cdef bint far = hi - lo >= FAR
    for i in range(lo, hi):
        digit = <int64_t>((keys[i] >> shift) & mask)
        placed[cursor[digit]] = keys[i]
        cursor[digit] += 1
        if far:
            pe_prefetch_line(placed + cursor[digit] + 7)


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


cdef void _insert_ids(const ids_t *ids, int64_t n, int position_bits, uint64_t *keys) noexcept nogil:
    cdef int64_t i, at
    cdef uint64_t key
    for i in range(n):
        key = (<uint64_t>ids[i] << position_bits) | <uint64_t>i
        at = i
        while at > 0 and keys[at - 1] > key:
            keys[at] = keys[at - 1]
            at -= 1
        keys[at] = key


cdef inline int _digit_bits(int64_t n) noexcept nogil:
    return DIGIT_BITS if n >> DIGIT_BITS else SHORT_DIGIT_BITS


cdef inline int64_t _counters(int64_t n, int threads) noexcept nogil:
    """How many integers `_group` needs beside its result."""
    return threads * (2 if n <= FEW else <int64_t>1 << _digit_bits(n))


cdef uint64_t *_sort(const void *ids, bint wide, int64_t n, int row_bits, int position_bits, uint64_t *keys,
                     uint64_t *other, int64_t *counts, int threads) noexcept nogil:
    """Stable radix sort by row, lowest digit first. Returns which of both buffers holds the sorted (row, position)."""
    cdef int most = _digit_bits(n), passes = max(1, (row_bits + most - 1) // most)
    cdef int digit_bits = max(1, (row_bits + passes - 1) // passes), p, t, shift
    cdef uint64_t mask = (<uint64_t>1 << digit_bits) - 1
    cdef int64_t digits = <int64_t>mask + 1, digit, total, here
    cdef const uint64_t *source = NULL            # the first pass reads the ids themselves
    cdef uint64_t *target = keys
    if n <= FEW:
        if wide:
            _insert_ids(<const int64_t *>ids, n, position_bits, keys)
        else:
            _insert_ids(<const int32_t *>ids, n, position_bits, keys)
        return keys
    for p in range(passes):
        shift = position_bits + p * digit_bits
        if threads == 1:
            _count_part(ids, wide, source, 0, n, shift, mask, counts)
        else:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                _count_part(ids, wide, source, _split(n, t, threads), _split(n, t + 1, threads), shift, mask,
                            counts + t * digits)
        total = 0
        for digit in range(digits):
            for t in range(threads):
                here = counts[t * digits + digit]
                counts[t * digits + digit] = total
                total += here
        if threads == 1:
            _place_part(ids, wide, source, 0, n, shift, mask, position_bits, counts, target)
        else:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
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


cdef void _write_groups(uint64_t *keys, int64_t lo, int64_t hi, int position_bits, int64_t before, int64_t u, int64_t *rows_u,
                        int64_t *starts_u1) noexcept nogil:
    """The groups that begin at lo .. hi - 1, and these keys as positions.

    before: the row of the key before them, or -1; u: the first group that begins after them.
    """
    cdef int64_t i, first = lo, row, next_row
    cdef uint64_t mask = (<uint64_t>1 << position_bits) - 1
    while first < hi and <int64_t>(keys[first] >> position_bits) == before:
        keys[first] &= mask
        first += 1
    if first == hi:
        return
    # Backwards, so that a group's first key writes last: a branch would be predicted wrong for every third random id.
    row = <int64_t>(keys[hi - 1] >> position_bits)
    for i in range(hi - 1, first, -1):
        rows_u[u - 1], starts_u1[u - 1] = row, i
        next_row = <int64_t>(keys[i - 1] >> position_bits)
        u -= next_row != row
        row = next_row
        keys[i] &= mask
    rows_u[u - 1], starts_u1[u - 1] = row, first
    keys[first] &= mask


cdef inline int _bits(int64_t below) noexcept nogil:
    """Bits that hold every integer 0 .. below - 1."""
    cdef int bits = 0
    while bits < 63 and (<int64_t>1 << bits) < below:
        bits += 1
    return bits


cdef struct Grouping:
    # A batch that is grouped. Two of its arrays hold keys at first, and may change places.
    const void *ids_n
    bint wide
    int64_t n
    int row_bits
    int position_bits
    int64_t u
    int64_t *order_n
    int64_t *rows_u
    int64_t *starts_u1


cdef int _check_batch(Grouping *g, cnp.ndarray ids, int64_t rows, int threads) except -1:
    g.wide, g.ids_n, g.n = _is_int64(ids), cnp.PyArray_DATA(ids), cnp.PyArray_SIZE(ids)
    g.row_bits, g.position_bits = _bits(rows), _bits(g.n)
    _check_ids(ids, g.wide, rows, threads)
    if g.row_bits + g.position_bits > 64:
        raise ValueError(f"{g.n} ids into {rows} rows do not fit into a 64-bit key: split the batch")
    return 0


cdef void _place_arrays(Grouping *g, int64_t *data) noexcept nogil:
    """data has 3 n + 1 elements."""
    g.order_n, g.rows_u, g.starts_u1 = data, data + g.n, data + 2 * g.n


cdef void _group(Grouping *g, int64_t *counts, int threads) noexcept nogil:
    cdef int64_t *end_t = counts
    cdef int64_t *before_t = counts + threads
    cdef int64_t n = g.n
    cdef int bits = g.position_bits, t
    cdef uint64_t *keys = <uint64_t *>g.order_n
    keys = _sort(g.ids_n, g.wide, n, g.row_bits, bits, keys, <uint64_t *>g.rows_u, counts, threads)
    if <int64_t *>keys != g.order_n:
        g.order_n, g.rows_u = g.rows_u, g.order_n
    g.u = 0
    if threads == 1:
        g.u = _count_groups(keys, 0, n, bits)
        _write_groups(keys, 0, n, bits, -1, g.u, g.rows_u, g.starts_u1)
    else:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            end_t[t] = _count_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), bits)
        for t in range(threads):
            g.u += end_t[t]
            end_t[t] = g.u
            before_t[t] = <int64_t>(keys[_split(n, t, threads) - 1] >> bits) if _split(n, t, threads) else -1
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            _write_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), bits, before_t[t], end_t[t], g.rows_u,
                          g.starts_u1)
    g.starts_u1[g.u] = n


cdef _Block _grouped(Grouping *g, cnp.ndarray ids, int64_t rows, int threads):
    """Group a batch; its arrays lie in the block that is returned."""
    _check_batch(g, ids, rows, threads)
    cdef _Block block = _new_block(3 * g.n + 1 + _counters(g.n, threads))
    _place_arrays(g, block.data)
    with nogil:
        _group(g, block.data + 3 * g.n + 1, threads)
    _require_unchanged(g, rows)
    return block


cdef inline int _require_unchanged(const Grouping *g, int64_t rows) except -1:
    if g.u and g.rows_u[g.u - 1] >= rows:
        raise RuntimeError("the ids changed while they were grouped")
    return 0


cdef inline tuple _arrays(const Grouping *g, _Block block):
    return _int64s(block, g.rows_u, g.u), _int64s(block, g.starts_u1, g.u + 1), _int64s(block, g.order_n, g.n)


def group(cnp.ndarray ids not None, int64_t rows, int threads):
    """Unique rows of a batch: (rows_u, starts_u1, order_n), int64; see the top of this part."""
    cdef Grouping g
    cdef _Block block = _grouped(&g, ids, rows, threads)
    return _arrays(&g, block)


def group_many(list batches not None, int threads):
    """`group` for many small batches in one parallel region, a batch to a thread; `batches`: pairs (ids, rows)."""
    cdef int64_t b, count = len(batches), total = 0, at = 0, counters = <int64_t>1 << DIGIT_BITS
    cdef _Block block
    cdef Grouping *g = <Grouping *>malloc((count + 1) * sizeof(Grouping))
    cdef int64_t *counts = <int64_t *>malloc(<size_t>(counters * threads) * sizeof(int64_t))
    try:
        if g is NULL or counts is NULL:
            raise MemoryError
        for b in range(count):
            ids, rows = batches[b]
            _check_batch(&g[b], ids, rows, 1)
            total += 3 * g[b].n + 1
        block = _new_block(total)
        for b in range(count):
            _place_arrays(&g[b], block.data + at)
            at += 3 * g[b].n + 1
        with nogil:
            for b in prange(count, num_threads=threads, schedule="dynamic", chunksize=1, use_threads_if=threads > 1):
                _group(&g[b], counts + threadid() * counters, 1)
        groups = []
        for b in range(count):
            _require_unchanged(&g[b], batches[b][1])
            groups.append(_arrays(&g[b], block))
        return groups
    finally:
        free(g)
        free(counts)
