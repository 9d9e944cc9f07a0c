// The race checker: a happens-before check of every access to shared memory, and of writes to global memory. The hooks
// (hooks.cpp) and the emulated instructions report accesses; barriers, mbarriers and waits report order.
#include "emu/state.h"

namespace emu {

#ifdef EMU_RACE
bool checks_races = true;
#else
bool checks_races = false;
#endif
bool sees_memory_accesses() { return checks_races; }

namespace {

uint32_t launch_number = 0;
bool overlaps_previous = false;

constexpr const char* kUnordered = "another thread's store without a barrier in between";
const char* writer_kind(uint8_t state) {
  if (state == kInFlight) return "an asynchronous copy that is still in flight";
  if (state == kAsyncWritten) return "an asynchronous copy whose completion this thread has not waited for";
  return kUnordered;
}

uint32_t now(const Fiber* f) { return f->clocks.seen[f->id()]; }

void check(Block* b, uint32_t address, size_t bytes, bool write, bool async, const char* what, const Where& where) {
  const Fiber* f = current;
  const uint32_t me = f->id();
  const auto& seen = f->clocks.seen;
  const char* verb = write ? "writes" : "reads";
  for (size_t i = 0; i < bytes; ++i) {
    const Shadow& s = b->shadow[address - kSmemBase + i];
    const uint32_t at = address + static_cast<uint32_t>(i);
    if (s.state == kUnwritten && !write)
      fail(where, "RACE: %s reads shared byte 0x%x, which was never written", what, at);
    if (s.state == kInFlight)
      fail(where, "RACE: %s %s shared byte 0x%x, the target of %s", what, verb, at, writer_kind(kInFlight));
    if (write && s.async_readers)
      fail(where, "RACE: %s writes shared byte 0x%x while an asynchronous operation (wgmma, bulk store) reads it", what,
           at);
    if (s.state != kUnwritten && s.writer != me && seen[s.writer] < s.write_time)
      fail(where, "RACE: %s %s shared byte 0x%x, written by %s (thread %d)", what, verb, at, writer_kind(s.state),
           s.writer);
    if (async && s.state == kWritten && f->clocks.fenced[s.writer] < s.write_time)
      fail(where,
           "RACE: %s accesses shared byte 0x%x, an ordinary store of thread %d, without fence.proxy.async between",
           what, at, s.writer);
    if (!write) continue;
    for (int k = 0; k < 2; ++k)
      if (s.read_time[k] && s.reader[k] != me && seen[s.reader[k]] < s.read_time[k])
        fail(where, "RACE: %s overwrites shared byte 0x%x, which thread %d has read, without a barrier in between",
             what, at, s.reader[k]);
  }
}

void mark_read(Block* b, uint32_t address, size_t bytes, uint32_t by, uint32_t time) {
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& s = b->shadow[address - kSmemBase + i];
    const int k = s.reader[0] == by || !s.read_time[0] ? 0 : s.reader[1] == by || !s.read_time[1] ? 1 : random_below(2);
    s.reader[k] = static_cast<uint16_t>(by);
    s.read_time[k] = time;
  }
}
void mark_write(Block* b, uint32_t address, size_t bytes, ShadowState state, uint32_t by, uint32_t time) {
  for (size_t i = 0; i < bytes; ++i) {
    Shadow& s = b->shadow[address - kSmemBase + i];
    s.state = state;
    s.writer = static_cast<uint16_t>(by);
    s.write_time = time;
    s.read_time[0] = s.read_time[1] = 0;
  }
}

uint32_t linear(uint3 block) { return block.x + gridDim.x * (block.y + gridDim.y * block.z); }

}  // namespace

uint32_t Fiber::id() const {
  return static_cast<uint32_t>(thread + static_cast<int>(block->rank) * block->num_threads);
}

void Clocks::join(const Clocks& other) {
  if (seen.size() < other.seen.size()) {
    seen.resize(other.seen.size());
    fenced.resize(other.seen.size());
  }
  for (size_t i = 0; i < other.seen.size(); ++i) {
    seen[i] = std::max(seen[i], other.seen[i]);
    fenced[i] = std::max(fenced[i], other.fenced[i]);
  }
}

void clocks_init(Fiber& f) {
  if (!checks_races) return;
  const Cluster* c = f.block->cluster;
  const size_t n = static_cast<size_t>(c->num_threads) + c->blocks.size() * kMaxMbarriers;
  f.clocks.seen.assign(n, 0);
  f.clocks.fenced.assign(n, 0);
  f.clocks.seen[f.id()] = 1;
}

void release_to(Clocks& clocks) {
  if (!checks_races) return;
  clocks.join(current->clocks);
  ++current->clocks.seen[current->id()];
}
void acquire_from(const Clocks& clocks) {
  if (checks_races) current->clocks.join(clocks);
}
void join_lanes(Warp* w, uint32_t lanes) {
  if (!checks_races) return;
  Clocks all;
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) all.join(w->lanes[l].clocks);
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) {
      w->lanes[l].clocks = all;
      ++w->lanes[l].clocks.seen[w->lanes[l].id()];
    }
}
void race_proxy_fence() {
  if (!checks_races) return;
  Clocks& c = current->clocks;
  c.fenced = c.seen;
  ++c.seen[current->id()];
}

