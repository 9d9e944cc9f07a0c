#include "moe/experts.h"

#include "experts.h"
#include "gate_up.h"
#include "reduce_to_tokens.h"

namespace moe {
namespace {

template <typename Storage>
bool forward(const ExpertsArgs& args, const ThreadPool& pool) {
  const Experts<Storage> experts(args.layer);
  const std::vector<Storage> zeros(static_cast<size_t>(experts.hidden));
  Storage* saved = static_cast<Storage*>(args.pre_activation);
  if (saved != nullptr) {
    advise_huge_pages(saved, static_cast<size_t>(experts.rows * experts.pre_activation) * sizeof(Storage));
    zero_unowned_rows(experts, experts.pre_activation, saved);
  }

  // 1. H and A, X gathered on the way.
  const Scratch<Storage> activated(experts.rows * experts.intermediate);
  if (!activated) return false;
  const auto hidden_rows = experts.gather(args.layer.hidden_states, zeros.data());
  if (!gate_up<Storage>(experts, {saved, activated.get(), hidden_rows.data()}, pool)) return false;

  // 2. Y, weighted and summed to tokens on the way.
  const auto activated_rows = experts.consecutive(activated.get(), experts.intermediate);
  const Storage* down_bias = static_cast<const Storage*>(args.layer.down_bias);
  return reduce_to_tokens<Storage>(experts,
                                   {static_cast<Storage*>(args.output), activated_rows.data(),
                                    &Experts<Storage>::down_proj, false, down_bias, true, experts.intermediate},
                                   pool);
}

}  // namespace

Status experts_cpu(const ExpertsArgs& args, const ThreadPool& pool) {
  const bool ok = dispatch(args.layer.dtype,
                           [&]<typename Storage>(std::type_identity<Storage>) { return forward<Storage>(args, pool); });
  return ok ? Status::kOk : Status::kOutOfMemory;
}

Status routed_experts_cpu(const RoutedExpertsArgs& args, const ThreadPool& pool) {
  const Status status = plan_cpu(args.plan, pool);
  return status == Status::kOk ? experts_cpu(args.experts, pool) : status;
}

}  // namespace moe
