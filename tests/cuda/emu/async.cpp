// The asynchronous engine: bulk copies that were issued and run later, in an order that the seed decides.
#include "emu/state.h"

namespace emu {

namespace {
std::vector<AsyncOp> pending;

void run(size_t i) {
  const AsyncOp op = std::move(pending[i]);
  pending.erase(pending.begin() + static_cast<ptrdiff_t>(i));
  op.run();
}
}  // namespace

void issue(AsyncOp op) { pending.push_back(std::move(op)); }
bool async_pending() { return !pending.empty(); }
void drop_async() { pending.clear(); }

void run_one_async() {
  // Mostly loads, so that stores stay late: otherwise a missing wait before their source is overwritten would not show.
  if (random_below(16)) {
    std::vector<size_t> loads;
    for (size_t i = 0; i < pending.size(); ++i)
      if (!pending[i].is_store) loads.push_back(i);
    if (!loads.empty()) return run(loads[random_below(static_cast<uint32_t>(loads.size()))]);
  }
  run(random_below(static_cast<uint32_t>(pending.size())));
}

void finish_stores(Fiber* f, int keep_groups) {
  const int end = f->bulk_group - keep_groups;
  for (size_t i = 0; i < pending.size();)
    if (pending[i].is_store && pending[i].owner == f && pending[i].group < end)
      run(i);
    else
      ++i;
  std::erase_if(f->bulk_reads, [&](const Fiber::BulkRead& r) {
    if (r.group >= end) return false;
    race_read_done(f->block, r.address, r.bytes, f);
    return true;
  });
}

void finish_block(Block* b) {
  for (size_t i = 0; i < pending.size();) {
    if (pending[i].owner->block != b) {
      ++i;
      continue;
    }
    if (!pending[i].is_store) {
      fprintf(stderr, "EMU ERROR in %s: block %u exits with a bulk load in flight\n", kernel_name, b->index.x);
      launch_failed = true;
      return;
    }
    run(i);
  }
}

}  // namespace emu
