#include "moe/placement.h"

#include <algorithm>
#include <limits>
#include <set>

#include "support.h"

namespace moe::test {
namespace {

struct Case {
  int64_t layers, experts, ranks, extra, nodes, groups;
};

const Case kCases[] = {{3, 8, 4, 0, 1, 1}, {2, 8, 4, 4, 1, 1},    {1, 7, 3, 1, 1, 1},  {2, 5, 4, 15, 1, 1},
                       {1, 1, 1, 0, 1, 1}, {2, 16, 4, 4, 2, 8},   {2, 64, 8, 8, 2, 8}, {1, 16, 8, 9, 4, 4},
                       {1, 3, 5, 2, 1, 1}, {2, 64, 16, 32, 3, 8}, {1, 12, 4, 36, 1, 1}};

int64_t places_of(const Case& c) { return (c.experts + c.extra + c.ranks - 1) / c.ranks; }

std::vector<double> loads_of(const Case& c, uint32_t seed) {
  std::mt19937 engine(seed);
  std::vector<double> loads;
  for (int64_t i = 0; i < c.layers * c.experts; ++i) loads.push_back(engine() % (1 + engine() % 1000));
  return loads;
}

std::vector<int32_t> solve(const Case& c, const std::vector<double>& loads, const std::vector<int32_t>* current,
                           int64_t max_moves = -1) {
  const int64_t nodes = c.ranks % c.nodes == 0 ? c.nodes : 1;
  return std::get<0>(run_on_pools([&](const ThreadPool& pool) {
    auto placed = unwritten<int32_t>(c.layers * c.ranks * places_of(c));
    CHECK(placement_cpu({placed.data(), loads.data(), current ? current->data() : nullptr, c.layers, c.experts, c.ranks,
                         places_of(c), c.experts + c.extra, nodes, c.groups, 0.02, max_moves},
                        pool) == Status::kOk);
    return std::tuple(placed);
  }));
}

// Every expert somewhere, the asked number of replicas, none twice on a rank.
void check_valid(const Case& c, const std::vector<int32_t>& placed) {
  const int64_t places = places_of(c);
  for (int64_t layer = 0; layer < c.layers; ++layer) {
    std::set<int32_t> seen;
    int64_t filled = 0;
    for (int64_t rank = 0; rank < c.ranks; ++rank) {
      std::set<int32_t> here;
      for (int64_t place = 0; place < places; ++place) {
        const int32_t expert = placed[(layer * c.ranks + rank) * places + place];
        CHECK(expert >= -1 && expert < c.experts);
        if (expert < 0) continue;
        CHECK(here.insert(expert).second);
        seen.insert(expert);
        ++filled;
      }
    }
    CHECK(static_cast<int64_t>(seen.size()) == c.experts && filled == c.experts + c.extra);
  }
}

int64_t moves(const Case& c, const std::vector<int32_t>& from, const std::vector<int32_t>& to) {
  const int64_t places = places_of(c);
  int64_t moves = 0;
  for (int64_t row = 0; row < c.layers * c.ranks; ++row) {
    const std::set<int32_t> before(from.begin() + row * places, from.begin() + (row + 1) * places);
    for (int64_t place = 0; place < places; ++place) {
      const int32_t expert = to[row * places + place];
      moves += expert >= 0 && !before.contains(expert);
    }
  }
  return moves;
}

TEST(placement_holds_every_expert_and_no_replica_twice_on_a_rank) {
  for (const Case& c : kCases) {
    for (uint32_t seed = 0; seed < 8; ++seed) {
      const Context context("E " + std::to_string(c.experts) + " ranks " + std::to_string(c.ranks));
      const auto placed = solve(c, loads_of(c, seed), nullptr), next = solve(c, loads_of(c, seed + 100), &placed);
      check_valid(c, placed);
      check_valid(c, next);
      CHECK(solve(c, loads_of(c, seed), &placed) == placed);  // a good placement stays
      // A present placement may be anything: too short, doubled, of experts that do not exist.
      std::mt19937 engine(seed);
      std::vector<int32_t> garbage(placed.size());
      for (int32_t& expert : garbage) expert = static_cast<int32_t>(engine() % (c.experts + 3)) - 1;
      check_valid(c, solve(c, loads_of(c, seed), &garbage));
    }
  }
}

// One wrong argument at a time: nothing is written, and nothing is divided by zero or looked for in vain.
TEST(placement_refuses_what_is_impossible) {
  const double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto status = [](auto change) {
    std::vector<double> loads(8, 1.0);
    std::vector<int32_t> placed(8 * 4, -7);
    PlacementArgs args{placed.data(), loads.data(), nullptr, 1, 8, 4, 3, 12, 2, 4, 0.02, -1};
    change(args, loads);
    const Status result = placement_cpu(args, kPool<1>);
    CHECK(result == Status::kOk || std::all_of(placed.begin(), placed.end(), [](int32_t e) { return e == -7; }));
    return result;
  };
  using Args = PlacementArgs;
  using Loads = std::vector<double>;
  CHECK(status([](Args&, Loads&) {}) == Status::kOk);
  CHECK(status([](Args& a, Loads&) { a.num_layers = 0; }) == Status::kOk);
  CHECK(status([](Args& a, Loads&) { a.num_layers = -1; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_experts = a.num_physical = 0; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.ep_size = 0; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.nodes = 0; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.nodes = 3; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_groups = 0; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_groups = 3; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_physical = 7; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_physical = 13; }) == Status::kImpossible);  // 12 places
  // A rank holds an expert once; with groups on nodes, that is so often per node.
  CHECK(status([](Args& a, Loads&) { a.num_physical = 17, a.places_per_rank = 5; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_physical = 33, a.places_per_rank = 9, a.nodes = 1; }) ==
        Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.num_physical = 32, a.places_per_rank = 8, a.nodes = 1; }) == Status::kOk);
  CHECK(status([](Args& a, Loads&) { a.places_per_rank = 0; }) == Status::kImpossible);
  CHECK(status([](Args& a, Loads&) { a.max_moves = -2; }) == Status::kImpossible);
  for (const double wrong : {nan, infinity, -1.0}) {
    CHECK(status([&](Args& a, Loads&) { a.slack = wrong; }) == Status::kImpossible);
    CHECK(status([&](Args&, Loads& loads) { loads[7] = wrong; }) == Status::kImpossible);
  }
}

