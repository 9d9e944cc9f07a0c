// The only door to PTX: kernels call these functions and never write asm. nvcc gets one instruction per function (the
// headers beside this one, each with its section of the PTX ISA manual, version 9.0); a CPU build
// (tests/cuda/cuda_on_cpu.h) gets functions of the same names that execute the documented semantics.
#pragma once

#include <cstdint>

#ifdef CUDA_ON_CPU
#include "emu/ptx_emu.h"
#else
#include "ptx/async_copy.cuh"
#include "ptx/barrier.cuh"
#include "ptx/bulk_copy.cuh"
#include "ptx/control.cuh"
#include "ptx/launch.cuh"
#include "ptx/math.cuh"
#include "ptx/matrix.cuh"
#include "ptx/mbarrier.cuh"
#include "ptx/memory.cuh"
#include "ptx/wgmma.cuh"
#endif
