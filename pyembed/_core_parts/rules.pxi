# Optimizer steps over the unique rows of a batch: the rules, and what a step does beside its rule. Batches as in
# _core_parts/updates.pxi. A step without any of the extras takes no branch for them but one, and touches no memory of theirs.

cdef enum:
    MAX_COLUMNS = 6                               # the weight, three of state, the count, the last step


cdef struct Extras:
    # What a step does beside its rule, in the order in which it does it. `EXTRAS` is a step that does none of it.
    bint skip_nonfinite                           # leave a row alone whose gradient is not finite
    double step                                   # the number of this step if a column holds each row's last one, or 0
    double keep                                   # what each step multiplies the weight with: decoupled decay
    double momentum                               # of the steps that a row missed, or 0
    double missed_lr                              # and their learning rate
    double frequency_power                        # a row's learning rates are divided by its count to this power; 0: no column
    float clip_value                              # elements of the gradient into -clip_value .. clip_value
    float clip_scale                              # then times this
    float l2                                      # then plus this times the weight
    double max_norm                               # afterwards: the row's norm_type-norm is at most this
    double norm_type


cdef struct Rule:
    pe_update_row row
    pe_hyper hyper
    Extras extras
    bint plain                                    # no extras
    int columns
    float *data[MAX_COLUMNS]
    int64_t stride[MAX_COLUMNS]
    int64_t width[MAX_COLUMNS]
    int count, last                               # the columns of a row's count and of its last step, or 0
    int64_t row_floats                            # from the first column's first to the last one's last, in one row


cdef inline double _rate(const Rule *rule, float *const *col) noexcept nogil:
    """What the learning rate of a row is multiplied with. A row that was not counted yet has the full one."""
    cdef double count = col[rule.count][0] if rule.count else 0.0
    return pow(count, -rule.extras.frequency_power) if count > 1 else 1.0


cdef void _catch_up(const pe_kernels *k, const Rule *rule, float *const *col, int64_t d, bint stepping) noexcept nogil:
    """Bring a row to where it would be had it been decayed, and moved by its momentum, in the steps that it missed.

    A column holds the step that touched the row last, or 0 if none did: such a row missed nothing. If this step is about to
    touch it, its own decay is included. The row's count is what it was in the steps that were missed.
    """
    cdef pe_missed m
    cdef float *last = col[rule.last]
    cdef double now = rule.extras.step, keep = rule.extras.keep if stepping else 1.0
    if rule.extras.step == 0:
        if keep != 1:
            k.scale_row(col[0], <float>keep, d)
        return
    m = pe_miss(rule.extras.keep, rule.extras.momentum, <int64_t>(now - 1 - last[0]) if 0 < last[0] < now - 1 else 0)
    if stepping or last[0] > 0:
        last[0] = <float>(now if stepping else now - 1)
    m.kept *= keep
    m.moved *= keep
    if m.kept != 1:
        k.scale_row(col[0], <float>m.kept, d)
    if rule.extras.momentum != 0 and m.moved != 0:
        k.axpy_row(col[0], col[1], <float>(-rule.extras.missed_lr * _rate(rule, col) * m.moved), d)
        k.scale_row(col[1], <float>m.left, d)


cdef bint _update_row(const pe_kernels *k, const Rule *rule, float *const *col, const float *grad_d, float *sum_d,
                      int64_t d) noexcept nogil:
    """A step with extras on one row; grad_d may be sum_d. False if the row was left alone."""
    cdef const Extras *x = &rule.extras
    cdef const pe_hyper *h = &rule.hyper
    cdef pe_hyper own
    cdef double norm
    if x.skip_nonfinite and not k.finite_span(grad_d, d):
        return False
    _catch_up(k, rule, col, d, True)
    if x.clip_value < INFINITY or x.clip_scale != 1 or x.l2 != 0:
        if grad_d != sum_d:
            k.copy_row(sum_d, grad_d, d)
            grad_d = sum_d
        if x.clip_value < INFINITY:
            k.clamp_row(sum_d, x.clip_value, d)
        if x.clip_scale != 1:
            k.scale_row(sum_d, x.clip_scale, d)
        if x.l2 != 0:
            k.axpy_row(sum_d, col[0], x.l2, d)
    if rule.count:
        col[rule.count][0] += 1                   # stays at 2^24
        own = h[0]
        own.lr = <float>(own.lr * _rate(rule, col))
        h = &own
    rule.row(col, grad_d, d, h)
    if x.max_norm < INFINITY:
        norm = k.norm_row(col[0], x.norm_type, d)
        if norm > x.max_norm:
            k.scale_row(col[0], <float>(x.max_norm / (norm + 1e-7)), d)
    return True


cdef inline void _prefetch_row(const Batch *b, const Rule *rule, int64_t u) noexcept nogil:
    cdef int c
    for c in range(rule.columns):
        pe_prefetch_write(rule.data[c] + b.rows[u] * rule.stride[c], rule.width[c])
    _prefetch_gradient(b, u)


