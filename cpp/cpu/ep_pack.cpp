#include "moe/ep_pack.h"

#include "parallel.h"
#include "wire.h"

namespace moe {
namespace {

// Bytes that are worth a thread.
constexpr int64_t kByteGrain = 1 << 16;

template <typename T>
void ep_pack(const EpPackArgs& args, const ThreadPool& pool) {
  const EpRow& row = args.row;
  const int64_t bytes = row.bytes(), top_k = row.top_k, local = args.num_local_experts;
  const auto* tokens = static_cast<const T*>(args.hidden_states);
  const auto* weights = static_cast<const Wide<T>*>(args.topk_weights);
  advise_huge_pages(args.rows, static_cast<size_t>(args.num_rows * bytes));
  parallel_for(pool, args.num_rows, items_of_work(kByteGrain, bytes), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint8_t* out = args.rows + r * bytes;
      const int64_t slot = args.row_to_slot == nullptr ? r * args.ep_size : args.row_to_slot[r];
      const int64_t token = slot < 0 ? -1 : slot / args.ep_size, rank = slot % args.ep_size;
      const bool used = token >= 0 && token < args.num_tokens;
      // What pads the parts is sent, too: it has to be the same from run to run.
      if (!used || row.bytes() != row.hidden_bytes()) {
        const int64_t from = used ? row.hidden_bytes() : 0;
        std::memset(out + from, 0, static_cast<size_t>(bytes - from));
      }
      if (used) to_wire(tokens + token * row.hidden_size, row, out);
      if (row.has_ids) {
        for (int64_t k = 0; k < top_k; ++k) {
          const int64_t id = used ? args.physical_ids[token * top_k + k] - rank * local : -1;
          const int32_t local_id = id >= 0 && id < local ? static_cast<int32_t>(id) : -1;
          std::memcpy(out + row.ids_at() + 4 * k, &local_id, 4);
        }
      }
      if (row.has_weights && used) {
        std::memcpy(out + row.weights_at(), weights + token * top_k, static_cast<size_t>(row.weight_bytes() * top_k));
      }
    }
  });
}

}  // namespace

Status ep_pack_cpu(const EpPackArgs& args, const ThreadPool& pool) {
  dispatch(args.row.dtype, [&]<typename T>(std::type_identity<T>) { ep_pack<T>(args, pool); });
  return Status::kOk;
}

}  // namespace moe
