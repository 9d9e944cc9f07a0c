#include "topk.h"

#include <algorithm>
#include <numeric>

#include "reduce.h"

namespace moe {

template <typename W>
void select_top_k(const W* __restrict values, int64_t n, int64_t k, int32_t* __restrict indices, int32_t* order) {
  constexpr int64_t kInsertion = 16;  // up to here the best are kept sorted while scanning
  if (k > kInsertion) {
    std::iota(order, order + n, 0);
    const auto better = [values](int32_t a, int32_t b) {
      return values[a] > values[b] || (values[a] == values[b] && a < b);
    };
    if (k < n) std::nth_element(order, order + k, order + n, better);
    std::sort(order, order + k, better);
    std::copy_n(order, k, indices);
    return;
  }
  W best[kInsertion];
  int64_t found = 0;
  // Only a strictly larger value moves one that was found before it: ties stay with the lower index.
  const auto insert = [&](int64_t i) {
    int64_t place = found < k ? found++ : k - 1;
    for (; place > 0 && values[i] > best[place - 1]; --place) {
      best[place] = best[place - 1];
      indices[place] = indices[place - 1];
    }
    best[place] = values[i];
    indices[place] = static_cast<int32_t>(i);
  };
  int64_t i = 0;
  for (; i < k; ++i) insert(i);
  // Most blocks hold nothing better than the k-th best: one vectorised comparison tells.
  for (; i + kLanes <= n; i += kLanes) {
    int better = 0;
    for (int64_t j = 0; j < kLanes; ++j) better |= values[i + j] > best[k - 1];
    if (!better) continue;
    for (int64_t j = 0; j < kLanes; ++j) {
      if (values[i + j] > best[k - 1]) insert(i + j);
    }
  }
  for (; i < n; ++i) {
    if (values[i] > best[k - 1]) insert(i);
  }
}

template void select_top_k<float>(const float*, int64_t, int64_t, int32_t*, int32_t*);
template void select_top_k<double>(const double*, int64_t, int64_t, int32_t*, int32_t*);

}  // namespace moe