cdef int64_t _update_run(const pe_kernels *k, const Batch *b, const Rule *rule, int64_t lo, int64_t hi, float *sum_d,
                         bint cold, Pages known) noexcept nogil:
    """Update the unique rows lo .. hi - 1; how many were left alone for a gradient that is not finite."""
    cdef Ahead pages
    cdef int64_t u, row, skipped = 0
    cdef int c
    cdef float *col[MAX_COLUMNS]
    _ahead_begin(&pages, cold, lo, hi)
    for u in range(lo, min(lo + UPDATE_AHEAD, hi)):
        _prefetch_row(b, rule, u)
    for u in range(lo, hi):
        if u >= pages.next:
            _ask(&pages, u, rule.data[0], rule.stride[0], rule.row_floats, b.rows)
        if u + UPDATE_AHEAD < hi:
            _prefetch_row(b, rule, u + UPDATE_AHEAD)
        row = b.rows[u]
        if row == b.skip_row:
            continue
        for c in range(rule.columns):
            col[c] = rule.data[c] + row * rule.stride[c]
        if rule.plain:
            rule.row(col, _row_gradient(k, b, u, sum_d), b.d, &rule.hyper)
        else:
            skipped += not _update_row(k, rule, col, _row_gradient(k, b, u, sum_d), sum_d, b.d)
    _ahead_end(&pages, cold, known)
    return skipped


cdef int _rule(Rule *r, const pe_kernels *k, tuple columns, str name, dict hyper, dict extras) except -1:
    """A rule with the columns that it changes: the weight, its state, and each row's count and last step if extras ask."""
    cdef Column column, weight = columns[0]
    cdef int c
    index, state = RULES[name]
    r.row = k.update[<int>index]
    r.hyper = hyper
    r.plain = extras is None
    r.extras = EXTRAS if extras is None else extras
    widths = [weight.dim, *(weight.dim if kind == "element" else 1 for kind in state.values())]
    r.count = r.last = 0
    if r.extras.frequency_power != 0:
        r.count = len(widths)
        widths.append(1)
    if r.extras.step != 0:
        r.last = len(widths)
        widths.append(1)
    r.columns = len(widths)
    if len(columns) != r.columns:
        raise ValueError(f"{name} takes {r.columns} columns, not {len(columns)}")
    for c in range(r.columns):
        column = columns[c]
        _require_writable(column)
        if column.dim != <int64_t>widths[c] or column.rows != weight.rows:
            raise ValueError(f"column {c} of {name} has shape ({column.rows}, {column.dim}), not ({weight.rows}, {widths[c]})")
        r.data[c], r.stride[c], r.width[c] = column.data, column.stride, column.dim
        if 0 <= column.data - r.data[0] < column.stride:
            r.row_floats = column.data - r.data[0] + column.dim
    return 0


cdef struct Step:
    # One table's part of a step.
    Batch batch
    Rule rule
    int64_t first                                 # floats of gradients before it, in a step of many tables


cdef int _step(Step *s, const pe_kernels *k, tuple step) except -1:
    cdef tuple columns
    cdef str name
    cdef dict hyper, extras
    cdef Column weight
    columns, rows, starts, order, grad, name, hyper, skip_row, scale_by_count, bag_of, coef, extras = step
    weight = columns[0]
    _rule(&s.rule, k, columns, name, hyper, extras)
    _batch(&s.batch, rows, starts, order, grad, weight.dim, weight.rows, bag_of, coef)
    s.batch.skip_row, s.batch.scale_by_count, s.first = skip_row, scale_by_count, 0
    return 0


def update(tuple step not None, int threads):
    """One optimizer step over the unique rows: sum, scale and update in one pass. Returns how many rows were left alone.

    `step`: (columns, rows, starts, order, grad, name, hyper, skip_row, scale_by_count, bag_of, coef, extras), where `columns`
    are the weight, the rule's state columns, the rows' counts if extras["frequency_power"] is not 0, and their last steps if
    extras["step"] is not 0; `name`: see RULES; `hyper`: see pe_hyper and HYPER; `extras`: see Extras, None for none.
    """
    cdef Step s
    cdef int t, caller = pe_this_cpu()
    cdef int64_t skipped = 0
    cdef const pe_kernels *k = kernels
    _step(&s, k, step)
    cdef Column weight = (<tuple>step[0])[0]
    cdef float *sums = _scratch(s.batch.d, threads)
    cdef bint cold = _batch_is_cold(weight, s.batch.rows, True, s.batch.u)
    if threads == 1:
        with nogil:
            skipped = _update_run(k, &s.batch, &s.rule, 0, s.batch.u, sums, cold, weight.pages)
    else:
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1):
                if t:
                    pe_leave_cpu(caller)
                skipped += _update_run(k, &s.batch, &s.rule, _run_begin(&s.batch, t, threads),
                                       _run_begin(&s.batch, t + 1, threads), sums + t * (s.batch.d + 16), cold, weight.pages)
    free(sums)
    return skipped