void race_access(Block* b, uint32_t address, size_t bytes, bool write, const char* what, const Where& where) {
  if (!checks_races) return;
  check(b, address, bytes, write, false, what, where);
  if (write)
    mark_write(b, address, bytes, kWritten, current->id(), now(current));
  else
    mark_read(b, address, bytes, current->id(), now(current));
}

void race_pointer(const void* p, size_t bytes, bool write, const Where& where) {
  if (!checks_races || current == nullptr) return;
  const char* c = static_cast<const char*>(p);
  for (auto& b : current->block->cluster->blocks) {
    const ptrdiff_t o = c - b->arena;
    if (o < 0 || o >= static_cast<ptrdiff_t>(kSmemSize)) continue;
    return race_access(b.get(), kSmemBase + static_cast<uint32_t>(o), bytes, write, write ? "st.shared" : "ld.shared",
                       where);
  }
  if (write)
    race_global_write(p, bytes, "st.global", where);
  else if (overlaps_previous && !current->waited_for_previous_grid)
    race_global_early(p, bytes, "reads", where);
}

// A launch with overlap_previous may run beside the one before it until grid_dependency_wait().
void race_global_early(const void* p, size_t bytes, const char* verb, const Where& where) {
  Region* r = find_region(p);
  if (r == nullptr || r->shadow.empty()) return;
  const size_t o = static_cast<size_t>(static_cast<const char*>(p) - r->base);
  for (size_t i = o; i < std::min(o + bytes, r->bytes); ++i)
    if (r->shadow[i].launch == launch_number - 1 && launch_number > 1)
      fail(where, "RACE: %s global memory that the previous kernel writes, before grid_dependency_wait()", verb);
}

void note_atomic(const void* p, size_t bytes) {
  if (!checks_races || current == nullptr) return;
  for (auto& b : current->block->cluster->blocks) {
    const ptrdiff_t o = static_cast<const char*>(p) - b->arena;
    if (o < 0 || o >= static_cast<ptrdiff_t>(kSmemSize)) continue;
    const uint32_t address = kSmemBase + static_cast<uint32_t>(o);
    if (b->shadow[o].state != kAtomic) check(b.get(), address, bytes, true, false, "atomic", hook_where());
    mark_write(b.get(), address, bytes, kAtomic, current->id(), now(current));
  }
}
void note_acquire(const void*) {}
void note_release(const void*) {}
void grid_dependency_wait() { current->waited_for_previous_grid = true; }

// Two threads that write the same byte in one launch without an order between them. Reads are not checked.
void race_global_write(const void* p, size_t bytes, const char* what, const Where& where) {
  if (!checks_races || current == nullptr) return;
  Region* r = find_region(p);
  if (r == nullptr) return;
  if (overlaps_previous && !current->waited_for_previous_grid) race_global_early(p, bytes, "writes", where);
  if (r->shadow.empty()) r->shadow.resize(r->bytes);
  const size_t begin = static_cast<size_t>(static_cast<const char*>(p) - r->base);
  const uint32_t block = linear(current->block->index);
  const auto& seen = current->clocks.seen;
  for (size_t i = begin; i < std::min(begin + bytes, r->bytes); ++i) {
    GlobalShadow& s = r->shadow[i];
    if (s.launch == launch_number) {
      const bool same_block = s.block == block;
      if (!same_block ||
          (s.thread != current->thread &&
           seen[s.thread + current->block->rank * static_cast<uint32_t>(current->block->num_threads)] < s.time))
        fail(where, "RACE: %s writes byte %zu of a buffer, already written in this launch by block %u thread %u", what,
             i, s.block, s.thread);
    }
    s = {launch_number, block, now(current), static_cast<uint16_t>(current->thread)};
    if (!r->writes.empty() && r->writes[i] < 255) ++r->writes[i];
  }
}

void race_issue_write(Block* b, uint32_t address, size_t bytes, bool async_proxy, const char* what,
                      const Where& where) {
  if (!checks_races) return;
  check(b, address, bytes, true, async_proxy, what, where);
  mark_write(b, address, bytes, kInFlight, current->id(), now(current));
}
void race_copy_done(Block* b, uint32_t address, size_t bytes, Fiber* by) {
  if (checks_races) mark_write(b, address, bytes, kWritten, by->id(), now(by));
}
void race_tma_done(Block* b, uint32_t address, size_t bytes, const Mbarrier& m) {
  if (checks_races) mark_write(b, address, bytes, kAsyncWritten, m.id, m.phase + 1);
}
void race_issue_read(Block* b, uint32_t address, size_t bytes, const char* what, const Where& where) {
  if (!checks_races) return;
  check(b, address, bytes, false, true, what, where);
  for (size_t i = 0; i < bytes; ++i) ++b->shadow[address - kSmemBase + i].async_readers;
}
void race_read_done(Block* b, uint32_t address, size_t bytes, Fiber* by) {
  if (!checks_races) return;
  for (size_t i = 0; i < bytes; ++i) --b->shadow[address - kSmemBase + i].async_readers;
  mark_read(b, address, bytes, by->id(), now(by));
}
void race_probe_async(Block* b, uint32_t address, size_t bytes, const char* what, const Where& where) {
  if (checks_races) check(b, address, bytes, false, true, what, where);
}
void race_new_launch(bool overlaps) {
  ++launch_number;
  overlaps_previous = overlaps;
}

}  // namespace emu
