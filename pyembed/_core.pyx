"""The boundary between Python and the row kernels.

The core has columns (a pointer and a row stride), the one range check of ids (`_check_ids`), and the loops over rows, which
are parallel and run without the GIL. It has no defaults, reads no environment and no files, and converts no arguments. A
function takes arrays that are already right, and raises `TypeError` or `ValueError` for a mistake inside the library. The
errors that reach a user are `IdError` and that of an output that overlaps with the table; both come before anything is
written.

The parts:
- this file: the table of kernels, columns, arrays
- _core_parts/ids.pxi: the one range check of ids
- _core_parts/pages.pxi: readahead of rows of a file that are not in memory
- _core_parts/journal.pxi: checksums, and the bits of dirty rows
- _core_parts/rows.pxi: gather, scatter_add, all_finite, fill
- _core_parts/scratch.pxi: memory that is kept between calls
- _core_parts/batches.pxi: Batch: ids, gradients, groups
- _core_parts/groups.pxi: group (ids to unique rows)
- _core_parts/updates.pxi: the loops over unique rows: sum, add, renorm
- _core_parts/rules.pxi: optimizer steps: Rule, Step, update
- _core_parts/bags.pxi: the loops over bags: reduce, dots; and the gradient of a maximum

Legend: n ids, u unique rows, d floats of a row, t threads. A loop over rows is here (except sums of rows, decision 0004);
a loop over columns is in _kernels/.
"""

cimport cython
cimport numpy as cnp
from cpython.exc cimport PyErr_CheckSignals
from cython.parallel cimport prange, threadid
from libc.float cimport FLT_MAX
from libc.math cimport INFINITY, exp, pow, sqrt
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, malloc

from pyembed.errors import ArgumentError, IdError

cnp.import_array()

cdef extern from "_kernels/kernels.h" nogil:
    enum:
        PE_BLOCK

    ctypedef struct pe_hyper:
        float lr
        float eps
        float momentum
        float one_minus_b1
        float one_minus_b2
        float correction
        float decay
        float beta
        float l1
        float l2

    ctypedef void (*pe_update_row)(float *const *col, const float *grad_d, int64_t d, const pe_hyper *h) noexcept nogil

    ctypedef struct pe_rule:
        const char *name
        pe_update_row row

    ctypedef struct pe_sum:
        const float *base
        int64_t stride
        const void *ids_n
        int wide
        const float *coef_n
        int64_t skip
        int64_t n
        int64_t beyond
        int64_t ahead

    ctypedef struct pe_missed:
        double kept
        double left
        double moved

    pe_missed pe_miss(double keep, double momentum, int64_t n) noexcept

    ctypedef struct pe_kernels:
        const char *name
        void (*copy_row)(float *dst_d, const float *src_d, int64_t d) noexcept nogil
        void (*stream_row)(float *dst_d, const float *src_d, int64_t d) noexcept nogil
        int64_t (*add_rows)(float *acc_d, const pe_sum *s, int64_t d) noexcept nogil
        void (*axpy_row)(float *acc_d, const float *src_d, float alpha, int64_t d) noexcept nogil
        void (*scale_row)(float *dst_d, float alpha, int64_t d) noexcept nogil
        void (*divide_row)(float *dst_d, float by, int64_t d) noexcept nogil
        void (*clamp_row)(float *dst_d, float most, int64_t d) noexcept nogil
        void (*max_row)(float *best_d, const float *src_d, int64_t d) noexcept nogil
        void (*max_which_row)(float *best_d, int64_t *which_d, const float *src_d, int64_t id, int64_t d) noexcept nogil
        float (*dot_row)(const float *a_d, const float *b_d, int64_t d) noexcept nogil
        double (*squares_row)(const float *src_d, int64_t d) noexcept nogil
        double (*norm_row)(const float *src_d, double p, int64_t d) noexcept nogil
        float (*largest_span)(const float *src_d, int64_t d) noexcept nogil
        const pe_rule *rules
        void (*uniform_blocks)(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float low, float width) noexcept nogil
        void (*normal_blocks)(float *dst, uint64_t seed, uint64_t block, int64_t blocks, float mean, float std) noexcept nogil

    const pe_kernels *pe_kernels_named(const char *name) noexcept
    const pe_kernels *pe_kernels_best() noexcept
    void pe_stream_fence() noexcept
    void pe_prefetch_read(const float *src_d, int64_t d) noexcept
    void pe_prefetch_write(const float *src_d, int64_t d) noexcept
    void pe_prefetch_line(const void *p) noexcept

