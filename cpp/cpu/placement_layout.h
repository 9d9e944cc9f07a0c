// A placement while it is being solved: places, replica counts and rank loads, kept consistent.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace moe {

class Layout {
 public:
  Layout(const std::vector<double>& load, int64_t ranks, int64_t places)
      : load_(&load), ranks_(ranks), places_(places) {
    expert_.assign(ranks * places, -1);
    where_.assign(static_cast<int64_t>(load.size()) * ranks, -1);
    holders_.resize(load.size());
    rank_load_.assign(ranks, 0.0);
    free_.assign(ranks, places);
  }

  int64_t ranks() const { return ranks_; }
  int64_t places() const { return places_; }
  int64_t experts() const { return static_cast<int64_t>(load_->size()); }
  int32_t at(int64_t rank, int64_t place) const { return expert_[rank * places_ + place]; }
  // The place that a rank has for an expert, or -1.
  int32_t place_of(int64_t rank, int64_t expert) const { return where_[expert * ranks_ + rank]; }
  bool has(int64_t rank, int64_t expert) const { return place_of(rank, expert) >= 0; }
  int64_t free_places(int64_t rank) const { return free_[rank]; }
  const std::vector<int32_t>& holders(int64_t expert) const { return holders_[expert]; }
  int64_t count(int64_t expert) const { return static_cast<int64_t>(holders_[expert].size()); }
  double rank_load(int64_t rank) const { return rank_load_[rank]; }
  // Load of one replica if there were `more` further ones.
  double share(int64_t expert, int64_t more = 0) const {
    return (*load_)[expert] / static_cast<double>(count(expert) + more);
  }

  int64_t peak_rank() const { return std::max_element(rank_load_.begin(), rank_load_.end()) - rank_load_.begin(); }
  double peak() const { return rank_load_[peak_rank()]; }

  // Puts an expert that the rank lacks at a place, in the stead of what is there.
  void set(int64_t rank, int64_t place, int32_t expert) {
    const int32_t before = at(rank, place);
    if (before >= 0) {
      where_[int64_t{before} * ranks_ + rank] = -1;
      std::erase(holders_[before], static_cast<int32_t>(rank));
      ++free_[rank];
    }
    expert_[rank * places_ + place] = expert;
    if (expert >= 0) {
      where_[int64_t{expert} * ranks_ + rank] = static_cast<int32_t>(place);
      std::vector<int32_t>& holders = holders_[expert];
      holders.insert(std::lower_bound(holders.begin(), holders.end(), rank), static_cast<int32_t>(rank));
      --free_[rank];
    }
    // Summed anew instead of adjusted: no error accumulates, and equal placements have equal loads.
    add_up(rank);
    if (before >= 0) add_up_holders(before);
    if (expert >= 0) add_up_holders(expert);
  }

  void exchange(int64_t rank_a, int64_t place_a, int64_t rank_b, int64_t place_b) {
    const int32_t a = at(rank_a, place_a), b = at(rank_b, place_b);
    set(rank_a, place_a, -1);
    set(rank_b, place_b, a);
    set(rank_a, place_a, b);
  }

  // The first empty place of a rank that has one.
  int64_t empty_place(int64_t rank) const {
    int64_t place = 0;
    while (at(rank, place) >= 0) ++place;
    return place;
  }

 private:
  void add_up(int64_t rank) {
    double sum = 0.0;
    for (int64_t place = 0; place < places_; ++place) {
      if (const int32_t expert = at(rank, place); expert >= 0) sum += share(expert);
    }
    rank_load_[rank] = sum;
  }
  void add_up_holders(int64_t expert) {
    for (const int32_t rank : holders_[expert]) add_up(rank);
  }

  const std::vector<double>* load_;  // [E]
  int64_t ranks_, places_;
  std::vector<int32_t> expert_;                // [ranks, places]
  std::vector<int32_t> where_;                 // [E, ranks]
  std::vector<std::vector<int32_t>> holders_;  // [E], ranks in order
  std::vector<double> rank_load_;              // [ranks]
  std::vector<int64_t> free_;                  // [ranks]
};

// Experts that come to a rank which did not hold them.
inline int64_t moves_between(const Layout& from, const Layout& to) {
  int64_t moves = 0;
  for (int64_t expert = 0; expert < to.experts(); ++expert) {
    for (const int32_t rank : to.holders(expert)) moves += !from.has(rank, expert);
  }
  return moves;
}

}  // namespace moe
