#include "moe/placement.h"

#include <atomic>
#include <cmath>
#include <new>

#include "parallel.h"
#include "placement_solve.h"

namespace moe {
namespace {

// The arguments of one layer.
struct Layer {
  const PlacementArgs& args;
  int32_t* physical_to_logical;  // [ep_size, S]
  const double* loads;           // [E]
  const int32_t* current;        // [ep_size, S] or null

  int64_t per_group() const { return args.num_experts / args.num_groups; }
  int64_t ranks_per_node() const { return args.ep_size / args.nodes; }
};

// Else nodes play no part.
bool has_groups_on_nodes(const PlacementArgs& args) { return args.nodes > 1 && args.num_groups % args.nodes == 0; }

// What the solver relies on: it divides by the sizes, and looks for a rank that lacks an expert until it finds one.
bool is_possible(const PlacementArgs& args) {
  if (args.num_layers < 0 || args.num_experts < 1 || args.nodes < 1 || args.num_groups < 1) return false;
  if (args.ep_size % args.nodes != 0 || args.num_experts % args.num_groups != 0) return false;
  const int64_t ranks = has_groups_on_nodes(args) ? args.ep_size / args.nodes : args.ep_size;
  if (args.num_physical < args.num_experts || args.num_physical > args.num_experts * ranks) return false;
  if (args.num_physical > args.ep_size * args.places_per_rank) return false;  // which also refuses none of either
  if (!std::isfinite(args.slack) || args.slack < 0 || args.max_moves < -1) return false;
  const double* end = args.loads + args.num_layers * args.num_experts;
  return std::all_of(args.loads, end, [](double load) { return std::isfinite(load) && load >= 0; });
}

using Nodes = std::vector<std::vector<int32_t>>;  // by node: its groups, in order

double peak_of(const Nodes& nodes, const std::vector<double>& group_load) {
  double peak = 0.0;
  for (const std::vector<int32_t>& groups : nodes) {
    double sum = 0.0;
    for (const int32_t group : groups) sum += group_load[group];
    peak = std::max(peak, sum);
  }
  return peak;
}

// Step 1: heaviest group first, to the least loaded node that has room.
Nodes pack_groups(const Layer& layer, const std::vector<double>& group_load) {
  const auto per_node = static_cast<size_t>(layer.args.num_groups / layer.args.nodes);
  std::vector<int32_t> order(group_load.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) { return group_load[a] > group_load[b]; });
  Nodes nodes(layer.args.nodes);
  std::vector<double> sum(layer.args.nodes, 0.0);
  for (const int32_t group : order) {
    int64_t best = -1;
    for (int64_t node = 0; node < layer.args.nodes; ++node) {
      if (nodes[node].size() < per_node && (best < 0 || sum[node] < sum[best])) best = node;
    }
    nodes[best].push_back(group);
    sum[best] += group_load[group];
  }
  return nodes;
}

// The groups of each node: fresh, or as they are where that is nearly as good, or fresh with the nodes renamed.
Nodes assign_groups(const Layer& layer) {
  const PlacementArgs& args = layer.args;
  std::vector<double> group_load(args.num_groups, 0.0);
  for (int64_t e = 0; e < args.num_experts; ++e) group_load[e / layer.per_group()] += layer.loads[e];
  Nodes fresh = pack_groups(layer, group_load);
  if (layer.current == nullptr) return fresh;

  const int64_t places_per_node = layer.ranks_per_node() * args.places_per_rank;
  std::vector<std::vector<int64_t>> present(args.nodes, std::vector<int64_t>(args.num_groups, 0));  // replicas
  for (int64_t place = 0; place < args.nodes * places_per_node; ++place) {
    const int32_t expert = layer.current[place];
    if (expert >= 0 && expert < args.num_experts) ++present[place / places_per_node][expert / layer.per_group()];
  }
  Nodes kept(args.nodes);
  for (int32_t group = 0; group < args.num_groups; ++group) {
    int64_t best = 0;
    for (int64_t node = 1; node < args.nodes; ++node) {
      if (present[node][group] > present[best][group]) best = node;
    }
    kept[best].push_back(group);
  }
  const auto full = [&](const auto& groups) { return groups.size() == fresh[0].size(); };
  if (std::all_of(kept.begin(), kept.end(), full) &&
      peak_of(kept, group_load) <= (1 + args.slack) * peak_of(fresh, group_load)) {
    return kept;
  }

  Nodes renamed(args.nodes);
  std::vector<char> named(args.nodes, 0);
  for (int64_t step = 0; step < args.nodes; ++step) {
    int64_t from = -1, to = -1, most = -1;
    for (int64_t node = 0; node < args.nodes; ++node) {
      for (int64_t name = 0; name < args.nodes; ++name) {
        if (named[node] || !renamed[name].empty()) continue;
        int64_t overlap = 0;
        for (const int32_t group : fresh[node]) overlap += present[name][group];
        if (overlap > most) most = overlap, from = node, to = name;
      }
    }
    named[from] = 1;
    renamed[to] = fresh[from];
  }
  return renamed;
}

// Solves the experts of `groups` on the ranks of a node and writes the node's places.
void solve_node(const Layer& layer, int64_t node, const std::vector<int32_t>& groups, int64_t num_physical) {
  const PlacementArgs& args = layer.args;
  const int64_t places = args.places_per_rank, ranks = layer.ranks_per_node(), first = node * ranks * places;
  std::vector<int32_t> experts, local(args.num_experts, -1);
  std::vector<double> load;
  for (const int32_t group : groups) {
    for (int64_t e = group * layer.per_group(); e < (group + 1) * layer.per_group(); ++e) {
      local[e] = static_cast<int32_t>(experts.size());
      experts.push_back(static_cast<int32_t>(e));
      load.push_back(layer.loads[e]);
    }
  }
  Layout current(load, ranks, places);
  for (int64_t place = 0; layer.current != nullptr && place < ranks * places; ++place) {
    const int32_t expert = layer.current[first + place];
    if (expert < 0 || expert >= args.num_experts || local[expert] < 0) continue;
    if (!current.has(place / places, local[expert])) current.set(place / places, place % places, local[expert]);
  }
  const Layout solved = solve(load, layer.current == nullptr ? nullptr : &current, ranks, places, num_physical,
                              args.slack, args.max_moves < 0 ? -1 : args.max_moves / args.nodes);
  for (int64_t place = 0; place < ranks * places; ++place) {
    const int32_t expert = solved.at(place / places, place % places);
    layer.physical_to_logical[first + place] = expert < 0 ? -1 : experts[expert];
  }
}

void solve_layer(const Layer& layer) {
  const PlacementArgs& args = layer.args;
  if (!has_groups_on_nodes(args)) {
    // Nodes do not matter: one node of all ranks, one group of all experts.
    PlacementArgs flat = args;
    flat.nodes = flat.num_groups = 1;
    return solve_node({flat, layer.physical_to_logical, layer.loads, layer.current}, 0, {0}, args.num_physical);
  }
  const Nodes nodes = assign_groups(layer);
  const int64_t extra = args.num_physical - args.num_experts;
  for (int64_t node = 0; node < args.nodes; ++node) {
    const int64_t replicas = extra / args.nodes + (node < extra % args.nodes ? 1 : 0);
    solve_node(layer, node, nodes[node], args.num_experts / args.nodes + replicas);
  }
}

}  // namespace

Status placement_cpu(const PlacementArgs& args, const ThreadPool& pool) {
  if (!is_possible(args)) return Status::kImpossible;
  std::atomic<bool> out_of_memory = false;
  parallel_for(pool, args.num_layers, 1, [&](int64_t begin, int64_t end) {
    try {
      for (int64_t layer = begin; layer < end; ++layer) {
        const int64_t first = layer * args.ep_size * args.places_per_rank;
        solve_layer({args, args.physical_to_logical + first, args.loads + layer * args.num_experts,
                     args.current == nullptr ? nullptr : args.current + first});
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
  });
  return out_of_memory ? Status::kOutOfMemory : Status::kOk;
}

}  // namespace moe
