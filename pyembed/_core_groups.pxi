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
    FEW = 64                                      # ids that are sorted by insertion: counting digits takes 3 us by itself


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


cdef uint64_t *_sort(const void *ids, bint wide, int64_t n, int row_bits, int position_bits, uint64_t *keys,
                     uint64_t *other, int64_t *counts, int threads) noexcept nogil:
    """Stable radix sort by row, lowest digit first. Returns which of both buffers holds the sorted (row, position)."""
    cdef int passes = max(1, (row_bits + DIGIT_BITS - 1) // DIGIT_BITS)
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


@cython.final
cdef class _Sorted:
    """The ids of a batch, checked, as sorted (row, position) keys in a block that also has n integers to spare, and `rest`."""

    cdef int64_t n
    cdef int position_bits
    cdef uint64_t *keys
    cdef int64_t *spare_n
    cdef int64_t *rest
    cdef _Block block

    def __cinit__(self, cnp.ndarray ids, int64_t rows, int threads, int64_t rest):
        cdef bint wide = _is_int64(ids)
        cdef int row_bits = _bits(rows)
        cdef const void *ids_n = cnp.PyArray_DATA(ids)
        self.n = cnp.PyArray_SIZE(ids)
        self.position_bits = _bits(self.n)
        _check_ids(ids, wide, rows, threads)
        if row_bits + self.position_bits > 64:
            raise ValueError(f"{self.n} ids into {rows} rows do not fit into a 64-bit key: split the batch")
        self.block = _Block(2 * self.n + rest)
        self.rest = self.block.data + 2 * self.n
        cdef int64_t *counts = <int64_t *>malloc(<size_t>(1 if self.n <= FEW else 1 << DIGIT_BITS) * threads * sizeof(int64_t))
        if counts is NULL:
            raise MemoryError
        cdef uint64_t *first = <uint64_t *>self.block.data
        with nogil:
            self.keys = _sort(ids_n, wide, self.n, row_bits, self.position_bits, first, first + self.n, counts, threads)
        free(counts)
        self.spare_n = <int64_t *>(first + self.n if self.keys == first else first)
        if self.n and <int64_t>(self.keys[self.n - 1] >> self.position_bits) >= rows:
            raise RuntimeError("the ids changed while they were grouped")


def group(cnp.ndarray ids not None, int64_t rows, int threads):
    """Unique rows of a batch: (rows_u, starts_u1, order_n), int64; see the top of this part."""
    cdef int64_t n = cnp.PyArray_SIZE(ids), u = 0
    cdef _Sorted batch = _Sorted(ids, rows, threads, n + 1 + 2 * threads)
    cdef uint64_t *keys = batch.keys
    cdef int64_t *starts_u1 = batch.rest
    cdef int64_t *end_t = starts_u1 + n + 1
    cdef int64_t *before_t = end_t + threads
    cdef int position_bits = batch.position_bits, t
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            end_t[t] = _count_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), position_bits)
        for t in range(threads):
            u += end_t[t]
            end_t[t] = u
            before_t[t] = <int64_t>(keys[_split(n, t, threads) - 1] >> position_bits) if _split(n, t, threads) else -1
        starts_u1[u] = n
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _write_groups(keys, _split(n, t, threads), _split(n, t + 1, threads), position_bits, before_t[t], end_t[t],
                          batch.spare_n, starts_u1)
    return (_int64s(batch.block, batch.spare_n, u), _int64s(batch.block, starts_u1, u + 1),
            _int64s(batch.block, <int64_t *>keys, n))


cdef struct Sorting:
    # One batch of group_many.
    const void *ids_n
    uint64_t *keys
    int64_t *rows_u
    int64_t *starts_u1
    int64_t n
    int64_t u
    bint wide
    int row_bits
    int position_bits


cdef void _sort_one(Sorting *s, int64_t *counts) noexcept nogil:
    """At first keys and rows_u are for keys; both may change places."""
    cdef uint64_t *keys = _sort(s.ids_n, s.wide, s.n, s.row_bits, s.position_bits, s.keys, <uint64_t *>s.rows_u, counts, 1)
    if keys != s.keys:
        s.keys, s.rows_u = keys, <int64_t *>s.keys
    s.u = _count_groups(keys, 0, s.n, s.position_bits)
    _write_groups(keys, 0, s.n, s.position_bits, -1, s.u, s.rows_u, s.starts_u1)
    s.starts_u1[s.u] = s.n


def group_many(list batches not None, int threads):
    """`group` for many small batches in one parallel region, a batch to a thread; `batches`: pairs (ids, rows)."""
    cdef int64_t b, count = len(batches), total = 0, at = 0
    cdef cnp.ndarray ids
    cdef _Block block
    cdef Sorting *s = <Sorting *>malloc((count + 1) * sizeof(Sorting))
    cdef int64_t *counts = <int64_t *>malloc(<size_t>(1 << DIGIT_BITS) * threads * sizeof(int64_t))
    try:
        if s is NULL or counts is NULL:
            raise MemoryError
        for b in range(count):
            ids, rows = batches[b]
            s[b].wide, s[b].ids_n, s[b].n = _is_int64(ids), cnp.PyArray_DATA(ids), cnp.PyArray_SIZE(ids)
            s[b].row_bits, s[b].position_bits = _bits(rows), _bits(s[b].n)
            _check_ids(ids, s[b].wide, rows, 1)
            if s[b].row_bits + s[b].position_bits > 64:
                raise ValueError(f"{s[b].n} ids into {rows} rows do not fit into a 64-bit key: split the batch")
            total += 3 * s[b].n + 1
        block = _Block(total)
        for b in range(count):
            s[b].rows_u = block.data + at
            s[b].keys = <uint64_t *>s[b].rows_u + s[b].n
            s[b].starts_u1 = s[b].rows_u + 2 * s[b].n
            at += 3 * s[b].n + 1
        with nogil:
            for b in prange(count, num_threads=threads, schedule="dynamic", chunksize=1, use_threads_if=threads > 1):
                _sort_one(&s[b], counts + threadid() * (<int64_t>1 << DIGIT_BITS))
        groups = []
        for b in range(count):
            if s[b].u and s[b].rows_u[s[b].u - 1] >= <int64_t>batches[b][1]:
                raise RuntimeError("the ids changed while they were grouped")
            groups.append((_int64s(block, s[b].rows_u, s[b].u), _int64s(block, s[b].starts_u1, s[b].u + 1),
                           _int64s(block, <int64_t *>s[b].keys, s[b].n)))
        return groups
    finally:
        free(s)
        free(counts)
