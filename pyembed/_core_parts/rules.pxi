# Optimizer steps over the unique rows of a batch: the rules and the step options. _core_parts/batches.pxi defines a batch. A step
# without options takes one branch for them, and uses none of their memory.

cdef enum:
    MAX_COLUMNS = 6                               # the weight, three of state, the count, the last step
    EARLY_FLOATS = 1 << 14                        # a step of no more than 64 KiB is prefetched when it is prepared

# name → (the kernel, see PE_RULE_TABLE, and the state columns in order); the weight comes first. A column holds one float for
# each element of the weight, or one for each row.
RULES = {
    "sgd": ("sgd", {}),
    "momentum": ("momentum", {"momentum_buffer": "element"}),
    "nesterov": ("nesterov", {"momentum_buffer": "element"}),
    "adagrad": ("adagrad", {"sum": "element"}),
    "rowwise_adagrad": ("rowwise_adagrad", {"row_sum": "row"}),
    "rmsprop": ("rmsprop", {"square_avg": "element"}),
    "adam": ("adam", {"exp_avg": "element", "exp_avg_sq": "element"}),
    "adamw": ("adam", {"exp_avg": "element", "exp_avg_sq": "element"}),
    "rowwise_adam": ("rowwise_adam", {"exp_avg": "element", "row_exp_avg_sq": "row"}),
    "lamb": ("lamb", {"exp_avg": "element", "exp_avg_sq": "element"}),
    "lars": ("lars", {"momentum_buffer": "element"}),
    "ftrl": ("ftrl", {"ftrl_z": "element", "ftrl_n": "element"}),
}


cdef int _kernel_index(str name) except -1:
    """The place of a rule in pe_kernels.rules, which is the same at every SIMD level."""
    cdef bytes wanted = name.encode()
    cdef int index = 0
    while kernels.rules[index].name is not NULL:
        if kernels.rules[index].name == wanted:
            return index
        index += 1
    raise ValueError(f"no kernel of a rule is called {name!r}")


@cython.final
cdef class Rule:
    """An optimizer's rule with its step options, prepared once. A step sets its hyper-parameters and what follows from them.

    A step on a row does, in this order: skip_nonfinite, decay (keep) and what the row missed, clip_value, clip_scale, l2,
    the count of the row, the rule, max_norm.
    """

    cdef readonly str name
    cdef readonly bint skip_nonfinite             # leave a row alone whose gradient is not finite
    cdef readonly bint refuse_nonfinite           # refuse a batch that has such a row
    cdef readonly float largest                   # of a gradient after clipping; it, or its square, is still finite
    cdef readonly bint lazy                       # a column holds the last step of each row
    cdef readonly double frequency_power          # divide the learning rate of a row by its count to this power; 0: no column
    cdef readonly float clip_value                # clamp the elements of the gradient to -clip_value .. clip_value
    cdef readonly float l2                        # add this times the weight to the gradient
    cdef readonly double max_norm                 # afterwards, scale the row to a norm of at most this
    cdef readonly double norm_type
    cdef public int64_t step                      # the number of this step, from 1
    cdef public double keep                       # the factor of the weight in each step: decoupled decay
    cdef public double missed_momentum            # the momentum of the steps that a row missed, or 0
    cdef public double missed_lr                  # their learning rate
    cdef public float clip_scale                  # the factor of the gradient
    cdef public int64_t skipped                   # rows left alone so far
    cdef readonly pe_hyper hyper                  # see set_hyper
    cdef int index                                # in pe_kernels.rules
    cdef tuple per_element                        # for each column, whether it is as wide as the weight

    def __init__(self, str name not None, *, bint skip_nonfinite=False, bint refuse_nonfinite=False, bint lazy=False,
                 double frequency_power=0.0, float clip_value=INFINITY, float l2=0.0, double max_norm=INFINITY,
                 double norm_type=2.0):
        kernel, state = RULES[name]
        self.name, self.index = name, _kernel_index(kernel)
        # All but these square the gradient in float32.
        self.largest = FLT_MAX if name in ("sgd", "momentum", "nesterov", "lars") else <float>1.8446742e19
        self.refuse_nonfinite = refuse_nonfinite
        self.skip_nonfinite, self.lazy, self.frequency_power = skip_nonfinite, lazy, frequency_power
        self.clip_value, self.l2, self.max_norm, self.norm_type = clip_value, l2, max_norm, norm_type
        self.keep, self.clip_scale = 1.0, 1.0
        options = (frequency_power != 0) + lazy
        self.per_element = (True, *(kind == "element" for kind in state.values()), *(False,) * options)

    def __reduce__(self):
        options = ("skip_nonfinite", "refuse_nonfinite", "lazy", "frequency_power", "clip_value", "l2", "max_norm", "norm_type")
        return _rule_of, (self.name, {name: getattr(self, name) for name in options}, self.skipped)

    def set_hyper(self, float lr, *, float eps=0, float momentum=0, float one_minus_b1=0, float one_minus_b2=0,
                  float correction=0, float decay=0, float beta=0, float l1=0, float l2=0):
        """Set the hyper-parameters of a step: see pe_hyper in _kernels/kernels.h."""
        self.hyper = pe_hyper(lr, eps, momentum, one_minus_b1, one_minus_b2, correction, decay, beta, l1, l2)

    cdef bint _is_plain(self) noexcept:
        """Whether a step does nothing but its rule."""
        return not (self.skip_nonfinite or self.lazy or self.frequency_power != 0 or self.keep != 1
                    or self.clip_value < INFINITY or self.clip_scale != 1 or self.l2 != 0 or self.max_norm < INFINITY)

    cdef bint _takes(self, double largest) noexcept nogil:
        """Whether the rule can take a row whose summed gradient has elements of up to this magnitude.

        A clip_scale of NaN comes from another table, whose optimizer lets NaN through.
        """
        return largest <= FLT_MAX and not min(largest, <double>self.clip_value) * self.clip_scale > self.largest


