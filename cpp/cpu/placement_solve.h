// One layer on one node (or on all ranks, when nodes do not matter): a fresh placement, or one near the present.
#pragma once

#include <numeric>

#include "placement_search.h"

namespace moe {

// A fresh solution this near to a perfect balance is searched no further.
constexpr double kNearPerfect = 1e-3;

// Step 2: how many replicas each expert gets.
inline std::vector<int64_t> replicate(const std::vector<double>& load, int64_t ranks, int64_t num_physical) {
  const int64_t experts = static_cast<int64_t>(load.size());
  std::vector<int64_t> count(experts, 1);
  for (int64_t extra = num_physical - experts; extra > 0; --extra) {
    int64_t busiest = -1;
    for (int64_t e = 0; e < experts; ++e) {
      if (count[e] == ranks) continue;
      if (busiest < 0 || load[e] / count[e] > load[busiest] / count[busiest]) busiest = e;
    }
    ++count[busiest];
  }
  return count;
}

// Step 2: where they go.
inline Layout pack(const std::vector<double>& load, int64_t ranks, int64_t places, const std::vector<int64_t>& count) {
  std::vector<int32_t> order(load.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t a, int32_t b) { return load[a] / count[a] > load[b] / count[b]; });
  std::vector<std::vector<int32_t>> on(ranks);
  std::vector<double> sum(ranks, 0.0);
  const auto has = [&](int64_t rank, int32_t expert) {
    return std::find(on[rank].begin(), on[rank].end(), expert) != on[rank].end();
  };
  const auto least = [&](const auto& allowed) {
    int64_t best = -1;
    for (int64_t rank = 0; rank < ranks; ++rank) {
      if (allowed(rank) && (best < 0 || sum[rank] < sum[best])) best = rank;
    }
    return best;
  };
  const auto room = [&](int64_t rank) { return static_cast<int64_t>(on[rank].size()) < places; };
  for (const int32_t expert : order) {
    for (int64_t replica = 0; replica < count[expert]; ++replica) {
      const double share = load[expert] / count[expert];
      int64_t rank = least([&](int64_t r) { return room(r) && !has(r, expert); });
      if (rank < 0) {
        // Every rank with room has this expert. A full rank without it holds something that such a rank lacks: the one
        // has more experts than the other.
        const int64_t roomy = least(room);
        rank = least([&](int64_t r) { return !has(r, expert); });
        const auto given = std::find_if(on[rank].begin(), on[rank].end(), [&](int32_t e) { return !has(roomy, e); });
        const double moved = load[*given] / count[*given];
        on[roomy].push_back(*given);
        on[rank].erase(given);
        sum[roomy] += moved;
        sum[rank] -= moved;
      }
      on[rank].push_back(expert);
      sum[rank] += share;
    }
  }
  Layout layout(load, ranks, places);
  for (int64_t rank = 0; rank < ranks; ++rank) {
    for (size_t place = 0; place < on[rank].size(); ++place) layout.set(rank, place, on[rank][place]);
  }
  return layout;
}

