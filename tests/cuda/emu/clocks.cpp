#include "emu/clocks.h"

#include <algorithm>
#include <array>

namespace emu {

namespace {

bool raise(std::vector<uint32_t>& to, const std::vector<uint32_t>& from) {
  if (to.size() < from.size()) to.resize(from.size());
  bool raised = false;
  for (size_t i = 0; i < from.size(); ++i) {
    raised |= from[i] > to[i];
    to[i] = std::max(to[i], from[i]);
  }
  return raised;
}

bool raise(Past& to, const Past& from) {
  bool raised = raise(to.seen, from.seen);
  raised |= raise(to.fenced, from.fenced);
  for (const auto& [cluster, past] : from.others) {
    PastPointer& known = to.others[cluster];
    const PastPointer both = known == nullptr ? past : merged(known, past);
    raised |= both != known;
    known = both;
  }
  return raised;
}

}  // namespace

PastPointer merged(const PastPointer& a, const PastPointer& b) {
  if (b == nullptr || a == b) return a;
  struct Known {
    PastPointer a, b, both;
  };
  static std::array<Known, 16> table;
  static size_t next = 0;
  for (const Known& known : table)
    if (known.a == a && known.b == b) return known.both;
  auto both = std::make_shared<Past>(*a);
  const PastPointer result = raise(*both, *b) ? both : a;
  table[next++ % table.size()] = {a, b, result};
  return result;
}

PastPointer without_others(const PastPointer& past) {
  if (past->others.empty()) return past;
  auto copy = std::make_shared<Past>(*past);
  copy->others.clear();
  return copy;
}

void Clock::fence_proxy() {
  static PastPointer last, fenced_last;
  if (last != past) {
    auto copy = std::make_shared<Past>(*past);
    copy->fenced = copy->seen;
    last = past;
    fenced_last = copy;
  }
  past = fenced_last;
  own_fenced = time++;
}

void Meeting::add(const Clock& clock) {
  if (last_ != clock.past) {
    raise(sum_, *clock.past);
    last_ = clock.past;
  }
  sum_.seen[clock.own] = std::max(sum_.seen[clock.own], clock.time);
  sum_.fenced[clock.own] = std::max(sum_.fenced[clock.own], clock.own_fenced);
  published_ = nullptr;
}

void Meeting::note(uint32_t thread, uint32_t time) {
  if (sum_.seen.size() <= thread) {
    sum_.seen.resize(thread + 1);
    sum_.fenced.resize(thread + 1);
  }
  sum_.seen[thread] = time;
  published_ = nullptr;
}

PastPointer Meeting::past() {
  if (published_ == nullptr && !sum_.seen.empty()) published_ = std::make_shared<Past>(sum_);
  return published_;
}

}  // namespace emu
