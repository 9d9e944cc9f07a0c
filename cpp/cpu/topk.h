// Selection of the k largest of n values, in descending order, ties to the lower index. No value may be NaN.
// For any k, and quick whatever the values are; route/select.h is quicker where k is small and ties are few.
#pragma once

#include <cstdint>

namespace moe {

// indices: [k] out. order: [n] scratch.
template <typename W>
void select_top_k(const W* values, int64_t n, int64_t k, int32_t* indices, int32_t* order);

extern template void select_top_k<float>(const float*, int64_t, int64_t, int32_t*, int32_t*);
extern template void select_top_k<double>(const double*, int64_t, int64_t, int32_t*, int32_t*);

}  // namespace moe
