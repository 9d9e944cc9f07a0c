// Sixteen-byte vectors by the compiler's vector extension: the baseline of every processor (SSE2, NEON, or plain scalar
// code).
#define MOE_ISA scalar
#define MOE_VECTOR_BYTES 16
#define MOE_ACCUMULATORS 12
#define MOE_TILE_VECTORS 2
#include "gemm/table.h"
