#define MOE_ISA avx512
#define MOE_VECTOR_BYTES 64
#include "route/table.h"
