/* The update rules: each changes one row of the weight, col[0], and of its state, col[1..], by a summed gradient. Included by
 * rows.inc.h, under each level's target; formulas and sources are in optim/rules.py, the specification is tests/reference/rules.py.
 *
 * Sums over a row are of squares in double, over 16 lanes and a tree, so that every level gives the same bits. Clipping,
 * weight decay (but for LAMB and LARS, whose norms it is part of) and max_norm are not here: they are the same for all rules.
 */

PE_INLINE float mean_square(const float *src_d, int64_t d) { return (float)(squares_row(src_d, d) / (double)d); }

/* w -= lr * g */
static void sgd_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0];
    const float lr = h->lr;
    for (int64_t i = 0; i < d; i++) w_d[i] -= lr * grad_d[i];
}

/* m = momentum * m + (1 - dampening) * g;  w -= lr * m */
static void momentum_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1];
    const float lr = h->lr, momentum = h->momentum, add = h->one_minus_b1;
    for (int64_t i = 0; i < d; i++) {
        const float m = momentum * m_d[i] + add * grad_d[i];
        m_d[i] = m;
        w_d[i] -= lr * m;
    }
}

/* m = momentum * m + g;  w -= lr * (g + momentum * m) */
static void nesterov_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1];
    const float lr = h->lr, momentum = h->momentum, add = h->one_minus_b1;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i], m = momentum * m_d[i] + add * g;
        m_d[i] = m;
        w_d[i] -= lr * (g + momentum * m);
    }
}

/* s += g^2;  w -= lr * g / (sqrt(s) + eps) */
static void adagrad_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict sum_d = col[1];
    const float lr = h->lr, eps = h->eps;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i], s = sum_d[i] + g * g;
        sum_d[i] = s;
        w_d[i] -= lr * (g / (sqrtf(s) + eps));
    }
}

/* s += mean(g^2), one number for the row;  w -= lr / (sqrt(s) + eps) * g */
static void rowwise_adagrad_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0];
    const float s = *col[1] + mean_square(grad_d, d), step = h->lr / (sqrtf(s) + h->eps);
    *col[1] = s;
    for (int64_t i = 0; i < d; i++) w_d[i] -= step * grad_d[i];
}

/* v += (g^2 - v)(1 - alpha);  w -= lr * g / (sqrt(v) + eps) */
static void rmsprop_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict v_d = col[1];
    const float lr = h->lr, eps = h->eps, one_minus_b2 = h->one_minus_b2;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i], v = v_d[i] + (g * g - v_d[i]) * one_minus_b2;
        v_d[i] = v;
        w_d[i] -= lr * (g / (sqrtf(v) + eps));
    }
}

/* m += (g - m)(1 - b1);  v += (g^2 - v)(1 - b2);  w -= lr * m / (sqrt(v) + eps), lr with both bias corrections */
static void adam_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1], *restrict v_d = col[2];
    const float lr = h->lr, eps = h->eps, one_minus_b1 = h->one_minus_b1, one_minus_b2 = h->one_minus_b2;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i];
        const float m = m_d[i] + (g - m_d[i]) * one_minus_b1;
        const float v = v_d[i] + (g * g - v_d[i]) * one_minus_b2;
        m_d[i] = m;
        v_d[i] = v;
        w_d[i] -= lr * (m / (sqrtf(v) + eps));
    }
}

/* v += (mean(g^2) - v)(1 - b2), one number for the row;  m += (g - m)(1 - b1);  w -= lr / (sqrt(v) + eps) * m */
static void rowwise_adam_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1];
    const float one_minus_b1 = h->one_minus_b1, v = *col[2] + (mean_square(grad_d, d) - *col[2]) * h->one_minus_b2;
    const float step = h->lr / (sqrtf(v) + h->eps);
    *col[2] = v;
    for (int64_t i = 0; i < d; i++) {
        const float m = m_d[i] + (grad_d[i] - m_d[i]) * one_minus_b1;
        m_d[i] = m;
        w_d[i] -= step * m;
    }
}

