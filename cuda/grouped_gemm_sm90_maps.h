// Tensor maps for TMA, encoded on the host for each call: the driver's function is looked up, so that nothing links
// against the driver.
#pragma once

#include <cuda.h>

#include "elements.cuh"
#include "tensor_map.h"

namespace moe::cuda::sm90 {

// A matrix [outer, middle, inner] of 16-bit elements, inner contiguous; strides in elements. A box is 64 inner elements
// (one row of the 128-byte swizzle) by `box_middle` by `box_outer`.
struct MapShape {
  int64_t inner, middle, outer;
  int64_t middle_stride, outer_stride;
  int box_middle, box_outer;
};

template <typename T>
Status encode_map(CUtensorMap* map, const T* data, const MapShape& shape, const CudaContext& cuda) {
  const auto encode = tensor_map_encoder();
  if (encode == nullptr) {
    return unsupported("cuTensorMapEncodeTiled", "this driver does not have it (update it to one for CUDA 12)", cuda);
  }
  const cuuint64_t sizes[] = {cuuint64_t(shape.inner), cuuint64_t(shape.middle), cuuint64_t(shape.outer)};
  const cuuint64_t strides[] = {cuuint64_t(shape.middle_stride) * sizeof(T),
                                cuuint64_t(shape.outer_stride) * sizeof(T)};
  const cuuint32_t box[] = {64, cuuint32_t(shape.box_middle), cuuint32_t(shape.box_outer)};
  const cuuint32_t steps[] = {1, 1, 1};
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  const CUresult encoded =
      encode(map, type, 3, const_cast<T*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (encoded != CUDA_SUCCESS) return unsupported("cuTensorMapEncodeTiled", "the driver refused a tensor map", cuda);
  return Status::kOk;
}

// Rows [R, width] in boxes of 64 columns by `box_rows` rows. The middle dimension is unused, so that every map of a
// kernel has three.
inline MapShape rows_shape(int64_t num_rows, int64_t width, int box_rows) {
  return {width, 1, num_rows, width, width, 1, box_rows};
}
// [R, parts, width]: the gate and the up half of a row are two parts, so that TMA cuts each at its own end.
inline MapShape parts_shape(int64_t num_rows, int64_t parts, int64_t width) {
  return {width, parts, num_rows, width, parts * width, 1, 64};
}
// [E, outer, inner], one expert at a time.
inline MapShape experts_shape(int64_t num_experts, int64_t outer, int64_t inner, int box_outer) {
  return {inner, outer, num_experts, inner, outer * inner, box_outer, 1};
}

}  // namespace moe::cuda::sm90
