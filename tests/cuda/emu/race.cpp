// The race checker: a happens-before check of every access to shared memory; race_global.cpp has global memory. The
// hooks (hooks.cpp) and the emulated instructions report accesses; barriers, mbarriers and waits report order.
#include "emu/state.h"

namespace emu {

#ifdef EMU_RACE
bool checks_races = true;
#else
bool checks_races = false;
#endif
bool sees_memory_accesses() { return checks_races; }

namespace {

constexpr const char* kUnordered = "another thread's store without a barrier in between";
const char* writer_kind(uint8_t state) {
  if (state == kInFlight) return "an asynchronous copy that is still in flight";
  if (state == kAsyncWritten) return "an asynchronous copy whose completion this thread has not waited for";
  return kUnordered;
}

uint32_t now(const Fiber* f) { return f->clock.time; }

void check(Block* b, uint32_t address, size_t bytes, bool write, bool async, const char* what, const Where& where,
           bool atomic = false) {
  const Fiber* f = current;
  const uint32_t me = f->id();
  const char* verb = write ? "writes" : "reads";
  for (size_t i = 0; i < bytes; ++i) {
    const Shadow& s = b->shadow[address - kSmemBase + i];
    const uint32_t at = address + static_cast<uint32_t>(i);
    const bool among_atomics = atomic && s.state == kAtomic;  // they need no order
    const uint32_t writer = among_atomics ? s.plain_writer : s.writer;
    const uint32_t write_time = among_atomics ? s.plain_time : s.write_time;
    if (s.state == kUnwritten && (!write || atomic))
      fail(where, "RACE: %s reads shared byte 0x%x, which was never written", what, at);
    if (s.state == kInFlight)
      fail(where, "RACE: %s %s shared byte 0x%x, the target of %s", what, verb, at, writer_kind(kInFlight));
    if (write && s.async_readers)
      fail(where, "RACE: %s writes shared byte 0x%x while an asynchronous operation (wgmma, bulk store) reads it", what,
           at);
    if (s.state != kUnwritten && writer != me && f->clock.seen(writer) < write_time)
      fail(where, "RACE: %s %s shared byte 0x%x, written by %s (thread %u)", what, verb, at, writer_kind(s.state),
           writer);
    if (async && s.state == kWritten && f->clock.fenced(s.writer) < s.write_time)
      fail(where,
           "RACE: %s accesses shared byte 0x%x, an ordinary store of thread %d, without fence.proxy.async between",
           what, at, s.writer);
    if (!write) continue;
    for (int k = 0; k < 2; ++k)
      if (s.read_time[k] && s.reader[k] != me && f->clock.seen(s.reader[k]) < s.read_time[k])
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
    if (state != kAtomic) {
      s.plain_writer = s.writer;
      s.plain_time = time;
    }
    s.read_time[0] = s.read_time[1] = 0;
  }
}

}  // namespace

uint32_t Fiber::id() const {
  return static_cast<uint32_t>(thread + static_cast<int>(block->rank) * block->num_threads);
}

void clocks_init(Cluster& c) {
  if (!checks_races) return;
  auto nothing = std::make_shared<Past>();
  nothing->seen.assign(static_cast<size_t>(c.num_threads) + c.blocks.size() * kMaxMbarriers, 0);
  nothing->fenced = nothing->seen;
  for (auto& b : c.blocks)
    for (Fiber& f : b->fibers) f.clock = {nothing, f.id(), 1, 0};
}

void release_to(Meeting& meeting) {
  if (!checks_races) return;
  meeting.add(current->clock);
  ++current->clock.time;
}
void join_lanes(Warp* w, uint32_t lanes) {
  if (!checks_races) return;
  Meeting meeting;
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) meeting.add(w->lanes[l].clock);
  for (int l = 0; l < 32; ++l)
    if (lanes >> l & 1) {
      w->lanes[l].clock.past = meeting.past();
      ++w->lanes[l].clock.time;
    }
}
void race_proxy_fence() {
  if (checks_races) current->clock.fence_proxy();
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
  else
    race_global_read(p, bytes, where);
}

void note_atomic(const void* p, size_t bytes) {
  if (!checks_races || current == nullptr) return;
  for (auto& b : current->block->cluster->blocks) {
    const ptrdiff_t o = static_cast<const char*>(p) - b->arena;
    if (o < 0 || o >= static_cast<ptrdiff_t>(kSmemSize)) continue;
    const uint32_t address = kSmemBase + static_cast<uint32_t>(o);
    check(b.get(), address, bytes, true, false, "atomic", hook_where(), true);
    return mark_write(b.get(), address, bytes, kAtomic, current->id(), now(current));
  }
  note_global_atomic(p, bytes, hook_where());
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
}  // namespace emu
