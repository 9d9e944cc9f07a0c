#include "moe/ep_reduce.h"

#include "parallel.h"
#include "wire.h"

namespace moe {
namespace {

// Elements that are worth a thread.
constexpr int64_t kElementGrain = 1 << 14;
// Columns summed at a time: the sums stay in the first-level cache.
constexpr int64_t kColumns = 512;

template <typename T>
void ep_reduce(const EpReduceArgs& args, const ThreadPool& pool) {
  const EpRow& row = args.row;
  const int64_t width = row.hidden_size, ranks = args.ep_size, top_k = row.top_k, bytes = row.bytes();
  auto* output = static_cast<T*>(args.output);
  auto* weights = static_cast<Wide<T>*>(args.weights);
  const auto row_of = [&](int64_t token, int64_t rank) -> const uint8_t* {
    const int64_t r = args.slot_to_row[token * ranks + rank];
    return r >= 0 && r < args.num_rows ? args.rows + r * bytes : nullptr;
  };
  advise_huge_pages(output, static_cast<size_t>(args.num_tokens * width) * sizeof(T));
  parallel_for(pool, args.num_tokens, items_of_work(kElementGrain, width * ranks), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      for (int64_t first = 0; first < width; first += kColumns) {
        const int64_t n = std::min(kColumns, width - first);
        Wide<T> sums[kColumns] = {};
        for (int64_t rank = 0; rank < ranks; ++rank) {
          const uint8_t* in = row_of(token, rank);
          if (in == nullptr) continue;
          const T* __restrict source = reinterpret_cast<const T*>(in) + first;
          for (int64_t j = 0; j < n; ++j) sums[j] += widen(source[j]);
        }
        T* __restrict target = output + token * width + first;
        for (int64_t j = 0; j < n; ++j) target[j] = narrow<T>(sums[j]);
      }
      for (int64_t k = 0; row.has_weights && k < top_k; ++k) {
        const int64_t p = args.physical_ids[token * top_k + k], rank = p < 0 ? -1 : p / args.num_local_experts;
        const uint8_t* in = rank >= 0 && rank < ranks ? row_of(token, rank) : nullptr;
        Wide<T> weight{0};
        if (in != nullptr) std::memcpy(&weight, in + row.weights_at() + k * row.weight_bytes(), sizeof(weight));
        weights[token * top_k + k] = weight;
      }
    }
  });
}

}  // namespace

Status ep_reduce_cpu(const EpReduceArgs& args, const ThreadPool& pool) {
  dispatch(args.row.dtype, [&]<typename T>(std::type_identity<T>) { ep_reduce<T>(args, pool); });
  return Status::kOk;
}

}  // namespace moe