cdef extern from "_kernels/stripes.h" nogil:
    int64_t pe_stripe_of(int64_t row) noexcept
    void pe_stripe_lock(int64_t stripe) noexcept
    void pe_stripe_unlock(int64_t stripe) noexcept

cdef extern from "_kernels/spread.h" nogil:
    int pe_this_cpu() noexcept
    void pe_leave_cpu(int cpu) noexcept

cdef extern from "_kernels/pages.h" nogil:
    ctypedef struct pe_readahead:
        pass

    void pe_readahead_begin(pe_readahead *a) noexcept
    void pe_readahead_add(pe_readahead *a, const void *at, int64_t bytes) noexcept
    void pe_readahead_flush(pe_readahead *a) noexcept
    void pe_readahead_end(pe_readahead *a, int64_t *total) noexcept
    int pe_map_pages(const void *at, int64_t bytes, int to_write) noexcept
    int pe_page_resident(const void *at) noexcept
    int64_t pe_major_faults() noexcept
    int64_t pe_cached_pages(int fd, int64_t *dirty) noexcept
    int pe_start_write_back(int fd, int64_t at, int64_t bytes) noexcept
    int pe_page_out(void *at, int64_t bytes) noexcept

cdef extern from "_kernels/crc32c.h" nogil:
    void pe_crc32c_begin() noexcept
    uint32_t pe_crc32c(uint32_t crc, const unsigned char *data, size_t size, int fast) noexcept

cdef extern from *:
    """
    #ifdef _OPENMP
    #include <omp.h>
    static const char *pe_openmp(void) { return "OpenMP"; }
    #if _OPENMP >= 201811
    static void pe_pause(void) { if (!omp_in_parallel()) omp_pause_resource_all(omp_pause_hard); }
    #else
    static void pe_pause(void) {}
    #endif
    #else
    static const char *pe_openmp(void) { return "none (serial build)"; }
    static void pe_pause(void) {}
    #endif
    """
    const char *pe_openmp() noexcept
    void pe_pause() noexcept

ctypedef fused ids_t:
    int32_t
    int64_t

# Which kernels every call uses. Set at import and by use_simd(); read once per call.
cdef const pe_kernels *kernels = pe_kernels_best()


def use_simd(str level):
    """Use the kernels of `level`; return the level that was in use. `ValueError` if it is unknown or not supported."""
    global kernels
    cdef const pe_kernels *wanted = pe_kernels_named(level.encode())
    if wanted is NULL:
        raise ValueError(f"SIMD level {level!r} is not available; this processor has: {', '.join(simd_levels())}")
    before = simd_level()
    kernels = wanted
    return before


def simd_level():
    """The level in use."""
    return (<bytes>kernels.name).decode()


def simd_levels():
    """The levels that this processor has, lowest first."""
    return [name for name in ("baseline", "v3", "v4") if pe_kernels_named(name.encode()) is not NULL]


def openmp():
    """The parallel runtime of this build."""
    return (<bytes>pe_openmp()).decode()


def pause_threads():
    """End the threads of the pool: if they exist at a fork, the child hangs (libgomp)."""
    pe_pause()


pe_crc32c_begin()


