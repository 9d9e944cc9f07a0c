#define MOE_ISA scalar
#define MOE_VECTOR_BYTES 16
#include "route/table.h"