// Makes a placement whole that lacks experts, or has another number of replicas. False where no place fits.
inline bool complete(Layout& layout, int64_t num_physical) {
  const auto roomy_rank = [&](int64_t expert) {
    int64_t best = -1;
    for (int64_t rank = 0; rank < layout.ranks(); ++rank) {
      if (layout.free_places(rank) == 0 || layout.has(rank, expert)) continue;
      if (best < 0 || layout.rank_load(rank) < layout.rank_load(best)) best = rank;
    }
    return best;
  };
  // Of the experts with several replicas, that whose remaining ones would be the least loaded.
  const auto dispensable = [&] {
    int64_t best = -1;
    for (int64_t e = 0; e < layout.experts(); ++e) {
      if (layout.count(e) > 1 && (best < 0 || layout.share(e, -1) < layout.share(best, -1))) best = e;
    }
    return best;
  };
  const auto busiest_holder = [&](int64_t expert) {
    int64_t best = layout.holders(expert).front();
    for (const int32_t rank : layout.holders(expert)) {
      if (layout.rank_load(rank) > layout.rank_load(best)) best = rank;
    }
    return best;
  };
  int64_t total = 0;
  for (int32_t expert = 0; expert < layout.experts(); ++expert) {
    if (layout.count(expert) == 0) {
      if (const int64_t rank = roomy_rank(expert); rank >= 0) {
        layout.set(rank, layout.empty_place(rank), expert);
      } else {
        const int64_t out = dispensable(), from = busiest_holder(out);
        layout.set(from, layout.place_of(from, out), expert);
      }
    }
  }
  for (int64_t expert = 0; expert < layout.experts(); ++expert) total += layout.count(expert);
  for (; total > num_physical; --total) {
    const int64_t out = dispensable(), from = busiest_holder(out);
    layout.set(from, layout.place_of(from, out), -1);
  }
  for (; total < num_physical; ++total) {
    int64_t busiest = -1;
    for (int64_t e = 0; e < layout.experts(); ++e) {
      if ((busiest < 0 || layout.share(e) > layout.share(busiest)) && roomy_rank(e) >= 0) busiest = e;
    }
    if (busiest < 0) return false;
    const int64_t rank = roomy_rank(busiest);
    layout.set(rank, layout.empty_place(rank), static_cast<int32_t>(busiest));
  }
  return true;
}

// Renames the ranks so that many experts stay where `current` has them, at the same place.
inline Layout rename(const Layout& fresh, const Layout& current, const std::vector<double>& load) {
  struct Pair {
    int64_t overlap;
    int32_t fresh, current;
  };
  std::vector<Pair> pairs;
  std::vector<int64_t> overlap(fresh.ranks());
  for (int64_t rank = 0; rank < fresh.ranks(); ++rank) {
    std::fill(overlap.begin(), overlap.end(), 0);
    for (int64_t place = 0; place < fresh.places(); ++place) {
      if (fresh.at(rank, place) < 0) continue;
      for (const int32_t holder : current.holders(fresh.at(rank, place))) ++overlap[holder];
    }
    for (int64_t other = 0; other < fresh.ranks(); ++other) {
      pairs.push_back({overlap[other], static_cast<int32_t>(rank), static_cast<int32_t>(other)});
    }
  }
  std::stable_sort(pairs.begin(), pairs.end(), [](const Pair& a, const Pair& b) { return a.overlap > b.overlap; });
  std::vector<char> named(fresh.ranks(), 0), taken(fresh.ranks(), 0);
  Layout renamed(load, fresh.ranks(), fresh.places());
  for (const Pair& pair : pairs) {
    if (named[pair.fresh] || taken[pair.current]) continue;
    named[pair.fresh] = taken[pair.current] = 1;
    for (const bool staying : {true, false}) {
      for (int64_t place = 0; place < fresh.places(); ++place) {
        const int32_t expert = fresh.at(pair.fresh, place);
        if (expert < 0 || current.has(pair.current, expert) != staying) continue;
        renamed.set(pair.current, staying ? current.place_of(pair.current, expert) : renamed.empty_place(pair.current),
                    expert);
      }
    }
  }
  return renamed;
}

// What of `current` concerns these experts; null: there is no present placement.
inline Layout solve(const std::vector<double>& load, const Layout* current, int64_t ranks, int64_t places,
                    int64_t num_physical, double slack, int64_t max_moves) {
  const double mean = std::accumulate(load.begin(), load.end(), 0.0) / static_cast<double>(ranks);
  Layout fresh = pack(load, ranks, places, replicate(load, ranks, num_physical));
  Search(fresh).run(mean * (1 + kNearPerfect), -1);
  if (current == nullptr) return fresh;

  const double target = fresh.peak() * (1 + slack);
  Layout renamed = rename(fresh, *current, load), kept = *current;
  if (!complete(kept, num_physical)) return renamed;
  Search(kept).run(target, max_moves);
  const int64_t moves_renamed = moves_between(*current, renamed), moves_kept = moves_between(*current, kept);
  const bool reached = kept.peak() <= target, affordable = max_moves < 0 || moves_renamed <= max_moves;
  return affordable && (!reached || moves_renamed < moves_kept) ? renamed : kept;
}

}  // namespace moe
