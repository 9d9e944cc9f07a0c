// ep_plan, ep_pack, ep_index and ep_reduce: every byte as the CPU core has it, whose own tests hold it against the
// reference.
#include <algorithm>
#include <array>
#include <limits>

#include "moe/ep_index.h"
#include "moe/ep_pack.h"
#include "moe/ep_plan.h"
#include "moe/ep_reduce.h"
#include "stages.h"

namespace moe::test {
namespace {

constexpr Wire kWires[] = {Wire::kInput, Wire::kFp8, Wire::kInt8};

// Of [-1, end + 1), and now and then what no plan would hold.
std::vector<int32_t> random_ids(int64_t n, int64_t end, uint32_t seed, bool garbage = false) {
  constexpr int32_t kExtremes[] = {std::numeric_limits<int32_t>::min(), std::numeric_limits<int32_t>::max(), -7};
  std::mt19937 engine(seed);
  std::vector<int32_t> ids(static_cast<size_t>(n));
  for (int32_t& id : ids) {
    id = static_cast<int32_t>(engine() % static_cast<uint32_t>(end + 2)) - 1;
    if (garbage && engine() % 4 == 0) id = kExtremes[engine() % std::size(kExtremes)];
  }
  return ids;
}

struct Exchange {
  int64_t num_tokens, num_experts, top_k, num_replicas, ep_size, ep_rank, num_local_experts, num_chunks;
  std::vector<int32_t> topk_ids, placement;  // placement empty: none

