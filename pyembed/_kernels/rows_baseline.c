/* The row kernels for any processor: SSE2 on x86-64, NEON on arm64. */
#define PE_LEVEL baseline
#include "rows.inc.h"
