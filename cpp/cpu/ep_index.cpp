#include "moe/ep_index.h"

#include "moe/plan.h"
#include "parallel.h"
#include "wire.h"

namespace moe {
namespace {

// Bytes that are worth a thread.
constexpr int64_t kByteGrain = 1 << 16;

template <typename T>
void read_rows(const EpIndexArgs& args, int32_t* ids, const ThreadPool& pool) {
  const EpRow& row = args.row;
  const int64_t bytes = row.bytes(), top_k = row.top_k;
  auto* hidden = static_cast<T*>(args.hidden_states);
  auto* weights = static_cast<Wide<T>*>(args.topk_weights);
  advise_huge_pages(hidden, static_cast<size_t>(args.num_rows * row.hidden_size) * sizeof(T));
  parallel_for(pool, args.num_rows, items_of_work(kByteGrain, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const uint8_t* in = args.rows + r * bytes;
      from_wire(in, row, hidden + r * row.hidden_size);
      std::memcpy(ids + r * top_k, in + row.ids_at(), static_cast<size_t>(4 * top_k));
      std::memcpy(weights + r * top_k, in + row.weights_at(), static_cast<size_t>(row.weight_bytes() * top_k));
    }
  });
}

}  // namespace

Status ep_index_cpu(const EpIndexArgs& args, const ThreadPool& pool) {
  const int64_t slots = args.num_rows * args.row.top_k;
  const Scratch<int32_t> ids(slots), row_to_slot(slots);
  if (!ids || !row_to_slot) return Status::kOutOfMemory;
  dispatch(args.row.dtype, [&]<typename T>(std::type_identity<T>) { read_rows<T>(args, ids.get(), pool); });
  const Status status = plan_cpu({.expert_offsets = args.expert_offsets,
                                  .row_to_slot = row_to_slot.get(),
                                  .slot_to_row = args.slot_to_row,
                                  .topk_ids = ids.get(),
                                  .num_tokens = args.num_rows,
                                  .num_experts = args.num_experts,
                                  .top_k = args.row.top_k,
                                  .capacity = -1},
                                 pool);
  if (status != Status::kOk) return status;
  const int64_t kept = std::min(args.num_pairs, slots);
  std::copy_n(row_to_slot.get(), kept, args.row_to_slot);
  std::fill(args.row_to_slot + kept, args.row_to_slot + args.num_pairs, -1);
  return Status::kOk;
}

}  // namespace moe
