/* Which level of the row kernels this processor can run. Asked once, at import. */
#include <stddef.h>
#include <string.h>
#include "kernels.h"

#ifdef PE_HAVE_V3
static int has_v3(void) {
    /* libgcc's answer includes that the operating system saves the wide registers. */
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
#endif

const pe_kernels *pe_kernels_best(void) {
#ifdef PE_HAVE_V3
    if (has_v3()) return &pe_kernels_v3;
#endif
    return &pe_kernels_baseline;
}

const pe_kernels *pe_kernels_named(const char *name) {
    if (strcmp(name, "baseline") == 0) return &pe_kernels_baseline;
#ifdef PE_HAVE_V3
    if (strcmp(name, "v3") == 0 && has_v3()) return &pe_kernels_v3;
#endif
    return NULL;
}
