#define MOE_ISA avx512
#define MOE_VECTOR_BYTES 64
#define MOE_ACCUMULATORS 24
#define MOE_TILE_VECTORS 4
#include "gemm/table.h"
