// A parallel stable counting sort. Slots are cut into chunks; each chunk counts its slots per expert, a prefix sum over
// (expert, chunk) turns counts into first ranks, and each chunk then places its slots. The result is the stable order
// whatever the number of chunks.
#include "moe/plan.h"

#include "parallel.h"

namespace moe {
namespace {

// Fewer slots than this are not worth a thread.
constexpr int64_t kSlotGrain = 8192;

}  // namespace

Status plan_cpu(const PlanArgs& args, const ThreadPool& pool) {
  const int64_t num_rows = args.num_tokens * args.top_k, num_experts = args.num_experts;
  const int32_t* __restrict ids = args.topk_ids;
  int32_t* __restrict offsets = args.expert_offsets;
  // A chunk costs E counters, so it should have at least E slots: the whole stays O(R + E).
  const int64_t chunks = num_chunks(pool, num_rows, std::max(kSlotGrain, num_experts));
  const Scratch<int32_t> counts(chunks * num_experts);
  if (!counts) return Status::kOutOfMemory;
  std::fill_n(counts.get(), chunks * num_experts, 0);

  // 1. Count the slots of each expert in each chunk.
  const auto valid = [num_experts](int32_t id) { return id >= 0 && id < num_experts; };
  parallel_chunks(pool, num_rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t* count = counts.get() + chunk * num_experts;
    for (int64_t slot = begin; slot < end; ++slot) {
      if (valid(ids[slot])) ++count[ids[slot]];
    }
  });

  // 2. A count becomes the rank, inside its expert, of the chunk's first slot; the totals become the offsets.
  const int64_t capacity = args.capacity < 0 ? num_rows : args.capacity;
  offsets[0] = 0;
  for (int64_t e = 0; e < num_experts; ++e) {
    int32_t rank = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      int32_t& count = counts.get()[chunk * num_experts + e];
      const int32_t next = rank + count;
      count = rank;
      rank = next;
    }
    offsets[e + 1] = offsets[e] + static_cast<int32_t>(std::min<int64_t>(rank, capacity));
  }

  // 3. Place each slot.
  parallel_chunks(pool, num_rows, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
    int32_t* next_rank = counts.get() + chunk * num_experts;
    for (int64_t slot = begin; slot < end; ++slot) {
      const int32_t e = ids[slot];
      const int32_t rank = valid(e) ? next_rank[e]++ : 0;
      const bool kept = valid(e) && rank < capacity;
      const int32_t row = kept ? offsets[e] + rank : -1;
      args.slot_to_row[slot] = row;
      if (kept) args.row_to_slot[row] = static_cast<int32_t>(slot);
    }
  });
  std::fill(args.row_to_slot + offsets[num_experts], args.row_to_slot + num_rows, -1);
  return Status::kOk;
}

}  // namespace moe
