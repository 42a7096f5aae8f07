# From the ids of a batch to its unique rows: a stable radix sort of (row, position), which fills in the arrays of `Batch`.
#
# Duplicates are summed in position order whatever the number of threads, and a thread that owns a run of unique rows needs
# no lock.

cdef enum:
    DIGIT_BITS = 11                               # 2048 counters: 16 KiB, inside the L1 cache
    SHORT_DIGIT_BITS = 8                          # for batches that are no longer than the counters
    INSERTION_IDS = 64                            # up to this number, ids are sorted by insertion


cdef void _count_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[<uint64_t>ids[i] & mask] += 1


# The keys of each digit go to a region of their own. Two thousand regions are more than the hardware prefetcher follows, so
# the next line of each is prefetched: within a step 1 M keys take 2.5 ms to group instead of 4.5, and 65536 take 0.20 ms
# instead of 0.26.
cdef enum:
    CACHED_KEYS = 1 << 14                         # fewer keys of a thread are in the cache, and need no prefetch


cdef void _place_ids(const ids_t *ids, int64_t lo, int64_t hi, uint64_t mask, int position_bits, int64_t *cursor,
                     uint64_t *keys) noexcept nogil:
    cdef int64_t i, digit
    cdef bint prefetch = hi - lo >= CACHED_KEYS
    for i in range(lo, hi):
        digit = <int64_t>(<uint64_t>ids[i] & mask)
        keys[cursor[digit]] = (<uint64_t>ids[i] << position_bits) | <uint64_t>i
        cursor[digit] += 1
        if prefetch:
            pe_prefetch_line(keys + cursor[digit] + 7)


cdef void _count_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *count) noexcept nogil:
    cdef int64_t i
    for i in range(lo, hi):
        count[(keys[i] >> shift) & mask] += 1


cdef void _place_keys(const uint64_t *keys, int64_t lo, int64_t hi, int shift, uint64_t mask, int64_t *cursor,
                      uint64_t *placed) noexcept nogil:
    cdef int64_t i, digit
    cdef bint prefetch = hi - lo >= CACHED_KEYS
    for i in range(lo, hi):
        digit = <int64_t>((keys[i] >> shift) & mask)
        placed[cursor[digit]] = keys[i]
        cursor[digit] += 1
        if prefetch:
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
    """The number of integers that `_group` needs in addition to its result."""
    return threads * (2 if n <= INSERTION_IDS else <int64_t>1 << _digit_bits(n))


