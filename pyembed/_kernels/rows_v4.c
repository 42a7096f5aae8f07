/* The row kernels for x86-64-v4 (AVX-512): the same loops, four times the lanes, and rotations of integers in one instruction. Empty elsewhere. */
#include <math.h> /* system headers stay outside of the target below */
#include <string.h>
#include "kernels.h"

#ifdef PE_HAVE_V4
#define PE_LEVEL v4
#define PE_VECTOR_BYTES 64
#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,f16c,fma,bmi,bmi2,avx512f,avx512bw,avx512cd,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC target("arch=x86-64-v4,prefer-vector-width=512")
#endif
#include "rows.inc.h"
#ifdef __clang__
#pragma clang attribute pop
#endif
#endif
