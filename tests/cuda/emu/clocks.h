// Vector clocks: what happens before what, for the race checker.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

namespace emu {

// What has happened before some moment. Threads that learnt the same share it: a barrier then costs as much as there
// are threads, not their square.
struct Past {
  std::vector<uint32_t> seen;  // by thread of the cluster, and by mbarrier for its copies: what it did up to this time
  std::vector<uint32_t> fenced;  // likewise, with a fence.proxy.async after it: TMA and wgmma may touch what it wrote
  std::map<uint32_t, std::shared_ptr<const Past>> others;  // by number of another cluster; their `others` are empty
};
using PastPointer = std::shared_ptr<const Past>;

// Both; the same pointer for the same arguments, most of the time.
PastPointer merged(const PastPointer& a, const PastPointer& b);
PastPointer without_others(const PastPointer& past);

// One thread: what it learnt from others, and its own time.
struct Clock {
  PastPointer past;
  uint32_t own = 0, time = 0, own_fenced = 0;

  uint32_t seen(uint32_t thread) const { return thread == own ? time : past->seen[thread]; }
  uint32_t fenced(uint32_t thread) const {
    return thread == own ? std::max(own_fenced, past->fenced[thread]) : past->fenced[thread];
  }
  void learn(const PastPointer& other) { past = merged(past, other); }
  void fence_proxy();
};

// Where threads meet (a barrier, an mbarrier, a global address): what all that came there did before.
class Meeting {
 public:
  void add(const Clock& clock);
  void note(uint32_t thread, uint32_t time);
  PastPointer past();  // null when nobody came
  void clear() { *this = {}; }

 private:
  Past sum_;
  PastPointer last_, published_;
};

}  // namespace emu
