// route and its backward: tokens to threads; the work on a token is in route/, once per instruction set.
#include "moe/route.h"

#include <atomic>

#include "moe/isa.h"
#include "parallel.h"
#include "route/kernels.h"

namespace moe {

#define MOE_ROUTE_KERNELS(name)               \
  namespace name {                            \
  template <typename Storage>                 \
  const RouteKernels<Storage>& route_table(); \
  }
#include "route/kernels.inc"
#undef MOE_ROUTE_KERNELS

template <typename Storage>
const RouteKernels<Storage>& route_kernels() {
  bool reached = false;  // the instruction set in use, or one that is weaker
  for (const std::string_view isa : available_isas()) {
    reached = reached || isa == isa_name();
#define MOE_ROUTE_KERNELS(name) \
  if (reached && isa == #name) return name::route_table<Storage>();
#include "route/kernels.inc"
#undef MOE_ROUTE_KERNELS
  }
  return scalar::route_table<Storage>();
}

namespace {

// Logits that are worth a thread.
constexpr int64_t kLogitGrain = 1 << 13;

// Calls run(kernels, begin, end, workspace) for runs of tokens that cover them all.
template <typename Args, typename Run>
Status for_tokens(const Args& args, const ThreadPool& pool, const Run& run) {
  const int64_t chunks = num_chunks(pool, args.num_tokens, items_of_work(kLogitGrain, args.num_experts));
  return dispatch(args.dtype, [&]<typename T>(std::type_identity<T>) {
    using Work = RouteWorkspace<Wide<T>>;
    const int64_t stride = Work::stride(args.num_experts, args.top_k);
    const Scratch<Wide<T>> reals(chunks * Work::kRealRows * stride);
    const Scratch<int32_t> ints(chunks * Work::kIntRows * stride);
    if (!reals || !ints) return Status::kOutOfMemory;
    const RouteKernels<T>& kernels = route_kernels<T>();
    parallel_chunks(pool, args.num_tokens, chunks, [&](int64_t chunk, int64_t begin, int64_t end) {
      run(kernels, begin, end, Work::of_chunk(chunk, stride, reals.get(), ints.get()));
    });
    return Status::kOk;
  });
}

}  // namespace

Status route_cpu(const RouteArgs& args, const ThreadPool& pool) {
  std::atomic<bool> finite = true;
  const Status status = for_tokens(args, pool, [&](const auto& kernels, int64_t begin, int64_t end, const auto& work) {
    if (!kernels.forward(args, begin, end, work)) finite.store(false, std::memory_order_relaxed);
  });
  if (status != Status::kOk) return status;
  return finite ? Status::kOk : Status::kNonFiniteLogits;
}

Status route_backward_cpu(const RouteBackwardArgs& args, const ThreadPool& pool) {
  return for_tokens(args, pool, [&](const auto& kernels, int64_t begin, int64_t end, const auto& work) {
    kernels.backward(args, begin, end, work);
  });
}

}  // namespace moe
