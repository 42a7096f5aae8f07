# Rows of a mapped file: whether they are in memory, and readahead of the rows that a loop uses next. To "ask" for pages is to
# request their readahead, without waiting.

cdef enum:
    SAMPLE = 64                                   # rows of a batch that are looked up in the page cache
    CALM = 2                                      # samples in a row, all in memory, after which a table counts as resident
    CHECK_ROWS = 4096                             # rows between two reads of the counter of page faults
    FAULT_SHARE = 64                              # a table is cold if more than 1 row in 64 waited for a disk
    READAHEAD_ROWS = 1024                              # rows: 512 leave the disk idle at times, 4096 gain nothing
    READAHEAD_STEP = 64
    COLD_SPAN_ROWS = 32768                        # rows between two checks for signals: half a second at 80 thousand a second


cdef int64_t NEVER = 1 << 62


@cython.final
cdef class Pages:
    """Whether the rows of a mapped file are in memory, learnt from the calls that use them.

    A table counts as cold until samples of its batches are all found in the page cache. A resident table is not sampled: it
    counts as cold again when too many of its rows cause page faults.
    """

    cdef readonly bint cold
    cdef readonly int64_t batches                 # batches that were sampled
    cdef readonly int64_t rows                    # rows that these batches named
    cdef readonly int64_t requested                 # ranges of pages whose readahead was requested
    cdef readonly int64_t sampled                 # rows that were sampled
    cdef readonly int64_t found                   # sampled rows that were in memory
    cdef int64_t unchecked, faults
    cdef int calm

    def __cinit__(self):
        self.cold = True

    cdef bint _faulted(self, int64_t n) noexcept:
        """Whether too many rows waited for a disk since the counter was last read."""
        cdef int64_t faults, rows
        self.unchecked += n
        if self.unchecked < CHECK_ROWS:
            return False
        faults, rows = pe_major_faults() - self.faults, self.unchecked
        self.faults, self.unchecked = self.faults + faults, 0
        return faults * FAULT_SHARE > rows

    cdef bint _sample(self, int64_t found, int64_t sampled, int64_t n) noexcept:
        self.batches += 1
        self.rows += n
        self.sampled += sampled
        self.found += found
        if found < sampled:
            self.calm = 0
            return True
        self.calm += 1
        if self.calm >= CALM:
            self.cold, self.calm, self.unchecked, self.faults = False, 0, 0, pe_major_faults()
        return False