def _rule_of(name, options, skipped):
    rule = Rule(name, **options)
    rule.skipped = skipped
    return rule


@cython.final
cdef class Step:
    """One rule, one grouped batch, and the columns of one table: one table's part of a step.

    `columns`: the weight, the state columns of the rule, with `frequency_power` the counts of rows, and with `lazy` their
    last steps. Everything for which `update` can be refused is checked here, except columns that cannot be written.

    When the rows have changed, ``counts[rule.name]`` becomes ``{"steps": rule.step}`` and `pending` is emptied, in the same
    call.
    """

    cdef Rule rule
    cdef Batch batch
    cdef tuple columns
    cdef dict counts, counted
    cdef list pending
    cdef Pages pages
    cdef bint plain                               # no options
    cdef bint cold
    cdef int num_columns
    cdef int count, last                          # the columns of a row's count and of its last step, or 0
    cdef float *data[MAX_COLUMNS]
    cdef int64_t stride[MAX_COLUMNS]
    cdef int64_t width[MAX_COLUMNS]
    cdef int64_t row_floats                       # floats of a row from the start of its first column to the end of its last
    cdef int64_t first                            # in a step of many tables, the gradient floats of the steps before this one

    def __init__(self, Rule rule not None, Batch batch not None, tuple columns not None, dict counts=None, list pending=None):
        cdef Column column, weight = columns[0]
        cdef int64_t width, u
        cdef int c
        self.rule, self.batch, self.columns, self.pages = rule, batch, columns, weight.pages
        self.counts, self.pending = counts, pending
        self.counted = {"steps": rule.step} if counts is not None else None
        _require_grouped(batch)
        if batch.u and (batch.rows_u[batch.u - 1] >= weight.rows or batch.grad is not None and batch.dim != weight.dim):
            raise ValueError(f"the batch is of a table of {batch.num_rows} rows of {batch.dim}, not of {weight.rows} of "
                             f"{weight.dim}")
        self.num_columns = len(rule.per_element)
        if len(columns) != self.num_columns:
            raise ValueError(f"{rule.name} takes {self.num_columns} columns, not {len(columns)}")
        for c in range(self.num_columns):
            column = columns[c]
            width = weight.dim if rule.per_element[c] else 1
            if column.dim != width or column.rows != weight.rows:
                raise ValueError(
                    f"column {c} of {rule.name} has shape ({column.rows}, {column.dim}), not ({weight.rows}, {width})")
            if batch.grad is not None and _overlap(column, batch.grad):
                raise ArgumentError("grad shares memory with the table; use grad.copy()")
            self.data[c], self.stride[c], self.width[c] = column.data, column.stride, column.dim
            if 0 <= column.data - self.data[0] < column.stride:
                self.row_floats = column.data - self.data[0] + column.dim
        self.last = self.num_columns - 1 if rule.lazy else 0
        self.count = self.num_columns - 1 - rule.lazy if rule.frequency_power != 0 else 0
        self.plain = rule._is_plain()
        if batch.grad is not None and batch.u * self.row_floats <= EARLY_FLOATS:
            for u in range(batch.u):              # they come into the cache during the checks
                _prefetch_row(self, u)

    cdef int _require_ready(self) except -1:
        cdef Column column
        for column in self.columns:
            _require_writable(column)
        return 0

    cdef int _finish(self, int64_t skipped) except -1:
        """Record that the rows have changed."""
        self.rule.skipped += skipped
        if self.counts is not None:
            self.counts[self.rule.name] = self.counted
        if self.pending is not None:
            self.pending.clear()
        return 0


