/* Pages of a mapped file: asking the system for those that are needed soon, and seeing which are in memory.
 *
 * One page fault at a time keeps a disk at a queue of one: 20 thousand rows a second where it can do a hundred thousand.
 * So pages are requested about a thousand rows before they are used, 64 ranges a call (docs/decisions/0006). All requests
 * are advice: where the system refuses them, rows are still right, and slower.
 */
#ifndef PYEMBED_PAGES_H
#define PYEMBED_PAGES_H

#include <stdint.h>
#include <string.h>

#define PE_READAHEAD_RANGES 64
#define PE_READAHEAD_BYTES (128 << 10) /* of one range; the system may ignore what goes beyond its own read-ahead */
#define PE_READAHEAD_SEEN 1024 /* pages remembered, so that a hot page is asked for once: 8 KiB, inside the L1 cache */

#ifdef __linux__
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>
#ifndef MADV_WILLNEED
#define MADV_WILLNEED 3
#endif

/* The readahead of one thread. */
typedef struct {
    int self; /* this process as a pidfd, or -1: then one call a range */
    int held;
    int64_t asked; /* ranges, in all */
    uintptr_t page_bytes;
    struct iovec range[PE_READAHEAD_RANGES];
    uintptr_t seen[PE_READAHEAD_SEEN];
} pe_readahead;

static inline void pe_readahead_begin(pe_readahead *a) {
    a->held = 0;
    a->asked = 0;
    a->page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
    memset(a->seen, 0, sizeof a->seen);
#if defined(SYS_pidfd_open) && defined(SYS_process_madvise)
    a->self = (int)syscall(SYS_pidfd_open, getpid(), 0);
#else
    a->self = -1;
#endif
}

static inline void pe_readahead_flush(pe_readahead *a) {
    int from = 0;
    a->asked += a->held;
#ifdef SYS_process_madvise
    if (a->self >= 0 && a->held) {
        const long done = syscall(SYS_process_madvise, a->self, a->range, (size_t)a->held, MADV_WILLNEED, 0u);
        if (done > 0) from = a->held; /* a part that was refused would be refused again */
    }
#endif
    for (; from < a->held; from++) madvise(a->range[from].iov_base, a->range[from].iov_len, MADV_WILLNEED);
    a->held = 0;
}

/* Requests the ranges that are held, and adds their number to *total, as other threads may at the same time. */
static inline void pe_readahead_end(pe_readahead *a, int64_t *total) {
    pe_readahead_flush(a);
    if (a->self >= 0) close(a->self);
    __atomic_fetch_add(total, a->asked, __ATOMIC_RELAXED);
}

static inline void pe_readahead_add(pe_readahead *a, const void *from, int64_t bytes) {
    const uintptr_t first = (uintptr_t)from & ~(a->page_bytes - 1), end = (uintptr_t)from + (uintptr_t)bytes;
    uintptr_t *seen = &a->seen[(first / a->page_bytes * 0x9E3779B97F4A7C15u) >> 54];
    struct iovec *last = &a->range[a->held - 1];
    if (*seen == first) return;
    *seen = first;
    if (a->held && (uintptr_t)last->iov_base + last->iov_len == first && last->iov_len < PE_READAHEAD_BYTES) {
        last->iov_len = ((end + a->page_bytes - 1) & ~(a->page_bytes - 1)) - (uintptr_t)last->iov_base;
        return; /* rows side by side are one read */
    }
    a->range[a->held].iov_base = (void *)first;
    a->range[a->held].iov_len = ((end + a->page_bytes - 1) & ~(a->page_bytes - 1)) - first;
    if (++a->held == PE_READAHEAD_RANGES) pe_readahead_flush(a);
}

/* Wait until the pages of a row are in memory, and map them; 0 if the system cannot (before Linux 5.14). */
static inline int pe_map_pages(const void *from, int64_t bytes, int to_write) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = (uintptr_t)from & ~(page - 1);
    const uintptr_t end = ((uintptr_t)from + (uintptr_t)bytes + page - 1) & ~(page - 1);
    return madvise((void *)first, end - first, to_write ? 23 : 22 /* MADV_POPULATE_WRITE, _READ */) == 0;
}

/* Whether the page at `at` is in memory. Where the system does not say, yes. */
static inline int pe_page_resident(const void *at) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    unsigned char in = 1;
    mincore((void *)((uintptr_t)at & ~(page - 1)), 1, &in);
    return in & 1;
}

/* Page faults of this process that waited for a disk. */
static inline int64_t pe_major_faults(void) {
    struct rusage used;
    getrusage(RUSAGE_SELF, &used);
    return used.ru_majflt;
}
/* How many pages of a file are in memory, and how many of them are not written yet; -1 if the system does not say. */
static inline int64_t pe_cached_pages(int fd, int64_t *dirty) {
#ifdef SYS_cachestat
    const long number = SYS_cachestat;
#else
    const long number = 451; /* of every architecture that Linux 6.5 runs on */
#endif
    struct { uint64_t offset, bytes; } range = {0, 0}; /* the whole file */
    struct { uint64_t cached, dirty, writeback, evicted, recently_evicted; } found;
    if (syscall(number, fd, &range, &found, 0u) != 0) return -1;
    *dirty = (int64_t)(found.dirty + found.writeback);
    return (int64_t)found.cached;
}

/* Begin to write what was changed in a range, and do not wait for the end of it. */
static inline int pe_start_write_back(int fd, int64_t from, int64_t bytes) {
    return sync_file_range(fd, from, bytes, SYNC_FILE_RANGE_WRITE);
}

/* Take pages out of memory; those that are not written yet stay. */
static inline int pe_page_out(void *from, int64_t bytes) {
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE), first = ((uintptr_t)from + page - 1) & ~(page - 1);
    const uintptr_t end = ((uintptr_t)from + (uintptr_t)bytes) & ~(page - 1);
    return first < end ? madvise((void *)first, end - first, 21 /* MADV_PAGEOUT, Linux 5.4 */) : 0;
}
#else
typedef struct {
    int64_t asked;
} pe_readahead;
static inline void pe_readahead_begin(pe_readahead *a) { a->asked = 0; }
static inline void pe_readahead_flush(pe_readahead *a) { (void)a; }
static inline void pe_readahead_end(pe_readahead *a, int64_t *total) { (void)a, (void)total; }
static inline void pe_readahead_add(pe_readahead *a, const void *from, int64_t bytes) { (void)a, (void)from, (void)bytes; }
static inline int pe_map_pages(const void *from, int64_t bytes, int to_write) { return (void)from, (void)bytes, (void)to_write, 0; }
static inline int pe_page_resident(const void *at) { return (void)at, 1; }
static inline int64_t pe_major_faults(void) { return 0; }
static inline int64_t pe_cached_pages(int fd, int64_t *dirty) { return (void)fd, *dirty = 0, -1; }
static inline int pe_start_write_back(int fd, int64_t from, int64_t bytes) { return (void)fd, (void)from, (void)bytes, -1; }
static inline int pe_page_out(void *from, int64_t bytes) { return (void)from, (void)bytes, -1; }
#endif

#endif
