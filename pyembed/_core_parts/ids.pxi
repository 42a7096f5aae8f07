# The one range check of ids, and the width of their integers.

cdef inline bint _is_int64(cnp.ndarray ids) except -1:
    """True for int64 ids, False for int32; `TypeError` for anything else."""
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(ids)
    if not cnp.PyTypeNum_ISSIGNED(cnp.PyArray_TYPE(ids)) or not cnp.PyArray_ISCARRAY_RO(ids) or (size != 8 and size != 4):
        raise TypeError("expected C-contiguous int32 or int64 ids")
    return size == 8


cdef int64_t _first_bad(const ids_t *ids, int64_t n, int64_t rows) noexcept nogil:
    """Position of the first id outside 0..rows-1, or -1.

    An id is bad if it or its distance to the last row is negative: one sign bit, gathered over a block without a branch
    or a comparison, so that it vectorises at every level.
    """
    cdef int64_t i, block, end
    cdef uint64_t last = <uint64_t>rows - 1, signs
    for block in range(0, n, 1024):
        end = min(block + 1024, n)
        signs = 0
        for i in range(block, end):
            signs |= <uint64_t><int64_t>ids[i] | (last - <uint64_t><int64_t>ids[i])
        if <int64_t>signs < 0:
            for i in range(block, end):
                if <uint64_t><int64_t>ids[i] >= <uint64_t>rows:
                    return i
    return -1


# Fewer ids than this are checked by one thread: in less than the 2 us that a parallel region takes.
cdef int64_t SERIAL_CHECK = 1 << 14


cdef int _check_ids(cnp.ndarray ids, bint wide, int64_t rows, int threads) except -1:
    """The one range check of ids. Raises IdError with the index and the value of the first bad id, and the allowed range."""
    cdef int64_t n = cnp.PyArray_SIZE(ids), bad = -1, found
    cdef int t, caller = pe_this_cpu()
    cdef const void *data = cnp.PyArray_DATA(ids)
    if threads == 1 or n < SERIAL_CHECK:
        bad = _first_bad(<const int64_t *>data, n, rows) if wide else _first_bad(<const int32_t *>data, n, rows)
    else:
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                if t:
                    pe_leave_cpu(caller)
                _check_part(data, wide, _split(n, t, threads), _split(n, t + 1, threads), rows, &bad)
    if bad < 0:
        return 0
    found = bad
    index = []
    for extent in reversed((<object>ids).shape):
        index.append(found % extent)
        found //= extent
    where = f"ids[{', '.join(str(i) for i in reversed(index))}]" if index else "ids"
    value = (<object>ids).reshape(-1)[bad]
    allowed = f"0..{rows - 1}" if rows else "an empty table"
    raise IdError(f"{where} = {value} is outside {allowed}")


def check_ids(cnp.ndarray ids not None, int64_t rows, int threads):
    """The id check alone."""
    _check_ids(ids, _is_int64(ids), rows, threads)


cdef void _check_part(const void *ids, bint wide, int64_t lo, int64_t hi, int64_t rows, int64_t *bad) noexcept nogil:
    cdef int64_t found
    if wide:
        found = _first_bad(<const int64_t *>ids + lo, hi - lo, rows)
    else:
        found = _first_bad(<const int32_t *>ids + lo, hi - lo, rows)
    if found >= 0:
        _lower(bad, lo + found)


cdef extern from *:
    """
    /* *bad = the lower of both, where -1 stands for none; from several threads. */
    static inline void _pe_lower(int64_t *bad, int64_t found) {
        int64_t seen = __atomic_load_n(bad, __ATOMIC_RELAXED);
        while ((seen < 0 || found < seen)
               && !__atomic_compare_exchange_n(bad, &seen, found, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {}
    }
    """
    void _lower "_pe_lower"(int64_t *bad, int64_t found) noexcept nogil