cdef inline double _rate(Step s, float *const *col) noexcept nogil:
    """The factor of the learning rate of a row: 1 for a row that was not counted yet."""
    cdef double count = col[s.count][0] if s.count else 0.0
    return pow(count, -s.rule.frequency_power) if count > 1 else 1.0


cdef void _catch_up(const pe_kernels *k, Step s, Rule rule, float *const *col, int64_t d, bint stepping) noexcept nogil:
    """Apply to a row the decay and the momentum of the steps that it missed.

    A column holds the step that updated the row last, or 0 for a row that was never updated, which missed nothing. With
    `stepping`, the decay of this step is included. The count of the row has not changed since the steps that it missed.
    """
    cdef pe_missed m
    cdef float *last = col[s.last]
    cdef double now = <double>rule.step, keep = rule.keep if stepping else 1.0
    if not rule.lazy:
        if keep != 1:
            k.scale_row(col[0], <float>keep, d)
        return
    m = pe_miss(rule.keep, rule.missed_momentum, <int64_t>(now - 1 - last[0]) if 0 < last[0] < now - 1 else 0)
    if stepping or last[0] > 0:
        last[0] = <float>(now if stepping else now - 1)
    m.kept *= keep
    m.moved *= keep
    if m.kept != 1:
        k.scale_row(col[0], <float>m.kept, d)
    if rule.missed_momentum != 0 and m.moved != 0:
        k.axpy_row(col[0], col[1], <float>(-rule.missed_lr * _rate(s, col) * m.moved), d)
        k.scale_row(col[1], <float>m.left, d)


cdef bint _update_row(const pe_kernels *k, Step s, Rule rule, float *const *col, const float *grad_d, float *sum_d,
                      int64_t d) noexcept nogil:
    """Take a step with options on one row; grad_d may be sum_d. False if the row was skipped."""
    cdef const pe_hyper *h = &rule.hyper
    cdef pe_hyper of_row
    cdef double norm
    if rule.skip_nonfinite and not rule._takes(k.largest_span(grad_d, d)):
        return False
    _catch_up(k, s, rule, col, d, True)
    if rule.clip_value < INFINITY or rule.clip_scale != 1 or rule.l2 != 0:
        if grad_d != sum_d:
            k.copy_row(sum_d, grad_d, d)
            grad_d = sum_d
        if rule.clip_value < INFINITY:
            k.clamp_row(sum_d, rule.clip_value, d)
        if rule.clip_scale != 1:
            k.scale_row(sum_d, rule.clip_scale, d)
        if rule.l2 != 0:
            k.axpy_row(sum_d, col[0], rule.l2, d)
    if s.count:
        col[s.count][0] += 1                      # stays at 2^24
        of_row = h[0]
        of_row.lr = <float>(of_row.lr * _rate(s, col))
        h = &of_row
    k.rules[rule.index].row(col, grad_d, d, h)
    if rule.max_norm < INFINITY:
        norm = k.norm_row(col[0], rule.norm_type, d)
        if norm > rule.max_norm:
            k.scale_row(col[0], <float>(rule.max_norm / (norm + 1e-7)), d)
    return True


