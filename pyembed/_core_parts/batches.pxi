# Batch: ids and their gradients, from the reader of the gradient to the kernels. Included by _core.pyx.


@cython.final
cdef class Batch:
    """The ids of a batch and their gradients, and after grouping the unique rows with their positions.

    One object holds a batch from the moment its arguments are read until its rows are updated. `group` fills in three
    arrays:
      unique_rows (u)    ascending
      starts (u + 1)     row k has the positions order[starts[k]] .. order[starts[k + 1] - 1]
      order (n)          positions in the batch, ascending within a row
    With `unique`, the ids are ascending and unique from the start, and gradient k belongs to ids[k]: starts and order are None.
    """

    cdef readonly cnp.ndarray ids                 # int64 or int32, of any shape
    cdef readonly cnp.ndarray grad                # float32: a gradient for each id, or for each bag; None for ids alone
    cdef readonly cnp.ndarray bag_of              # int64: the gradient of each position; None: position p has gradient p
    cdef readonly cnp.ndarray coefficients        # float32: the factor of the gradient at each position; None for 1
    cdef readonly int64_t num_rows                # rows of the table
    cdef readonly int64_t dim
    cdef readonly int64_t skip_row                # the padding row, which takes no gradient, or -1
    cdef readonly bint scale_by_count             # divide the sum of a row by how often the row occurs
    cdef readonly bint unique
    cdef readonly bint checked                    # every id is in 0 .. num_rows - 1
    cdef readonly bint grouped
    cdef _Block block                             # the memory of the three arrays
    cdef bint wide                                # the ids are int64
    cdef int row_bits, position_bits              # the two parts of a sort key
    cdef int64_t n, u                             # ids, unique rows
    cdef const void *ids_n
    cdef const float *grad_nd
    cdef const int64_t *bag_n
    cdef const float *coef_n
    cdef int64_t *rows_u
    cdef int64_t *starts_u1                       # NULL with `unique`, and order_n too
    cdef int64_t *order_n

    def __init__(self, cnp.ndarray ids not None, cnp.ndarray grad, int64_t num_rows, int64_t dim, int64_t skip_row=-1,
                 bint scale_by_count=False, cnp.ndarray bag_of=None, cnp.ndarray coefficients=None, bint unique=False):
        """Read the arrays of a batch. The caller guarantees that `bag_of` stays within the gradients."""
        self._set(ids, grad, num_rows, dim, skip_row, scale_by_count)
        self.unique = unique
        if unique and not (self.wide and bag_of is None):
            raise TypeError("unique ids are int64, each with its gradient")
        if bag_of is not None:
            if not _is_int64(bag_of) or cnp.PyArray_SIZE(bag_of) != self.n:
                raise TypeError("bag_of is int64, one for each position")
            self.bag_of, self.bag_n = bag_of, <const int64_t *>cnp.PyArray_DATA(bag_of)
        if coefficients is not None:
            self.coefficients, self.coef_n = coefficients, _floats(coefficients, self.n)
        if grad is not None:
            self.grad_nd = _floats(grad, cnp.PyArray_SIZE(grad) if bag_of is not None else self.n * dim)

    cdef int _set(self, cnp.ndarray ids, cnp.ndarray grad, int64_t num_rows, int64_t dim, int64_t skip_row,
                  bint scale_by_count) except -1:
        self.wide, self.n, self.ids_n = _is_int64(ids), cnp.PyArray_SIZE(ids), cnp.PyArray_DATA(ids)
        self.ids, self.grad, self.num_rows, self.dim = ids, grad, num_rows, dim
        self.skip_row, self.scale_by_count = skip_row, scale_by_count
        return 0

    @property
    def unique_rows(self):
        """int64 (u): unique ids, ascending."""
        _require_grouped(self)
        return self.ids if self.unique else _int64s(self.block, self.rows_u, self.u)

    @property
    def starts(self):
        """int64 (u + 1), or None with `unique`."""
        _require_grouped(self)
        return None if self.unique else _int64s(self.block, self.starts_u1, self.u + 1)

    @property
    def order(self):
        """int64 (n), or None with `unique`."""
        _require_grouped(self)
        return None if self.unique else _int64s(self.block, self.order_n, self.n)


cdef inline int _require_grouped(Batch b) except -1:
    if not b.grouped:
        raise ValueError("group the batch first")
    return 0


cdef inline int _require_gradients(Batch b) except -1:
    _require_grouped(b)
    if b.grad is None:
        raise ValueError("the batch has no gradients")
    return 0


cdef inline int _require_of_table(Batch b, Column column) except -1:
    """Refuse a batch whose ids were checked against another shape: a rollback may have shrunk the table since."""
    if b.num_rows > column.rows or b.grad is not None and b.dim != column.dim:
        raise ValueError(f"the batch is of a table of {b.num_rows} rows of {b.dim}, not of {column.rows} of {column.dim}")
    return 0


def read_batch(ids, grad, int64_t num_rows, int64_t dim, int64_t skip_row, bint scale_by_count):
    """The batch of arrays that need no conversion, made in one call; None if an array needs one, or is wrong.

    The arrays are C-contiguous int64 or int32 ids, and a float32 gradient of shape ids.shape + (dim,).
    """
    if not (cnp.PyArray_CheckExact(ids) and cnp.PyArray_CheckExact(grad)):
        return None
    cdef cnp.ndarray id_array = ids, grad_array = grad
    cdef int axis, ndim = cnp.PyArray_NDIM(id_array)
    cdef cnp.npy_intp size = cnp.PyArray_ITEMSIZE(id_array)
    if not (cnp.PyTypeNum_ISSIGNED(cnp.PyArray_TYPE(id_array)) and (size == 8 or size == 4)
            and cnp.PyArray_ISCARRAY_RO(id_array)):
        return None
    if not (cnp.PyArray_TYPE(grad_array) == cnp.NPY_FLOAT32 and cnp.PyArray_ISCARRAY_RO(grad_array)
            and cnp.PyArray_NDIM(grad_array) == ndim + 1 and cnp.PyArray_DIM(grad_array, ndim) == dim):
        return None
    for axis in range(ndim):
        if cnp.PyArray_DIM(grad_array, axis) != cnp.PyArray_DIM(id_array, axis):
            return None
    cdef Batch b = Batch.__new__(Batch)
    b._set(id_array, grad_array, num_rows, dim, skip_row, scale_by_count)
    b.grad_nd = <const float *>cnp.PyArray_DATA(grad_array)
    return b


cdef int _check(Batch b, int threads) except -1:
    """Check the range of the ids of a batch, if that was not done before."""
    if not b.checked:
        _check_ids(b.ids, b.wide, b.num_rows, threads)
        b.checked = True
    return 0


def check(Batch batch not None, int threads):
    """Check the range of ids and do nothing else: raise `IdError` for the first id outside 0 .. num_rows - 1."""
    _check(batch, threads)
