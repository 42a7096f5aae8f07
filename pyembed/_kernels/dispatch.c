/* Which level of the row kernels this processor can run. Asked once, at import. */
#include <stddef.h>
#include <string.h>
#include "kernels.h"

#ifdef PE_HAVE_V3
/* libgcc's answers include that the operating system saves the wide registers. */
static int has_v3(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}
static int has_v4(void) {
    return has_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
           && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

const pe_kernels *pe_kernels_best(void) {
#ifdef PE_HAVE_V3
    if (has_v4()) return &pe_kernels_v4;
    if (has_v3()) return &pe_kernels_v3;
#endif
    return &pe_kernels_baseline;
}

const pe_kernels *pe_kernels_named(const char *name) {
    if (strcmp(name, "baseline") == 0) return &pe_kernels_baseline;
#ifdef PE_HAVE_V3
    if (strcmp(name, "v3") == 0 && has_v3()) return &pe_kernels_v3;
    if (strcmp(name, "v4") == 0 && has_v4()) return &pe_kernels_v4;
#endif
    return NULL;
}
