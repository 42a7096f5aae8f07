/* Striped spinlocks: many threads add into rows of one table at once and no addition is lost.
 *
 * A row's lock is chosen by a hash of the row, so two rows may share a lock (they wait for each other now and then)
 * and one row always has the same lock (its additions are never interleaved). Each lock has a cache line of its own,
 * so that taking one does not slow its neighbours. 1024 stripes: with 64 threads the chance that a thread finds its
 * stripe taken is 6 %, and all locks fit into 64 KiB. A holder does one row of additions and calls nothing, so a
 * spin is short and a deadlock impossible.
 */
#ifndef PYEMBED_STRIPES_H
#define PYEMBED_STRIPES_H

#include <stdint.h>

#define PE_STRIPES 1024

typedef struct {
    _Alignas(64) unsigned char taken;
} pe_stripe;

static pe_stripe pe_stripes[PE_STRIPES];

static inline int64_t pe_stripe_of(int64_t row) {
    return (int64_t)(((uint64_t)row * 0x9E3779B97F4A7C15u) >> 54);
}

/* PYEMBED_MUTANT_NO_LOCKS: a build for the test that shows that the test of these locks can fail. */
static inline void pe_stripe_lock(int64_t stripe) {
#ifdef PYEMBED_MUTANT_NO_LOCKS
    (void)stripe;
#else
    unsigned char *taken = &pe_stripes[stripe].taken;
    while (__atomic_exchange_n(taken, 1, __ATOMIC_ACQUIRE))
        while (__atomic_load_n(taken, __ATOMIC_RELAXED)) {
#if defined(__x86_64__)
            __builtin_ia32_pause();
#endif
        }
#endif
}

static inline void pe_stripe_unlock(int64_t stripe) {
    __atomic_store_n(&pe_stripes[stripe].taken, 0, __ATOMIC_RELEASE);
}

#endif