cdef inline void _prefetch_row(Step s, int64_t u) noexcept nogil:
    cdef int c
    for c in range(s.num_columns):
        pe_prefetch_write(s.data[c] + s.batch.rows_u[u] * s.stride[c], s.width[c])
    _prefetch_gradient(s.batch, u)


cdef int64_t _update_run(const pe_kernels *k, Step s, Batch b, int64_t lo, int64_t hi, float *sum_d) noexcept nogil:
    """Update the unique rows lo .. hi - 1; return the number of rows that were skipped for a gradient that is not finite."""
    cdef Ahead pages
    cdef int64_t u, row, skipped = 0
    cdef int c
    cdef float *col[MAX_COLUMNS]
    cdef pe_update_row update_row = k.rules[s.rule.index].row
    _ahead_begin(&pages, s.cold, lo, hi)
    for u in range(lo, min(lo + UPDATE_AHEAD, hi)):
        _prefetch_row(s, u)
    for u in range(lo, hi):
        if u >= pages.next:
            _readahead(&pages, u, s.data[0], s.stride[0], s.row_floats, b.rows_u)
        if u + UPDATE_AHEAD < hi:
            _prefetch_row(s, u + UPDATE_AHEAD)
        row = b.rows_u[u]
        if row == b.skip_row:
            continue
        for c in range(s.num_columns):
            col[c] = s.data[c] + row * s.stride[c]
        if s.plain:
            update_row(col, _row_gradient(k, b, u, sum_d), b.dim, &s.rule.hyper)
        else:
            skipped += not _update_row(k, s, s.rule, col, _row_gradient(k, b, u, sum_d), sum_d, b.dim)
    _ahead_end(&pages, s.cold, s.pages)
    return skipped


