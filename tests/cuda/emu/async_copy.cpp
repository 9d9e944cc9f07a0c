// cp.async. The destination becomes NaN at issue and the data arrives at the thread's own wait: a missing wait shows,
// and so does a copy into a buffer that is still being read.
#include "emu/ptx_emu.h"
#include "emu/state.h"

namespace emu {

static void arrive(Block* b, const Copy& c, Fiber* by) {
  char* d = b->arena + (c.dst - kSmemBase);
  memcpy(d, c.src, c.src_bytes);
  memset(d + c.src_bytes, 0, c.bytes - c.src_bytes);
  race_copy_done(b, c.dst, c.bytes, by);
}

void cp_async(uint32_t dst, const void* src, uint32_t bytes, uint32_t src_bytes, const Where& where) {
  char* d = smem_pointer(current->block, dst, bytes, bytes, where);
  if (src_bytes > bytes) fail(where, "cp.async: source size %u > %u", src_bytes, bytes);
  if (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes)
    fail(where, "cp.async: global address %p is not aligned to %u", src, bytes);
  race_issue_write(current->block, dst, bytes, false, "cp.async", where);
  race_global_read(src, src_bytes, where);
  memset(d, 0xff, bytes);
  const auto* s = static_cast<const volatile char*>(src);
  for (uint32_t i = 0; i < src_bytes; ++i) (void)s[i];  // an address sanitizer's report then names this line
  current->open_copies.push_back({dst, static_cast<const char*>(src), bytes, src_bytes, where});
}

void cp_async_commit() {
  current->copy_groups.push_back(std::move(current->open_copies));
  current->open_copies.clear();
}

void cp_async_wait(int keep) {
  auto& groups = current->copy_groups;
  const size_t done = groups.size() - std::min(groups.size(), static_cast<size_t>(keep));
  for (size_t i = 0; i < done; ++i)
    for (const Copy& c : groups[i]) arrive(current->block, c, current);
  groups.erase(groups.begin(), groups.begin() + static_cast<ptrdiff_t>(done));
  yield_point();
}

// All copies so far become the business of the mbarrier: they land and arrive there some time later.
void cp_async_mbar_arrive(uint32_t mbar, const Where& where) {
  std::vector<Copy> copies;
  for (auto& group : current->copy_groups) {
    copies.insert(copies.end(), group.begin(), group.end());
    group.clear();
  }
  copies.insert(copies.end(), current->open_copies.begin(), current->open_copies.end());
  current->open_copies.clear();
  std::erase_if(current->copy_groups, [](const auto& group) { return group.empty(); });
  Fiber* by = current;
  mbar_check(mbar, where);
  issue({[=] {
           for (const Copy& c : copies) arrive(by->block, c, by);
           mbar_arrive_by(by, mbar, where);
         },
         by, false, 0});
}

}  // namespace emu
