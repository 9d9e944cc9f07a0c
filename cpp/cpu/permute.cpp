#include "moe/permute.h"

#include <cstring>

#include "parallel.h"
#include "plan_view.h"

namespace moe {
namespace {

// Bytes that are worth a thread.
constexpr int64_t kByteGrain = 1 << 16;

}  // namespace

Status permute_cpu(const PermuteArgs& args, const ThreadPool& pool) {
  const int64_t row_bytes = args.hidden_size * static_cast<int64_t>(size_of(args.dtype));
  if (row_bytes == 0) return Status::kOk;
  const auto* tokens = static_cast<const char*>(args.hidden_states);
  auto* rows = static_cast<char*>(args.rows);
  parallel_for(pool, args.plan.num_rows, items_of_work(kByteGrain, row_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int64_t slot = slot_of(args.plan, row);
      if (slot < 0) {
        std::memset(rows + row * row_bytes, 0, row_bytes);
      } else {
        std::memcpy(rows + row * row_bytes, tokens + slot / args.plan.top_k * row_bytes, row_bytes);
      }
    }
  });
  return Status::kOk;
}

}  // namespace moe
