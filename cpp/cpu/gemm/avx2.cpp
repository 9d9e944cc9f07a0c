#define MOE_ISA avx2
#define MOE_VECTOR_BYTES 32
#define MOE_ACCUMULATORS 12
#define MOE_TILE_VECTORS 2
#include "gemm/table.h"