@cython.final
cdef class Column:
    """float32 rows in memory that an array owns: a pointer and a row stride. Keeps that array alive.

    With `pages`, the rows are of a mapped file and may have to be read first.
    """

    cdef readonly cnp.ndarray array
    cdef readonly Pages pages
    cdef readonly bint writable
    cdef float *data
    cdef readonly int64_t rows
    cdef readonly int64_t dim
    cdef int64_t stride                         # floats from one row to the next

    def __init__(self, cnp.ndarray array not None, Pages pages=None):
        if cnp.PyArray_NDIM(array) != 2 or cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32:
            raise TypeError("a column is a 2-D float32 array")
        cdef cnp.npy_intp row_bytes = cnp.PyArray_STRIDE(array, 0), item_bytes = cnp.PyArray_STRIDE(array, 1)
        self.rows, self.dim = cnp.PyArray_DIM(array, 0), cnp.PyArray_DIM(array, 1)
        if self.rows <= 1 or self.dim == 0:     # numpy gives such arrays any stride
            row_bytes = 4 * self.dim
        if self.rows == 0:
            item_bytes = 4
        if not cnp.PyArray_ISBEHAVED_RO(array) or (self.dim > 1 and item_bytes != 4) or row_bytes % 4 or row_bytes < 0:
            raise ValueError("a column's floats must be aligned, native and contiguous within each row")
        self.array = array
        self.pages = pages
        self.writable = cnp.PyArray_ISWRITEABLE(array)
        self.data = <float *>cnp.PyArray_DATA(array)
        self.stride = row_bytes // 4


cdef inline const float *_floats(cnp.ndarray array, int64_t n) except? NULL:
    """The n floats of a C-contiguous float32 array."""
    if cnp.PyArray_TYPE(array) != cnp.NPY_FLOAT32 or not cnp.PyArray_ISCARRAY_RO(array) or cnp.PyArray_SIZE(array) != n:
        raise TypeError(f"expected a C-contiguous float32 array of {n} elements")
    return <const float *>cnp.PyArray_DATA(array)


cdef inline float *_floats_out(cnp.ndarray array, int64_t n, Column apart_from) except? NULL:
    """As _floats, to be written; refuses memory that overlaps with the column that is read."""
    cdef float *data = <float *>_floats(array, n)
    if not cnp.PyArray_ISWRITEABLE(array):
        raise ValueError("the output is read-only")
    if (apart_from is not None and n and data < apart_from.data + (apart_from.rows - 1) * apart_from.stride + apart_from.dim
            and apart_from.data < data + n):
        raise ArgumentError("out overlaps with the table; give it memory of its own")
    return data


cdef inline int64_t _split(int64_t n, int64_t part, int64_t parts) noexcept nogil:
    """Where part `part` of `parts` begins in 0..n."""
    return n // parts * part + min(part, n % parts)


cdef bint _overlap(Column column, cnp.ndarray values) noexcept:
    """Whether the memory of an array overlaps with the range from the first to the last float of a column."""
    cdef const char *first = <const char *>column.data
    cdef const char *low = <const char *>cnp.PyArray_DATA(values)
    return (cnp.PyArray_SIZE(values) != 0 and column.rows != 0 and first < low + cnp.PyArray_NBYTES(values)
            and low < first + 4 * ((column.rows - 1) * column.stride + column.dim))


def overlaps(tuple columns not None, cnp.ndarray values not None):
    """Whether the memory of a C-contiguous array overlaps with the range of a column, from its first to its last float."""
    if not cnp.PyArray_ISCARRAY_RO(values):
        raise ValueError("the values must be C-contiguous")
    return any(_overlap(column, values) for column in columns)


include "_core_parts/ids.pxi"
include "_core_parts/pages.pxi"
include "_core_parts/journal.pxi"
include "_core_parts/scratch.pxi"
include "_core_parts/batches.pxi"
include "_core_parts/rows.pxi"
include "_core_parts/groups.pxi"
include "_core_parts/updates.pxi"
include "_core_parts/rules.pxi"
include "_core_parts/bags.pxi"