/* What LAMB scales: Adam's direction, and the decay. */
#define PE_LAMB(i) (correction * (m_d[i] / (sqrtf(v_d[i]) + eps)) + decay * w_d[i])

PE_NOINLINE double lamb_squares(const float *restrict w_d, const float *restrict m_d, const float *restrict v_d, int64_t d,
                                const pe_hyper *h) {
    const float eps = h->eps, correction = h->correction, decay = h->decay;
    double lane[PE_SUM_LANES] = {0};
    PE_LANE_SUM(lane, (double)PE_LAMB(i) * (double)PE_LAMB(i))
    return lane[0];
}

/* r = correction * m / (sqrt(v) + eps) + decay * w;  w -= lr * (|w| / |r|) * r, where the ratio is 1 if a norm is zero */
static void lamb_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1], *restrict v_d = col[2];
    const float eps = h->eps, correction = h->correction, decay = h->decay;
    const float one_minus_b1 = h->one_minus_b1, one_minus_b2 = h->one_minus_b2;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i];
        m_d[i] += (g - m_d[i]) * one_minus_b1;
        v_d[i] += (g * g - v_d[i]) * one_minus_b2;
    }
    const double w = sqrt(squares_row(w_d, d)), r = sqrt(lamb_squares(w_d, m_d, v_d, d, h));
    const float step = h->lr * (w == 0.0 || r == 0.0 ? 1.0f : (float)(w / r));
    for (int64_t i = 0; i < d; i++) w_d[i] -= step * PE_LAMB(i);
}

/* m = momentum * m + lr * a * (g + decay * w);  w -= m, where a = eta |w| / (|g| + decay |w|), and 1 if a norm is zero */
static void lars_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict m_d = col[1];
    const float momentum = h->momentum, decay = h->decay;
    const double w = sqrt(squares_row(w_d, d)), g = sqrt(squares_row(grad_d, d));
    const double ratio = w == 0.0 || g == 0.0 ? 1.0 : (double)h->correction * w / (g + (double)decay * w);
    const float step = h->lr * (float)ratio;
    for (int64_t i = 0; i < d; i++) {
        const float m = momentum * m_d[i] + step * (grad_d[i] + decay * w_d[i]);
        m_d[i] = m;
        w_d[i] -= m;
    }
}

/* z += g - (sqrt(n + g^2) - sqrt(n)) / lr * w;  n += g^2;  w = 0 if |z| <= l1, else
 * -(z - sign(z) l1) / ((beta + sqrt(n)) / lr + l2) */
static void ftrl_row(float *const *col, const float *restrict grad_d, int64_t d, const pe_hyper *h) {
    float *restrict w_d = col[0], *restrict z_d = col[1], *restrict n_d = col[2];
    const float lr = h->lr, beta = h->beta, l1 = h->l1, l2 = h->l2;
    for (int64_t i = 0; i < d; i++) {
        const float g = grad_d[i], n = n_d[i] + g * g, root = sqrtf(n);
        const float z = z_d[i] + (g - (root - sqrtf(n_d[i])) / lr * w_d[i]);
        const float w = -(z - copysignf(l1, z)) / ((beta + root) / lr + l2);
        n_d[i] = n;
        z_d[i] = z;
        w_d[i] = fabsf(z) <= l1 ? 0.0f : w;
    }
}

#define PE_RULE_TABLE                                                                     \
    {                                                                                     \
        {"sgd", sgd_row}, {"momentum", momentum_row}, {"nesterov", nesterov_row},         \
        {"adagrad", adagrad_row}, {"rowwise_adagrad", rowwise_adagrad_row},               \
        {"rmsprop", rmsprop_row}, {"adam", adam_row}, {"rowwise_adam", rowwise_adam_row}, \
        {"lamb", lamb_row}, {"lars", lars_row}, {"ftrl", ftrl_row},                       \
    }
