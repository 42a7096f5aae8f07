# Checksums, and bit maps of dirty rows, for the journal of a table. Included by _core.pyx.

def crc32c(const unsigned char[::1] data, bint fast=True):
    """CRC-32C (Castagnoli) of a buffer. fast=False uses the tables of a processor that has no instruction for it."""
    cdef uint32_t crc
    if data.shape[0] == 0:
        return 0
    with nogil:
        crc = pe_crc32c(0, &data[0], data.shape[0], fast)
    return crc


def crc32c_pieces(const unsigned char[::1] data, int64_t size, int threads):
    """The CRC-32C of each piece of `size` bytes, as a list of int; the last piece may be shorter."""
    cdef int64_t total = data.shape[0], count = (total + size - 1) // size, k
    cdef cnp.npy_intp shape = count
    cdef cnp.ndarray found = cnp.PyArray_EMPTY(1, &shape, cnp.NPY_UINT32, 0)
    cdef uint32_t *sums = <uint32_t *>cnp.PyArray_DATA(found)
    with nogil:
        for k in prange(count, num_threads=max(1, min(threads, count)), schedule='static', chunksize=1):
            sums[k] = pe_crc32c(0, &data[0] + k * size, min(size, total - k * size), 1)
    return found.tolist()


def unmarked_rows(const unsigned char[::1] bits, const int64_t[::1] rows):
    """The elements of `rows` whose bit is 0, in their order. Bit 0 of byte 0 is the bit of row 0."""
    cdef cnp.npy_intp n = rows.shape[0], count = 0, k
    cdef cnp.ndarray found = cnp.PyArray_EMPTY(1, &n, cnp.NPY_INT64, 0)
    cdef int64_t *out = <int64_t *>cnp.PyArray_DATA(found)
    if n and not 0 <= rows[0] <= rows[n - 1] < 8 * bits.shape[0]:
        raise ValueError("rows outside the bits")
    with nogil:
        for k in range(n):
            out[count] = rows[k]
            count += not bits[rows[k] >> 3] >> (rows[k] & 7) & 1
    return found[:count]


def mark_rows(unsigned char[::1] bits, const int64_t[::1] rows):
    """Set the bit of each row in `rows`, which are ascending."""
    cdef int64_t n = rows.shape[0], k
    if n and not 0 <= rows[0] <= rows[n - 1] < 8 * bits.shape[0]:
        raise ValueError("rows outside the bits")
    with nogil:
        for k in range(n):
            bits[rows[k] >> 3] |= <unsigned char>(1 << (rows[k] & 7))
