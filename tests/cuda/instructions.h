// What the tests of single instructions share: which GPU this is, and tensor maps.
#pragma once

#include <cuda.h>

#include <array>

#include "device.h"
#include "tensor_map.h"

// Whether this pass compiles instructions of sm_90, and those of sm_90a alone.
#if defined(CUDA_ON_CPU) || !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define MOE_TEST_SM90 1
#else
#define MOE_TEST_SM90 0
#endif
#if defined(CUDA_ON_CPU) || !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define MOE_TEST_SM90A 1
#else
#define MOE_TEST_SM90A 0
#endif

namespace moe::test {

inline bool has_sm90() {
  int major = 0;
  cuda_ok(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, 0));
  return major == 9;
}

// Of 16-bit elements, innermost dimension first, rows `pitch` elements apart; two dimensions when box[2] is 0.
inline CUtensorMap tensor_map(void* data, const std::array<int, 3>& size, int pitch, const std::array<int, 3>& box,
                              CUtensorMapSwizzle swizzle) {
  const auto encode = cuda::tensor_map_encoder();
  const cuuint64_t sizes[] = {cuuint64_t(size[0]), cuuint64_t(size[1]), cuuint64_t(size[2])};
  const cuuint64_t strides[] = {cuuint64_t(pitch) * 2, cuuint64_t(pitch) * 2 * cuuint64_t(size[1])};
  const cuuint32_t boxes[] = {cuuint32_t(box[0]), cuuint32_t(box[1]), cuuint32_t(box[2])};
  const cuuint32_t steps[] = {1, 1, 1};
  CUtensorMap map{};
  check(encode != nullptr && encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, box[2] == 0 ? 2 : 3, data, sizes, strides,
                                    boxes, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                    CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS,
        __FILE__, __LINE__, "cuTensorMapEncodeTiled refuses a map");
  return map;
}

}  // namespace moe::test
