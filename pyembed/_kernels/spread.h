/* Keeping the threads of a parallel region on different processors.
 *
 * A sleeping worker wakes on the processor where it slept if the scheduler sees no shared cache to search (virtual
 * machines often show none). If that is the processor of the thread that woke it, which now spins and waits, both
 * share one processor and each region lasts until a scheduler tick: 24 ms instead of 16 us for 4096 rows, on 2 cores
 * of a virtual EPYC 9005. It does not recover by itself. So a worker that shares its caller's processor moves away once,
 * and takes its affinity back; it then wakes where it went. In the usual case this costs a look at the processor's
 * number, about 20 ns.
 */
#ifndef PYEMBED_SPREAD_H
#define PYEMBED_SPREAD_H

#if defined(__linux__) && defined(_OPENMP)
#include <sched.h>

static inline int pe_this_cpu(void) { return sched_getcpu(); }

static inline void pe_leave_cpu(int cpu) {
    cpu_set_t allowed, elsewhere;
    if (cpu < 0 || sched_getcpu() != cpu || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
    elsewhere = allowed;
    CPU_CLR(cpu, &elsewhere);
    if (CPU_COUNT(&elsewhere) == 0) return;
    if (sched_setaffinity(0, sizeof elsewhere, &elsewhere) == 0) sched_setaffinity(0, sizeof allowed, &allowed);
}
#else
static inline int pe_this_cpu(void) { return -1; }
static inline void pe_leave_cpu(int cpu) { (void)cpu; }
#endif

#endif