TEST(placement_moves_no_more_than_allowed) {
  const Case c{1, 64, 8, 8, 1, 1};
  const auto placed = solve(c, loads_of(c, 1), nullptr);
  for (const int64_t limit : {0, 1, 5}) CHECK(moves(c, placed, solve(c, loads_of(c, 2), &placed, limit)) <= limit);
}

TEST(placement_keeps_groups_on_a_node) {
  for (const Case& c : {Case{2, 64, 8, 8, 2, 8}, Case{1, 16, 8, 9, 4, 4}}) {
    const auto placed = solve(c, loads_of(c, 3), nullptr), next = solve(c, loads_of(c, 4), &placed);
    for (const auto& solved : {placed, next}) {
      for (int64_t layer = 0; layer < c.layers; ++layer) {
        std::vector<int64_t> node_of(c.groups, -1);
        const int64_t per_layer = c.ranks * places_of(c);
        for (int64_t place = 0; place < per_layer; ++place) {
          const int32_t expert = solved[layer * per_layer + place];
          if (expert < 0) continue;
          int64_t& node = node_of[expert / (c.experts / c.groups)];
          const int64_t here = place / (per_layer / c.nodes);
          CHECK(node < 0 || node == here);
          node = here;
        }
      }
    }
  }
}

}  // namespace
}  // namespace moe::test