cdef int64_t _count_resident(Column column, const ids_t *ids, int64_t n, int64_t sampled) noexcept:
    """The number of rows that begin on a page in memory, among `sampled` evenly spaced rows of a batch."""
    cdef int64_t i, found = 0
    for i in range(sampled):
        found += pe_page_resident(column.data + ids[i * n // sampled] * column.stride)
    return found


cdef bint _is_cold(Column column, const ids_t *ids, int64_t n) noexcept:
    """Whether this batch needs readahead; its ids were checked. Costs nothing if the table is resident."""
    cdef Pages pages = column.pages
    cdef int64_t sampled = min(n, SAMPLE)
    if n == 0:
        return False
    if not pages.cold:
        if not pages._faulted(n):
            return False
        pages.cold = True
    return pages._sample(_count_resident(column, ids, n, sampled), sampled, n)


cdef inline bint _batch_is_cold(Column column, const void *ids, bint wide, int64_t n) noexcept:
    if column.pages is None:
        return False
    if wide:
        return _is_cold(column, <const int64_t *>ids, n)
    return _is_cold(column, <const int32_t *>ids, n)


cdef struct Ahead:
    # The readahead of one thread for the rows ids[lo] .. ids[hi - 1]; the loop calls _readahead at row `next`.
    pe_readahead requests
    int64_t next, requested, hi


cdef inline void _ahead_begin(Ahead *a, bint cold, int64_t lo, int64_t hi) noexcept nogil:
    a.next = NEVER
    if cold:
        pe_readahead_begin(&a.requests)
        a.next, a.requested, a.hi = lo, lo, hi


cdef void _readahead(Ahead *a, int64_t i, const float *base, int64_t stride, int64_t floats, const ids_t *ids) noexcept nogil:
    cdef int64_t p, end = min(i + READAHEAD_ROWS, a.hi)
    for p in range(a.requested, end):
        pe_readahead_add(&a.requests, base + ids[p] * stride, 4 * floats)
    a.requested = end
    a.next = i + READAHEAD_STEP
    if end == a.hi:
        pe_readahead_flush(&a.requests)
        a.next = NEVER


cdef inline void _ahead_end(Ahead *a, bint cold, Pages pages) noexcept nogil:
    if cold:
        pe_readahead_end(&a.requests, &pages.requested)


cdef void _readahead_span(Column column, const ids_t *ids, int64_t lo, int64_t hi, int64_t floats) noexcept nogil:
    cdef Ahead a
    cdef int64_t p
    _ahead_begin(&a, True, lo, hi)
    for p in range(lo, hi):
        pe_readahead_add(&a.requests, column.data + ids[p] * column.stride, 4 * floats)
    _ahead_end(&a, True, column.pages)


cdef int _readahead_all(Column column, cnp.ndarray ids, int64_t floats) except -1:
    """Request readahead of all rows that ids name; a signal ends the loop early."""
    cdef int64_t n = cnp.PyArray_SIZE(ids), lo, hi
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    cdef bint wide = _is_int64(ids)
    for lo in range(0, n, COLD_SPAN_ROWS):
        hi = min(lo + COLD_SPAN_ROWS, n)
        with nogil:
            if wide:
                _readahead_span(column, <const int64_t *>ids_n, lo, hi, floats)
            else:
                _readahead_span(column, <const int32_t *>ids_n, lo, hi, floats)
        PyErr_CheckSignals()
    return 0


def readahead(Column column not None, cnp.ndarray ids not None):
    """Request readahead of whole rows, without waiting; do nothing and return False if a sample is all in memory."""
    cdef bint wide = _is_int64(ids)
    cdef int64_t n = cnp.PyArray_SIZE(ids), sampled = min(n, SAMPLE), found
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    _check_ids(ids, wide, column.rows, 1)
    if column.pages is None:
        return False
    if wide:
        found = _count_resident(column, <const int64_t *>ids_n, n, sampled)
    else:
        found = _count_resident(column, <const int32_t *>ids_n, n, sampled)
    if found == sampled:
        return False
    column.pages.batches += 1
    column.pages.rows += n
    column.pages.sampled += sampled
    column.pages.found += found
    _readahead_all(column, ids, column.stride)
    return True


cdef void _map_span(Column column, const ids_t *ids, int64_t lo, int64_t hi, bint to_write) noexcept nogil:
    cdef int64_t p
    for p in range(lo, hi):
        if not pe_map_pages(column.data + ids[p] * column.stride, 4 * column.stride, to_write):
            return


def map_pages(Column column not None, cnp.ndarray ids not None, bint to_write):
    """Wait until the pages of whole rows are in memory, and map them for writing or for reading. For helper threads.

    The system counts pages that are mapped for writing as changed.
    """
    cdef bint wide = _is_int64(ids)
    cdef int64_t n = cnp.PyArray_SIZE(ids), lo, hi
    cdef const void *ids_n = cnp.PyArray_DATA(ids)
    _check_ids(ids, wide, column.rows, 1)
    if column.pages is None:
        return
    for lo in range(0, n, COLD_SPAN_ROWS):
        hi = min(lo + COLD_SPAN_ROWS, n)
        with nogil:
            if wide:
                _map_span(column, <const int64_t *>ids_n, lo, hi, to_write)
            else:
                _map_span(column, <const int32_t *>ids_n, lo, hi, to_write)
        PyErr_CheckSignals()


def cached_pages(int fd):
    """The pages of a file that are in memory, and how many of them are dirty; None if the system does not report it."""
    cdef int64_t dirty = 0, cached
    with nogil:
        cached = pe_cached_pages(fd, &dirty)
    return None if cached < 0 else (cached, dirty)


def start_write_back(int fd, int64_t offset, int64_t size):
    """Start to write the dirty pages of a part of a file, without waiting for the end. False if the system refuses."""
    cdef int failed
    with nogil:
        failed = pe_start_write_back(fd, offset, size)
    return failed == 0


def page_out(cnp.ndarray rows not None):
    """Evict the clean pages of a mapped C-contiguous array from memory. False if the system refuses."""
    cdef int failed
    cdef void *data = cnp.PyArray_DATA(rows)
    cdef int64_t size = cnp.PyArray_NBYTES(rows)
    if not cnp.PyArray_ISCARRAY_RO(rows):
        raise ValueError("the rows must be C-contiguous")
    with nogil:
        failed = pe_page_out(data, size)
    return failed == 0
