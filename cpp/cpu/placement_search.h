// Step 3 of placement.h: change few places, each time to lower the busiest rank.
#pragma once

#include <limits>

#include "placement_layout.h"

namespace moe {

// One change: place (rank, place) gets `expert`; an exchange gives what was there to (other_rank, other_place).
struct Change {
  int64_t rank = -1, place = 0;
  int32_t expert = -1;
  int64_t other_rank = -1, other_place = 0;
  int64_t moves = 0;
  double gain = 0.0;  // of the busiest rank, per move
};

class Search {
 public:
  explicit Search(Layout& layout) : layout_(layout) {}

  // Stops at the target, when no change helps, or when the next would pass max_moves (-1: no limit).
  void run(double target, int64_t max_moves) {
    int64_t left = max_moves < 0 ? std::numeric_limits<int64_t>::max() : max_moves;
    // Each step lowers the sorted rank loads, so the search ends by itself; the limit bounds the time of long tails.
    for (int64_t steps = 8 * layout_.ranks() * layout_.places(); steps > 0; --steps) {
      if (layout_.peak() <= target) return;
      best_ = {};
      find(left);
      if (best_.rank < 0) return;
      left -= best_.moves;
      if (best_.other_rank >= 0) {
        layout_.exchange(best_.rank, best_.place, best_.other_rank, best_.other_place);
      } else {
        layout_.set(best_.rank, best_.place, best_.expert);
      }
    }
  }

 private:
  void find(int64_t left) {
    busiest_ = layout_.peak_rank();
    peak_ = layout_.rank_load(busiest_);
    left_ = left;
    for (int64_t place = 0; place < layout_.places(); ++place) {
      const int32_t expert = layout_.at(busiest_, place);
      if (expert < 0) continue;
      for (int64_t rank = 0; rank < layout_.ranks(); ++rank) {
        if (layout_.has(rank, expert)) continue;
        for (int64_t other = 0; other < layout_.places(); ++other) {
          const int32_t there = layout_.at(rank, other);
          try_exchange(place, expert, rank, other, there);
          if (there >= 0 && layout_.count(there) > 1) try_replacing(rank, other, there, expert);
        }
      }
      if (layout_.count(expert) == 1) continue;
      for (int32_t other = 0; other < layout_.experts(); ++other) {
        if (!layout_.has(busiest_, other)) try_replacing(busiest_, place, expert, other);
      }
    }
  }

  void try_exchange(int64_t place, int32_t expert, int64_t rank, int64_t other, int32_t there) {
    if (there >= 0 && layout_.has(busiest_, there)) return;
    const double difference = layout_.share(expert) - (there < 0 ? 0.0 : layout_.share(there));
    if (difference <= 0.0) return;
    offer({.rank = busiest_, .place = place, .other_rank = rank, .other_place = other, .moves = there < 0 ? 1 : 2},
          std::max(peak_ - difference, layout_.rank_load(rank) + difference));
  }

  // One replica of `out` becomes one of `in`: the other holders of `out` get more to do, those of `in` less.
  void try_replacing(int64_t rank, int64_t place, int32_t out, int32_t in) {
    const double more = layout_.share(out, -1) - layout_.share(out), less = layout_.share(in) - layout_.share(in, 1);
    double highest = layout_.rank_load(rank) - layout_.share(out) + layout_.share(in, 1);
    if (rank != busiest_) {
      highest = std::max(highest, peak_ - less + (layout_.has(busiest_, out) ? more : 0.0));
    }
    for (const int32_t holder : layout_.holders(out)) {
      if (highest >= peak_) return;
      if (holder == rank) continue;
      highest = std::max(highest, layout_.rank_load(holder) + more - (layout_.has(holder, in) ? less : 0.0));
    }
    offer({.rank = rank, .place = place, .expert = in, .moves = 1}, highest);
  }

  // `highest` is the largest load among the ranks that the change touches, the busiest one included.
  void offer(Change change, double highest) {
    change.gain = (peak_ - highest) / static_cast<double>(change.moves);
    if (change.moves > left_ || change.gain <= 1e-9 * peak_ || change.gain <= best_.gain) return;
    best_ = change;
  }

  Layout& layout_;
  Change best_;
  int64_t busiest_ = 0, left_ = 0;
  double peak_ = 0.0;
};

}  // namespace moe
