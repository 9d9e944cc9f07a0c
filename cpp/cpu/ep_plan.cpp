// A parallel counting sort like that of plan: tokens are cut into pieces, each piece counts its rows per bucket (a
// chunk and a rank), a prefix sum over (bucket, piece) turns counts into first rows, and each piece then places its
// rows.
#include "moe/ep_plan.h"

#include "parallel.h"

namespace moe {
namespace {

// Slots that are worth a thread.
constexpr int64_t kSlotGrain = 8192;

struct Physical {
  const EpPlanArgs& args;

  // Where the k-th choice of a token is computed, or -1.
  int32_t operator()(int64_t token, int64_t k) const {
    const int32_t id = args.topk_ids[token * args.top_k + k];
    if (id < 0 || id >= args.num_experts) return -1;
    int32_t physical = id;
    if (args.placement != nullptr) {
      const int32_t* replicas = args.placement + id * args.num_replicas;
      int64_t count = 0;
      while (count < args.num_replicas && replicas[count] >= 0) ++count;
      if (count == 0) return -1;
      physical = replicas[(token + args.ep_rank) % count];
    }
    return physical < args.ep_size * args.num_local_experts ? physical : -1;
  }
};

}  // namespace

Status ep_plan_cpu(const EpPlanArgs& args, const ThreadPool& pool) {
  const int64_t tokens = args.num_tokens, top_k = args.top_k, ranks = args.ep_size, local = args.num_local_experts;
  const int64_t chunks = args.num_chunks, buckets = chunks * ranks, width = 2 * chunks + local;
  const int64_t pieces = num_chunks(pool, tokens, std::max(items_of_work(kSlotGrain, top_k), buckets));
  // Of each piece: rows per bucket, then the same numbers as in args.counts.
  const int64_t per_piece = buckets + ranks * width;
  const Scratch<int32_t> scratch(pieces * per_piece);
  if (!scratch) return Status::kOutOfMemory;
  std::fill_n(scratch.get(), pieces * per_piece, 0);
  // The inverse of "chunk c is the tokens [T * c / C, T * (c + 1) / C)", whatever is rounded.
  const auto first_of = [&](int64_t chunk) { return tokens * chunk / chunks; };
  const auto chunk_of = [&](int64_t token) {
    int64_t chunk = token * chunks / tokens;
    while (chunk + 1 < chunks && token >= first_of(chunk + 1)) ++chunk;
    return chunk;
  };

  // 1. Where each slot is computed, and how many rows and pairs that makes.
  parallel_chunks(pool, tokens, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
    int32_t* rows = scratch.get() + piece * per_piece;
    int32_t* counts = rows + buckets;
    const Physical physical{args};
    for (int64_t t = begin, chunk = begin < end ? chunk_of(begin) : 0; t < end; ++t) {
      while (t >= first_of(chunk + 1)) ++chunk;
      int32_t* row_of_rank = args.slot_to_row + t * ranks;
      std::fill_n(row_of_rank, ranks, -1);
      for (int64_t k = 0; k < top_k; ++k) {
        const int32_t p = physical(t, k);
        args.physical_ids[t * top_k + k] = p;
        if (p < 0) continue;
        const int64_t rank = p / local;
        int32_t* count = counts + rank * width;
        ++count[chunks + chunk];
        ++count[2 * chunks + p % local];
        if (row_of_rank[rank] >= 0) continue;
        row_of_rank[rank] = 0;  // step 3 writes which
        ++rows[chunk * ranks + rank];
        ++count[chunk];
      }
    }
  });

  // 2. A count becomes the piece's first row of the bucket; the totals become the offsets.
  std::fill_n(args.counts, ranks * width, 0);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const int32_t* counts = scratch.get() + piece * per_piece + buckets;
    for (int64_t i = 0; i < ranks * width; ++i) args.counts[i] += counts[i];
  }
  int32_t next = 0;
  for (int64_t bucket = 0; bucket < buckets; ++bucket) {
    args.rank_offsets[bucket] = next;
    for (int64_t piece = 0; piece < pieces; ++piece) {
      int32_t& count = scratch.get()[piece * per_piece + bucket];
      const int32_t first = next;
      next += count;
      count = first;
    }
  }
  args.rank_offsets[buckets] = next;

  // 3. Place each row.
  parallel_chunks(pool, tokens, pieces, [&](int64_t piece, int64_t begin, int64_t end) {
    int32_t* next_row = scratch.get() + piece * per_piece;
    for (int64_t t = begin, chunk = begin < end ? chunk_of(begin) : 0; t < end; ++t) {
      while (t >= first_of(chunk + 1)) ++chunk;
      for (int64_t rank = 0; rank < ranks; ++rank) {
        int32_t& row = args.slot_to_row[t * ranks + rank];
        if (row < 0) continue;
        row = next_row[chunk * ranks + rank]++;
        args.row_to_slot[row] = static_cast<int32_t>(t * ranks + rank);
      }
    }
  });
  std::fill(args.row_to_slot + next, args.row_to_slot + tokens * std::min(top_k, ranks), -1);
  return Status::kOk;
}

}  // namespace moe