cdef void _update_share(const pe_kernels *k, void **steps, int64_t n, int64_t lo, int64_t hi, float *sum_d,
                        int64_t *skipped_n) noexcept nogil:
    """Update the rows whose gradients begin at the floats lo .. hi - 1 of all steps, see `_lay_out`."""
    cdef int64_t j, d, first, size
    for j in range(n):
        d, first, size = (<Step>steps[j]).batch.dim, (<Step>steps[j]).first, (<Step>steps[j]).batch.n
        skipped_n[j] += _update_run(
            k, <Step>steps[j], (<Step>steps[j]).batch, _run_at((<Step>steps[j]).batch, min(max((lo - first) // d, 0), size)),
            _run_at((<Step>steps[j]).batch, min(max((hi - first) // d, 0), size)), sum_d)


cdef int64_t _lay_out(void **steps, int64_t n) noexcept:
    """Number the gradient floats of several steps, one step after the other, for even shares; return how many there are."""
    cdef int64_t j, floats = 0
    for j in range(n):
        (<Step>steps[j]).first = floats
        floats += (<Step>steps[j]).batch.n * (<Step>steps[j]).batch.dim
    return floats


cdef void _update_together(void **steps, int64_t n, int threads, float *sums, int64_t widest, int64_t *skipped,
                           int64_t row) noexcept:
    """Take several steps in one parallel region. Thread t counts the rows that it skips at skipped[t * row]."""
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    cdef int64_t floats = _lay_out(steps, n)
    if threads == 1:
        with nogil:
            _update_share(k, steps, n, 0, floats, sums, skipped)
        return
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
            if t:
                pe_leave_cpu(caller)
            _update_share(k, steps, n, _split(floats, t, threads), _split(floats, t + 1, threads), sums + t * (widest + 16),
                          skipped + t * row)


cdef bint _step_is_finite(Step s, double largest, double largest_coefficient, int threads) except -1:
    """Whether the rule can take the sum of each row, from the largest magnitudes in the batch."""
    cdef double count = 1 if s.batch.unique else s.batch.n - s.batch.u + 1    # no row has more gradients
    cdef double rounding = exp(count * 2.0**-23)                              # (1 + 2^-24)^count, and one more for products
    cdef float sum_largest
    if s.rule._takes(largest * largest_coefficient * count * rounding):
        return True
    if not (largest < INFINITY and largest_coefficient < INFINITY):
        return False
    _largest_each([sum_groups(s.batch, threads)], &sum_largest, threads)
    return s.rule._takes(sum_largest)


def first_refused(list steps not None, int threads):
    """The index of the first step whose rule refuses its gradients: one is not finite, or a sum or a square; -1 for none."""
    cdef int64_t j, n = len(steps)
    cdef Step s
    arrays = []
    for s in steps:
        arrays += (s.batch.grad, s.batch.coefficients) if s.rule.refuse_nonfinite else (None, None)
    cdef float *largest = <float *>malloc(2 * n * sizeof(float) + 1)
    if largest is NULL:
        raise MemoryError
    try:
        _largest_each(arrays, largest, threads)
        for j in range(n):
            s = steps[j]
            if s.rule.refuse_nonfinite and not _step_is_finite(s, largest[2 * j], largest[2 * j + 1], threads):
                return j
    finally:
        free(largest)
    return -1


def update(list steps not None, int threads):
    """Take steps: sum, scale and update the rows of each batch in one pass; then record all of them.

    All steps share the threads, and one thread owns each row. The step of a table whose rows are not in memory runs on its own,
    with readahead. So does the second step of a table, because the steps of a table keep their order.
    """
    cdef int64_t n = len(steps), j, shared = 0, alone = 0, widest = 1, row = n + 16
    cdef int t
    cdef Step s
    cdef void **each = <void **>malloc(2 * (n + 1) * sizeof(void *))
    cdef int64_t *skipped = <int64_t *>calloc(threads * row, sizeof(int64_t))
    cdef float *sums = NULL
    cdef void **late = each + n
    seen = set()
    try:
        if each is NULL or skipped is NULL:
            raise MemoryError
        for s in steps:
            s._require_ready()
            _require_gradients(s.batch)
            widest = max(widest, s.batch.dim)
        sums = _scratch(widest, threads)
        for s in steps:
            s.cold = _batch_is_cold(<Column>s.columns[0], s.batch.rows_u, True, s.batch.u)
            if s.cold or n > 1 and s.columns[0] in seen:
                late[alone] = <void *>s
                alone += 1
            else:
                each[shared] = <void *>s
                shared += 1
            if n > 1:
                seen.add(s.columns[0])
        _update_together(each, shared, threads, sums, widest, skipped, row)
        for j in range(alone):
            _update_together(late + j, 1, threads, sums, widest, skipped + shared + j, row)
        for j in range(n):
            for t in range(1, threads):
                skipped[j] += skipped[t * row + j]
        for j in range(n):
            s = <Step>(each[j] if j < shared else late[j - shared])
            s._finish(skipped[j])
    finally:
        free(sums)
        free(skipped)
        free(each)


cdef void _catch_up_run(const pe_kernels *k, Step s, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t u
    cdef int c
    cdef float *col[MAX_COLUMNS]
    for u in range(lo, hi):
        for c in range(s.num_columns):
            col[c] = s.data[c] + s.batch.rows_u[u] * s.stride[c]
        _catch_up(k, s, s.rule, col, s.width[0], False)


def catch_up(Step step not None, int threads):
    """Apply to the rows of a batch the decay and momentum of the steps that they missed before rule.step."""
    cdef Step s = step
    cdef int t
    cdef const pe_kernels *k = kernels
    s._require_ready()
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _catch_up_run(k, s, _split(s.batch.u, t, threads), _split(s.batch.u, t + 1, threads))
