#define MOE_ISA avx2
#define MOE_VECTOR_BYTES 32
#include "route/table.h"
