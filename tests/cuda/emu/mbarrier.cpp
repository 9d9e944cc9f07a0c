// mbarrier. Its state is in a table beside the memory, and a magic number lies in the eight bytes, so that overwriting
// a barrier is noticed.
#include "emu/ptx_emu.h"
#include "emu/state.h"

namespace emu {

namespace {

uint64_t magic(uint32_t address) { return uint64_t{0xba55ba55} << 32 | address; }

Mbarrier& find(Block* b, uint32_t address, const Where& where) {
  const char* p = smem_pointer(b, address, 8, 8, where);
  const auto it = b->mbarriers.find(address);
  if (it == b->mbarriers.end()) fail(where, "mbarrier 0x%x is not initialised", address);
  uint64_t bytes;
  memcpy(&bytes, p, 8);
  if (bytes != magic(address)) fail(where, "mbarrier 0x%x was overwritten", address);
  return it->second;
}

// The pseudo thread of the barrier's copies: what they wrote is seen by who waits for this phase.
void note_copies(Mbarrier& m) {
  if (checks_races) m.arriving.note(m.id, m.phase + 1);
}

void arrive(Fiber* by, Mbarrier& m, uint32_t address, const Where& where) {
  // The manual asks it of every arrival. Those of another block of the cluster cannot end a phase by themselves where
  // the owner's threads arrive as well, so that its wait misses none: see hand_back in grouped_gemm_sm90_tile.cuh.
  if (!m.seen && by->block == m.block)
    fail(where, "mbarrier 0x%x: an arrival before any wait saw the end of the last phase", address);
  if (m.pending == 0) fail(where, "mbarrier 0x%x: more than the %u arrivals of a phase", address, m.expected);
  if (checks_races) {
    m.arriving.add(by->clock);
    ++by->clock.time;
    note_copies(m);
  }
  --m.pending;
  mbar_advance(m);
}

}  // namespace

void mbar_advance(Mbarrier& m) {
  if (m.pending || m.bytes) return;
  ++m.phase;
  m.pending = m.expected;
  m.seen = false;
  if (checks_races) m.done = m.arriving.past();
  for (Fiber* f : m.waiting) make_ready(f);
  m.waiting.clear();
}

void mbar_check(uint32_t address, const Where& where) {
  Block* b = owner_of(address, where);
  find(b, local(address), where);
}

void mbar_init(uint32_t address, uint32_t arrivals, const Where& where) {
  Block* b = current->block;
  char* p = smem_pointer(b, address, 8, 8, where);
  if (arrivals == 0 || arrivals >= 1u << 20) fail(where, "mbarrier.init with %u arrivals", arrivals);
  if (b->mbarriers.count(address)) fail(where, "mbarrier 0x%x is initialised already", address);
  race_access(b, address, 8, true, "mbarrier.init", where);
  Cluster* c = b->cluster;
  if (b->mbarriers.size() >= kMaxMbarriers || c->num_mbarriers >= kMaxMbarriers * c->blocks.size())
    fail(where, "more than %u mbarriers", kMaxMbarriers);
  Mbarrier& m = b->mbarriers[address];
  m.block = b;
  m.expected = m.pending = arrivals;
  m.id = static_cast<uint32_t>(c->num_threads) + c->num_mbarriers++;
  const uint64_t bytes = magic(address);
  memcpy(p, &bytes, 8);
}

void mbar_inval(uint32_t address, const Where& where) {
  Mbarrier& m = find(current->block, address, where);
  if (!m.waiting.empty()) fail(where, "mbarrier.inval while threads wait for 0x%x", address);
  race_access(current->block, address, 8, true, "mbarrier.inval", where);
  current->block->mbarriers.erase(address);
}

void mbar_arrive(uint32_t address, uint32_t bytes, bool arrives, const Where& where) {
  yield_point();
  Block* b = owner_of(address, where);
  Mbarrier& m = find(b, local(address), where);
  race_access(b, local(address), 8, false, "mbarrier.arrive", where);
  m.bytes += bytes;
  if (m.bytes >= int64_t{1} << 20) fail(where, "mbarrier 0x%x: 2^20 bytes or more to come", address);
  if (arrives) arrive(current, m, address, where);
}

void mbar_arrive_by(Fiber* by, uint32_t address, const Where& where) {
  arrive(by, find(by->block, local(address), where), address, where);
}

void mbar_bytes_arrived(Block* b, uint32_t address, uint32_t bytes) {
  Mbarrier& m = b->mbarriers.at(address);
  note_copies(m);
  m.bytes -= bytes;
  mbar_advance(m);
}

bool mbar_try_wait(uint32_t address, uint32_t parity, const Where& where) {
  spin();
  Mbarrier& m = find(current->block, address, where);
  race_access(current->block, address, 8, false, "mbarrier.try_wait", where);
  if ((m.phase & 1) == parity) return false;
  m.seen = true;
  if (checks_races) current->clock.learn(m.done);
  return true;
}

void mbar_wait(uint32_t address, uint32_t parity, const Where& where) {
  if (parity > 1) fail(where, "mbarrier parity %u", parity);
  yield_point();
  Mbarrier& m = find(current->block, address, where);
  race_access(current->block, address, 8, false, "mbarrier.try_wait", where);
  while ((m.phase & 1) == parity) {
    m.waiting.push_back(current);
    current->wait_format = "0x%llx parity %lld (then in phase %lld, %lld of %lld arrivals and %lld bytes missing)";
    const long long detail[] = {address, parity, m.phase, m.pending, m.expected, m.bytes};
    memcpy(current->wait_detail, detail, sizeof detail);
    wait_for("mbarrier wait", where);
  }
  m.seen = true;
  if (checks_races) current->clock.learn(m.done);
}

void fence_proxy_async() {
  race_proxy_fence();
  yield_point();
}

uint32_t mapa(uint32_t address, uint32_t rank, const Where& where) {
  if (rank >= cluster_size()) fail(where, "mapa: rank %u of a cluster of %u", rank, cluster_size());
  return (rank + 1) * kSmemWindow + local(address);
}

}  // namespace emu