cdef uint64_t *_sort(const void *ids, bint wide, int64_t n, int row_bits, int position_bits, uint64_t *keys,
                     uint64_t *other, int64_t *counts, int threads) noexcept nogil:
    """Stable radix sort by row, lowest digit first. Returns the one of the two buffers that holds the sorted (row, position)."""
    cdef int widest = _digit_bits(n), passes = max(1, (row_bits + widest - 1) // widest)
    cdef int digit_bits = max(1, (row_bits + passes - 1) // passes), p, t, shift
    cdef uint64_t mask = (<uint64_t>1 << digit_bits) - 1
    cdef int64_t digits = <int64_t>mask + 1, digit, total, here
    cdef const uint64_t *source = NULL            # the first pass reads the ids themselves
    cdef uint64_t *target = keys
    if n <= INSERTION_IDS:
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
    """Write the groups that begin at lo .. hi - 1, and turn these keys into positions.

    before: the row of the key before lo, or -1; u: the first group that begins at hi or later.
    """
    cdef int64_t i, first = lo, row, next_row
    cdef uint64_t mask = (<uint64_t>1 << position_bits) - 1
    while first < hi and <int64_t>(keys[first] >> position_bits) == before:
        keys[first] &= mask
        first += 1
    if first == hi:
        return
    # Backwards, so that the first key of a group writes last. A branch would be mispredicted for every third random id.
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
    """The number of bits that hold every integer 0 .. below - 1."""
    cdef int bits = 0
    while bits < 63 and (<int64_t>1 << bits) < below:
        bits += 1
    return bits


cdef int _begin_group(Batch b, int threads) except -1:
    """Check a batch before it is sorted. A batch of unique ids is then grouped already."""
    if b.unique:
        _require_ascending(b)
        _check(b, threads)
        b.u, b.rows_u, b.grouped = b.n, <int64_t *>b.ids_n, True
        return 0
    _check(b, threads)
    b.row_bits, b.position_bits = _bits(b.num_rows), _bits(b.n)
    if b.row_bits + b.position_bits > 64:
        raise ValueError(f"{b.n} ids into {b.num_rows} rows do not fit into a 64-bit key: split the batch")
    return 0


cdef int _require_ascending(Batch b) except -1:
    cdef int64_t i
    cdef const int64_t *ids = <const int64_t *>b.ids_n
    for i in range(1, b.n):
        if ids[i] <= ids[i - 1]:
            raise ArgumentError("a SparseGrad has unique ascending ids; use step(ids, grad)")
    return 0


cdef inline int64_t _elements(Batch b) noexcept:
    """The number of integers in the arrays of a batch."""
    return 3 * b.n + 1


cdef void _place_arrays(Batch b, _Block block, int64_t at) noexcept:
    """Place the arrays of a batch at element `at` of a block. Two of them hold keys during the sort, and may be swapped."""
    b.block = block
    b.order_n, b.rows_u, b.starts_u1 = block.data + at, block.data + at + b.n, block.data + at + 2 * b.n


cdef void _group(Batch b, int64_t *counts, int threads) noexcept nogil:
    cdef int64_t *end_t = counts
    cdef int64_t *before_t = counts + threads
    cdef int64_t n = b.n
    cdef int bits = b.position_bits, t
    cdef uint64_t *keys = <uint64_t *>b.order_n
    keys = _sort(b.ids_n, b.wide, n, b.row_bits, bits, keys, <uint64_t *>b.rows_u, counts, threads)
    if <int64_t *>keys != b.order_n:
        b.order_n, b.rows_u = b.rows_u, b.order_n
    b.u = 0
    if threads == 1:
        b.u = _count_groups(keys, 0, n, bits)
        _write_groups(keys, 0, n, bits, -1, b.u, b.rows_u, b.starts_u1)
    else:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            end_t[t] = _count_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), bits)
        for t in range(threads):
            b.u += end_t[t]
            end_t[t] = b.u
            before_t[t] = <int64_t>(keys[_split(n, t, threads) - 1] >> bits) if _split(n, t, threads) else -1
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            _write_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), bits, before_t[t], end_t[t], b.rows_u,
                          b.starts_u1)
    b.starts_u1[b.u] = n


cdef int _end_group(Batch b) except -1:
    if b.u and b.rows_u[b.u - 1] >= b.num_rows:
        raise RuntimeError("the ids changed while they were grouped")
    b.grouped = True
    return 0


cdef int _group_one(Batch b, int threads) except -1:
    """Group a batch with all threads."""
    if not b.grouped:
        _begin_group(b, threads)
    if b.grouped:
        return 0
    cdef _Block block = _new_block(_elements(b) + _counters(b.n, threads))
    _place_arrays(b, block, 0)
    with nogil:
        _group(b, block.data + 3 * b.n + 1, threads)
    return _end_group(b)


cdef int _group_each(list batches, int threads) except -1:
    """Group several batches in one parallel region, a batch to a thread."""
    cdef int64_t j, n = len(batches), total = 0, at = 0, counters = <int64_t>1 << DIGIT_BITS
    cdef Batch b
    cdef void **each = <void **>malloc(n * sizeof(void *))
    cdef int64_t *counts = <int64_t *>malloc(<size_t>(counters * threads) * sizeof(int64_t))
    try:
        if each is NULL or counts is NULL:
            raise MemoryError
        for b in batches:
            total += _elements(b)
        block = _new_block(total)
        for j in range(n):
            b = batches[j]
            _place_arrays(b, block, at)
            at += _elements(b)
            each[j] = <void *>b
        with nogil:
            for j in prange(n, num_threads=threads, schedule="dynamic", chunksize=1, use_threads_if=threads > 1):
                _group(<Batch>each[j], counts + threadid() * counters, 1)
        for b in batches:
            _end_group(b)
    finally:
        free(each)
        free(counts)
    return 0


def group(list batches not None, int threads):
    """Find the unique rows of batches, in place: one batch with all threads, several batches with a thread for each.

    Raises `IdError` for an id outside its table before any batch is sorted.
    """
    cdef Batch b
    if len(batches) == 1:
        _group_one(batches[0], threads)
        return
    left = []
    for b in batches:
        if not b.grouped:
            _begin_group(b, 1)
        if not b.grouped:
            left.append(b)
    if left:
        _group_each(left, threads)
