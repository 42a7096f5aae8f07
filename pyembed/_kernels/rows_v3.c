/* The row kernels for x86-64-v3 (AVX2): the same loops, twice the lanes. Empty elsewhere. */
#include <math.h> /* system headers stay outside of the target below */
#include <string.h>
#include "kernels.h"

#ifdef PE_HAVE_V3
#define PE_LEVEL v3
#define PE_VECTOR_BYTES 32
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma,bmi,bmi2"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v3")
#endif
#include "rows.inc.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