  int64_t rows() const { return num_tokens * std::min(top_k, ep_size); }
  EpPlanArgs args() const {
    EpPlanArgs a{};
    a.num_tokens = num_tokens, a.num_experts = num_experts, a.top_k = top_k, a.num_replicas = num_replicas;
    a.ep_size = ep_size, a.ep_rank = ep_rank, a.num_local_experts = num_local_experts, a.num_chunks = num_chunks;
    return a;
  }
};

struct ExchangePlan {
  std::vector<int32_t> physical_ids, rank_offsets, row_to_slot, slot_to_row, counts;
  explicit ExchangePlan(const Exchange& x)
      : physical_ids(unwritten<int32_t>(x.num_tokens * x.top_k)),
        rank_offsets(unwritten<int32_t>(x.num_chunks * x.ep_size + 1)),
        row_to_slot(unwritten<int32_t>(x.rows())),
        slot_to_row(unwritten<int32_t>(x.num_tokens * x.ep_size)),
        counts(unwritten<int32_t>(x.ep_size * (2 * x.num_chunks + x.num_local_experts))) {}
};

ExchangePlan cpu_plan(const Exchange& x) {
  ExchangePlan plan(x);
  EpPlanArgs a = x.args();
  a.physical_ids = plan.physical_ids.data(), a.rank_offsets = plan.rank_offsets.data();
  a.row_to_slot = plan.row_to_slot.data(), a.slot_to_row = plan.slot_to_row.data(), a.counts = plan.counts.data();
  a.topk_ids = x.topk_ids.data(), a.placement = x.placement.empty() ? nullptr : x.placement.data();
  CHECK(ep_plan_cpu(a, kPool<1>) == Status::kOk);
  return plan;
}

void check_plan(const Exchange& x) {
  const Context c("T " + std::to_string(x.num_tokens) + " K " + std::to_string(x.top_k) + " W " +
                  std::to_string(x.ep_size) + " C " + std::to_string(x.num_chunks));
  const ExchangePlan expected = cpu_plan(x);
  DeviceArray<int32_t> ids(x.topk_ids), placement(x.placement), physical(expected.physical_ids.size()),
      offsets(expected.rank_offsets.size()), row_to_slot(expected.row_to_slot.size()),
      slot_to_row(expected.slot_to_row.size()), counts(expected.counts.size());
  for (DeviceArray<int32_t>* a : {&physical, &row_to_slot, &slot_to_row}) {
    cudaMemset(a->data(), 0x77, a->size() * sizeof(int32_t));  // not -1, which is a result
  }
  {
    const WrittenOnce once(physical), once_offsets(offsets), once_rows(row_to_slot), once_slots(slot_to_row);
    run_on_device([&](const CudaContext& device) {
      EpPlanArgs a = x.args();
      a.physical_ids = physical.data(), a.rank_offsets = offsets.data(), a.row_to_slot = row_to_slot.data();
      a.slot_to_row = slot_to_row.data(), a.counts = counts.data(), a.topk_ids = ids.data();
      a.placement = x.placement.empty() ? nullptr : placement.data();
      return ep_plan_cuda(a, device);
    });
  }
  CHECK(physical.host() == expected.physical_ids);
  CHECK(offsets.host() == expected.rank_offsets);
  CHECK(row_to_slot.host() == expected.row_to_slot);
  CHECK(slot_to_row.host() == expected.slot_to_row);
  CHECK(counts.host() == expected.counts);
}

Exchange random_exchange(int64_t num_tokens, int64_t num_experts, int64_t top_k, int64_t ep_size, int64_t num_chunks,
                         uint32_t seed = 1) {
  const int64_t local = (num_experts + ep_size - 1) / ep_size;
  return {num_tokens, num_experts, top_k,
          1,          ep_size,     ep_size - 1,
          local,      num_chunks,  random_ids(num_tokens * top_k, num_experts, seed, seed % 2 == 0),
          {}};
}

TEST(ep_plan_equals_the_cpu) {
  for (const int64_t tokens : {0, 1, 150}) {
    for (const auto& [experts, top_k, ranks, chunks] : {std::array<int64_t, 4>{8, 2, 1, 1},
                                                        {10, 3, 4, 1},
                                                        {16, 4, 2, 5},
                                                        {9, 9, 3, 2},
                                                        {5, 2, 7, 3},
                                                        {12, 1, 3, 40}}) {
      for (uint32_t seed = 1; seed < 3; ++seed)
        check_plan(random_exchange(tokens, experts, top_k, ranks, chunks, seed));
    }
  }
}

// More ranks than a block has threads, and more counters than shared memory is asked for.
TEST(ep_plan_of_many_ranks) {
  check_plan(random_exchange(40, 600, 4, 300, 2));
  check_plan(random_exchange(30, 9000, 2, 3, 1));
  check_plan(random_exchange(200, 64, 8, 64, 3));
}

TEST(ep_plan_of_replicas) {
  for (const int64_t replicas : {1, 3}) {
    for (uint32_t seed = 1; seed < 5; ++seed) {
      Exchange x = random_exchange(90, 12, 3, 4, 2, seed);
      x.num_replicas = replicas, x.num_local_experts = 5;
      x.placement = random_ids(x.num_experts * replicas, 4 * 5, seed + 9, seed % 2 == 0);  // the last is out of range
      check_plan(x);
    }
  }
}

// Tokens in rows: what the packing operators of both sides are given.
struct Packing {
  EpRow row;
  int64_t num_rows, num_tokens, ep_size, num_local_experts;
  std::vector<int32_t> physical_ids, row_to_slot;  // row_to_slot empty: none
};

template <typename T>
EpPackArgs pack_args(const Packing& p, const T* tokens, const Wide<T>* weights, const int32_t* ids,
                     const int32_t* row_to_slot, uint8_t* rows) {
  return {.rows = rows,
          .hidden_states = tokens,
          .topk_weights = p.row.has_weights ? weights : nullptr,
          .physical_ids = p.row.has_ids ? ids : nullptr,
          .row_to_slot = p.row_to_slot.empty() ? nullptr : row_to_slot,
          .row = p.row,
          .num_rows = p.num_rows,
          .num_tokens = p.num_tokens,
          .ep_size = p.ep_size,
          .num_local_experts = p.num_local_experts};
}

template <typename T>
std::vector<uint8_t> cpu_pack(const Packing& p, const std::vector<T>& tokens, const std::vector<Wide<T>>& weights) {
  auto rows = unwritten<uint8_t>(p.num_rows * p.row.bytes());
  CHECK(ep_pack_cpu(
            pack_args<T>(p, tokens.data(), weights.data(), p.physical_ids.data(), p.row_to_slot.data(), rows.data()),
            kPool<1>) == Status::kOk);
  return rows;
}

// Calls fn(T, Packing) for every dtype, wire and width, with and without maps.
template <typename Fn>
void for_packings(const Fn& fn) {
  for_each_type([&]<typename T>(std::type_identity<T>) {
    for (const Wire wire : kWires) {
      for (const int64_t width : {0, 1, 67, 160}) {
        for (const bool mapped : {false, true}) {
          const int64_t tokens = 11, top_k = mapped ? 3 : 2, ranks = 4, local = 2;
          const Context c("wire " + std::to_string(static_cast<int>(wire)) + " width " + std::to_string(width) +
                          (mapped ? " mapped" : ""));
          const EpRow row{width, top_k, kDType<T>, wire, mapped || width % 2 == 0, mapped || width != 67};
          const int64_t rows = mapped ? 30 : tokens;
          fn(std::type_identity<T>{},
             Packing{row, rows, tokens, mapped ? ranks : 1, local, random_ids(tokens * top_k, ranks * local, 5, true),
                     mapped ? random_ids(rows, tokens * ranks, 6, true) : std::vector<int32_t>{}});
        }
      }
    }
  });
}

template <typename T>
std::vector<T> some_tokens(const Packing& p) {
  auto tokens = random_values<T>(p.num_tokens * p.row.hidden_size, 1);
  std::fill_n(tokens.begin(), p.row.hidden_size, T{});  // a row of zeros has scale 0
  return tokens;
}

TEST(ep_pack_writes_the_bytes_of_the_cpu) {
  for_packings([]<typename T>(std::type_identity<T>, const Packing& p) {
    const auto tokens = some_tokens<T>(p);
    const auto weights = random_values<Wide<T>>(p.num_tokens * p.row.top_k, 2);
    const auto expected = cpu_pack(p, tokens, weights);
    for (const int64_t offset : {0, 1}) {
      DeviceArray<T> tokens_in(tokens, offset);
      DeviceArray<Wide<T>> weights_in(weights, offset);
      DeviceArray<int32_t> ids(p.physical_ids), slots(p.row_to_slot);
      DeviceArray<uint8_t> rows(expected.size());
      const WrittenOnce once(rows);
      run_on_device([&](const CudaContext& device) {
        return ep_pack_cuda(pack_args<T>(p, tokens_in.data(), weights_in.data(), ids.data(), slots.data(), rows.data()),
                            device);
      });
      CHECK(rows.host() == expected);
    }
  });
}

// NaN, or infinity, in a token: every element that arrives is NaN, and other rows are what they were.
TEST(ep_pack_keeps_what_is_not_finite) {
  for (const Wire wire : {Wire::kFp8, Wire::kInt8}) {
    for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
      const EpRow row{40, 1, DType::kFloat32, wire, true, true};
      const Packing p{row, 3, 3, 1, 1, {0, 0, 0}, {}};
      auto tokens = random_values<float>(120, 1);
      tokens[40 + 33] = bad;
      DeviceArray<float> in(tokens), weights(std::vector<float>(3, 1.0f)), out(120), weights_out(3);
      DeviceArray<int32_t> ids(p.physical_ids), none(0), offsets(2), row_to_slot(3), slot_to_row(3);
      DeviceArray<uint8_t> rows(3 * row.bytes());
      run_on_device([&](const CudaContext& device) {
        return ep_pack_cuda(pack_args<float>(p, in.data(), weights.data(), ids.data(), none.data(), rows.data()),
                            device);
      });
      run_on_device([&](const CudaContext& device) {
        return ep_index_cuda({out.data(), weights_out.data(), offsets.data(), row_to_slot.data(), slot_to_row.data(),
                              rows.data(), row, 3, 1, 3},
                             device);
      });
      const auto got = out.host();
      for (size_t i = 0; i < got.size(); ++i) CHECK(std::isnan(got[i]) == (i / 40 == 1));
    }
  }
}

template <typename T>
struct Index {
  std::vector<T> hidden;
  std::vector<Wide<T>> weights;
  std::vector<int32_t> offsets, row_to_slot, slot_to_row;
  bool operator==(const Index& o) const {
    return same_bits(hidden, o.hidden) && same_bits(weights, o.weights) && offsets == o.offsets &&
           row_to_slot == o.row_to_slot && slot_to_row == o.slot_to_row;
  }
};

// With fewer pairs announced than there are, too. `shift` bytes before the first row.
template <typename T>
void check_index(const EpRow& row, const std::vector<uint8_t>& rows, int64_t num_rows, int64_t num_experts,
                 int64_t num_pairs, size_t shift) {
  Index<T> expected{unwritten<T>(num_rows * row.hidden_size), unwritten<Wide<T>>(num_rows * row.top_k),
                    unwritten<int32_t>(num_experts + 1), unwritten<int32_t>(num_pairs),
                    unwritten<int32_t>(num_rows * row.top_k)};
  CHECK(ep_index_cpu(
            {expected.hidden.data(), expected.weights.data(), expected.offsets.data(), expected.row_to_slot.data(),
             expected.slot_to_row.data(), rows.data(), row, num_rows, num_experts, num_pairs},
            kPool<1>) == Status::kOk);
  DeviceArray<uint8_t> in(rows, shift);
  DeviceArray<T> hidden(expected.hidden.size());
  DeviceArray<Wide<T>> weights(expected.weights.size());
  DeviceArray<int32_t> offsets(expected.offsets.size()), row_to_slot(expected.row_to_slot.size()),
      slot_to_row(expected.slot_to_row.size());
  cudaMemset(row_to_slot.data(), 0x77, row_to_slot.size() * sizeof(int32_t));
  {
    const WrittenOnce once(hidden), once_weights(weights), once_rows(row_to_slot), once_slots(slot_to_row);
    run_on_device([&](const CudaContext& device) {
      return ep_index_cuda({hidden.data(), weights.data(), offsets.data(), row_to_slot.data(), slot_to_row.data(),
                            in.data(), row, num_rows, num_experts, num_pairs},
                           device);
    });
  }
  CHECK((Index<T>{hidden.host(), weights.host(), offsets.host(), row_to_slot.host(), slot_to_row.host()} == expected));
}

TEST(ep_index_reads_what_was_packed) {
  for_packings([]<typename T>(std::type_identity<T>, const Packing& packed) {
    Packing p = packed;
    p.row.has_ids = p.row.has_weights = true;
    const auto rows = cpu_pack(p, some_tokens<T>(p), random_values<Wide<T>>(p.num_tokens * p.row.top_k, 2));
    const int64_t slots = p.num_rows * p.row.top_k;
    check_index<T>(p.row, rows, p.num_rows, p.num_local_experts, slots, 0);
    check_index<T>(p.row, rows, p.num_rows, p.num_local_experts, std::min<int64_t>(slots, 3), 5);
    check_index<T>(p.row, {}, 0, p.num_local_experts, 0, 0);
  });
}

// Bytes that nobody packed: ids and numbers can be anything.
TEST(ep_index_of_garbage) {
  std::mt19937 engine(3);
  const EpRow row{24, 3, DType::kBFloat16, Wire::kInput, true, true};
  std::vector<uint8_t> rows(static_cast<size_t>(50 * row.bytes()));
  for (uint8_t& byte : rows) byte = static_cast<uint8_t>(engine());
  check_index<BFloat16>(row, rows, 50, 3, 150, 0);
  check_index<BFloat16>(row, rows, 50, 3, 2, 1);
}

template <typename T>
void check_reduce(int64_t width, int64_t top_k, int64_t ranks, bool has_weights, size_t shift, bool garbage) {
  const int64_t tokens = 23, num_rows = 40, local = 3;
  const EpRow row{width, top_k, kDType<T>, Wire::kInput, false, has_weights};
  const Packing p{row, num_rows, num_rows, 1, 1, {}, {}};
  const auto rows = cpu_pack(p, random_values<T>(num_rows * width, 1), random_values<Wide<T>>(num_rows * top_k, 2));
  const auto maps = random_ids(tokens * ranks, num_rows, 3, garbage);
  const auto ids = random_ids(tokens * top_k, ranks * local, 4, garbage);
  auto output = unwritten<T>(tokens * width);
  auto weights = unwritten<Wide<T>>(has_weights ? tokens * top_k : 0);
  const auto args = [&](void* out, void* numbers, const uint8_t* in, const int32_t* slot_to_row,
                        const int32_t* physical) {
    return EpReduceArgs{out,
                        has_weights ? numbers : nullptr,
                        in,
                        slot_to_row,
                        has_weights ? physical : nullptr,
                        row,
                        num_rows,
                        tokens,
                        ranks,
                        local};
  };
  CHECK(ep_reduce_cpu(args(output.data(), weights.data(), rows.data(), maps.data(), ids.data()), kPool<1>) ==
        Status::kOk);
  DeviceArray<uint8_t> rows_in(rows, shift);
  DeviceArray<int32_t> maps_in(maps), ids_in(ids);
  DeviceArray<T> out(output.size());
  DeviceArray<Wide<T>> numbers(weights.size());
  const WrittenOnce once(out), once_numbers(numbers);
  run_on_device([&](const CudaContext& device) {
    return ep_reduce_cuda(args(out.data(), numbers.data(), rows_in.data(), maps_in.data(), ids_in.data()), device);
  });
  CHECK(same_bits(out.host(), output));
  CHECK(same_bits(numbers.host(), weights));
}

TEST(ep_reduce_sums_in_the_order_of_the_ranks) {
  for_each_type([]<typename T>(std::type_identity<T>) {
    for (const int64_t width : {0, 1, 16, 67}) {
      for (const int64_t ranks : {1, 2, 9}) {
        const Context c("width " + std::to_string(width) + " ranks " + std::to_string(ranks));
        check_reduce<T>(width, 3, ranks, true, 0, false);
        check_reduce<T>(width, 2, ranks, false, 0, true);
        check_reduce<T>(width, 3, ranks, true, 3, true);
      }
    }
  });
}

}  // namespace
}  // namespace moe::test