cdef void _update_share(const pe_kernels *k, const Step *steps, int64_t n, int64_t lo, int64_t hi, float *sum_d,
                        int64_t *skipped_n) noexcept nogil:
    """The part of all steps whose gradients lie between the floats lo and hi of all of them, one after the other."""
    cdef int64_t j, d, size
    cdef const Step *s
    for j in range(n):
        s = steps + j
        d, size = s.batch.d, _positions(&s.batch)
        skipped_n[j] += _update_run(
            k, &s.batch, &s.rule, _run_at(&s.batch, min(max((lo - s.first) // d, 0), size)),
            _run_at(&s.batch, min(max((hi - s.first) // d, 0), size)), sum_d, False, None)


def update_many(list steps not None, int threads):
    """Several steps of `update`, of tables that are in memory and differ, in one parallel region; rows left alone in each.

    The threads share the gradients evenly, and a row belongs to one of them.
    """
    cdef int64_t n = len(steps), j, floats = 0, widest = 1
    cdef int t, caller = pe_this_cpu()
    cdef const pe_kernels *k = kernels
    cdef cnp.ndarray counts = cnp.PyArray_ZEROS(2, [threads, n + 16], cnp.NPY_INT64, 0)
    cdef int64_t *skipped_n = <int64_t *>cnp.PyArray_DATA(counts)
    cdef Step *s = <Step *>malloc((n + 1) * sizeof(Step))
    cdef float *sums = NULL
    if s is NULL:
        raise MemoryError
    try:
        for j in range(n):
            _step(&s[j], k, steps[j])
            s[j].first = floats
            floats += _positions(&s[j].batch) * s[j].batch.d
            widest = max(widest, s[j].batch.d)
        sums = _scratch(widest, threads)
        with nogil:
            for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
                if t:
                    pe_leave_cpu(caller)
                _update_share(k, s, n, _split(floats, t, threads), _split(floats, t + 1, threads),
                              sums + t * (widest + 16), skipped_n + t * (n + 16))
    finally:
        free(sums)
        free(s)
    return (<object>counts)[:, :n].sum(axis=0).tolist()


cdef void _catch_up_run(const pe_kernels *k, const Rule *rule, const int64_t *rows, int64_t lo, int64_t hi) noexcept nogil:
    cdef int64_t u, row
    cdef int c
    cdef float *col[MAX_COLUMNS]
    for u in range(lo, hi):
        row = u if rows is NULL else rows[u]
        for c in range(rule.columns):
            col[c] = rule.data[c] + row * rule.stride[c]
        _catch_up(k, rule, col, rule.width[0], False)


def catch_up(tuple columns not None, rows, str name, dict hyper not None, dict extras not None, int threads):
    """Give these unique rows, int64, or all rows for None, what they missed in the steps before extras["step"]."""
    cdef Rule rule
    cdef Column column = columns[0]
    cdef int t
    cdef int64_t n = column.rows
    cdef const int64_t *rows_u = NULL
    cdef const pe_kernels *k = kernels
    _rule(&rule, k, columns, name, hyper, extras)
    if rows is not None:
        if not _is_int64(rows):
            raise TypeError("rows are int64")
        rows_u = <const int64_t *>cnp.PyArray_DATA(rows)
        n = cnp.PyArray_SIZE(rows)
    with nogil:
        for t in prange(threads, num_threads=threads, schedule="static", chunksize=1, use_threads_if=threads > 1):
            _catch_up_run(k, &rule, rows_u, _split(n, t, threads), _split(n, t + 1, threads))


# name → (index in pe_kernels.update, the state columns in order); the weight comes first. A column holds one float for each
# element of the weight, or one for each row.
RULES = {
    "sgd": (PE_SGD, {}),
    "momentum": (PE_MOMENTUM, {"momentum_buffer": "element"}),
    "nesterov": (PE_NESTEROV, {"momentum_buffer": "element"}),
    "adagrad": (PE_ADAGRAD, {"sum": "element"}),
    "rowwise_adagrad": (PE_ROWWISE_ADAGRAD, {"row_sum": "row"}),
    "rmsprop": (PE_RMSPROP, {"square_avg": "element"}),
    "adam": (PE_ADAM, {"exp_avg": "element", "exp_avg_sq": "element"}),
    "adamw": (PE_ADAM, {"exp_avg": "element", "exp_avg_sq": "element"}),
    "rowwise_adam": (PE_ROWWISE_ADAM, {"exp_avg": "element", "row_exp_avg_sq": "row"}),
    "lamb": (PE_LAMB, {"exp_avg": "element", "exp_avg_sq": "element"}),
    "lars": (PE_LARS, {"momentum_buffer": "element"}),
    "ftrl": (PE_FTRL, {"ftrl_z": "element", "ftrl_n": "element"}),
}

# All hyper-parameters, 0; and a step without extras. To be copied and filled in.
HYPER = dict.fromkeys(
    ("lr", "eps", "momentum", "one_minus_b1", "one_minus_b2", "correction", "decay", "beta", "l1", "l2"), 0.0)
EXTRAS = {
    "skip_nonfinite": False, "step": 0.0, "keep": 1.0, "momentum": 0.0, "missed_lr": 0.0, "frequency_power": 0.0,
    "clip_value": INFINITY, "clip_scale": 1.0, "l2": 0.0, "max_norm": INFINITY, "norm_type": 2.0,
}
