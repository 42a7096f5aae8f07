/* The row kernels for any processor: SSE2 on x86-64, NEON on arm64. */
#define PE_LEVEL baseline
#define PE_VECTOR_BYTES 16
#include "rows.inc.h"
