// Global memory in the race checker: plain accesses of one launch to the same byte must be ordered, inside a block as
// for shared memory, and between blocks by releases and acquires of the same address.
#include "emu/state.h"

namespace emu {

namespace {

uint32_t launch_number = 0;
bool overlaps_previous = false;
std::unordered_map<const void*, std::map<uint32_t, Meeting>> released;  // by address, by cluster

uint32_t linear(uint3 block) { return block.x + gridDim.x * (block.y + gridDim.y * block.z); }

// Whether the current thread knows what a thread of some block did at that time.
bool happened_before(const GlobalShadow& s) {
  const Cluster* c = current->block->cluster;
  const uint32_t blocks = static_cast<uint32_t>(c->blocks.size()), cluster = s.block / blocks;
  const uint32_t thread = s.thread + s.block % blocks * static_cast<uint32_t>(current->block->num_threads);
  if (cluster == c->number) return current->clock.seen(thread) >= s.time;
  const auto& others = current->clock.past->others;
  const auto it = others.find(cluster);
  return it != others.end() && it->second->seen[thread] >= s.time;
}

void learn(Clock& clock, uint32_t from, const PastPointer& past) {
  const uint32_t mine = current->block->cluster->number;
  if (from == mine) return clock.learn(past);
  auto more = std::make_shared<Past>(*clock.past);
  more->seen.assign(more->seen.size(), 0);
  more->fenced.assign(more->fenced.size(), 0);
  more->others = past->others;
  more->others[from] = without_others(past);
  if (const auto it = more->others.find(mine); it != more->others.end()) {
    clock.learn(it->second);
    more->others.erase(it);
  }
  clock.learn(more);
}

// A launch with overlap_previous may run beside the one before it until grid_dependency_wait().
void check_early(const Region& r, size_t begin, size_t end, const char* verb, const Where& where) {
  if (!overlaps_previous || current->waited_for_previous_grid || launch_number <= 1) return;
  for (size_t i = begin; i < end; ++i)
    if (r.shadow[i].launch == launch_number - 1)
      fail(where, "RACE: %s global memory that the previous kernel writes, before grid_dependency_wait()", verb);
}

struct Range {
  Region* region;
  size_t begin, end;
};
Range find_range(const void* p, size_t bytes) {
  Region* r = checks_races && current != nullptr ? find_region(p) : nullptr;
  if (r == nullptr) return {nullptr, 0, 0};
  const size_t begin = static_cast<size_t>(static_cast<const char*>(p) - r->base);
  return {r, begin, std::min(begin + bytes, r->bytes)};
}

}  // namespace

void race_early(const void* p, size_t bytes, const char* verb, const Where& where) {
  const auto [r, begin, end] = find_range(p, bytes);
  if (r != nullptr && !r->shadow.empty()) check_early(*r, begin, end, verb, where);
}

void race_global_read(const void* p, size_t bytes, const Where& where) {
  const auto [r, begin, end] = find_range(p, bytes);
  if (r == nullptr || r->shadow.empty()) return;
  check_early(*r, begin, end, "reads", where);
  for (size_t i = begin; i < end; ++i) {
    const GlobalShadow& s = r->shadow[i];
    if (s.launch == launch_number && !happened_before(s))
      fail(where, "RACE: reads byte %zu of a buffer, written in this launch by block %u thread %u, without an order", i,
           s.block, s.thread);
  }
}

void race_global_write(const void* p, size_t bytes, const char* what, const Where& where) {
  const auto [r, begin, end] = find_range(p, bytes);
  if (r == nullptr) return;
  if (r->shadow.empty()) r->shadow.resize(r->bytes);
  check_early(*r, begin, end, "writes", where);
  const GlobalShadow mine{launch_number, linear(current->block->index), current->clock.time,
                          static_cast<uint16_t>(current->thread)};
  for (size_t i = begin; i < end; ++i) {
    GlobalShadow& s = r->shadow[i];
    if (s.launch == launch_number && !happened_before(s))
      fail(where, "RACE: %s writes byte %zu of a buffer, already written in this launch by block %u thread %u", what, i,
           s.block, s.thread);
    s = mine;
    if (!r->writes.empty() && r->writes[i] < 255) ++r->writes[i];
  }
}

void note_release(const void* p) {
  if (!checks_races) return;
  released[p][current->block->cluster->number].add(current->clock);
  ++current->clock.time;
}
void note_acquire(const void* p) {
  if (!checks_races) return;
  if (const auto it = released.find(p); it != released.end())
    for (auto& [cluster, meeting] : it->second) learn(current->clock, cluster, meeting.past());
}

// __threadfence() is one half: a release with the next atomics of this thread, an acquire with those before it.
void note_fence() {
  if (!checks_races) return;
  for (const auto& [cluster, past] : current->unfenced) learn(current->clock, cluster, past);
  current->unfenced.clear();
  current->fence = current->clock;
  ++current->clock.time;
}
void note_global_atomic(const void* p, size_t bytes, const Where& where) {
  race_early(p, bytes, "changes", where);
  if (const auto it = released.find(p); it != released.end())
    for (auto& [cluster, meeting] : it->second) current->unfenced.emplace_back(cluster, meeting.past());
  if (current->fence.past != nullptr) released[p][current->block->cluster->number].add(current->fence);
}

void grid_dependency_wait() { current->waited_for_previous_grid = true; }
void race_new_launch(bool overlaps) {
  ++launch_number;
  overlaps_previous = overlaps;
  released.clear();
}

}  // namespace emu
