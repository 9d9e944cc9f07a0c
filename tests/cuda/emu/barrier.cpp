// Barriers of a block and of a cluster, and the gathering of a warp's lanes.
#include "emu/state.h"

namespace emu {

namespace {

std::vector<Collective*> free_collectives;

void complete(NamedBarrier& b) {
  b.result = b.votes;
  b.votes = b.arrived = 0;
  ++b.phase;
  b.past = b.meeting.past();
  b.meeting.clear();
  std::vector<Fiber*> waiting;
  waiting.swap(b.waiting);
  for (Fiber* f : waiting) {
    f->clock.learn(b.past);
    make_ready(f);
  }
}

// The `.aligned` rule: all lanes of a warp come to the same barrier instruction.
void check_aligned(const NamedBarrier& b, bool wait, const Where& where) {
  const Warp* w = current->warp;
  const uint32_t exited =
      w->done & (w->index == static_cast<int>(w->block->warps.size()) - 1 && w->block->num_threads % 32
                     ? ~(~0u << w->block->num_threads % 32)
                     : ~0u);
  if (exited && wait) fail(where, "aligned barrier after lane %d of the same warp has exited", __builtin_ctz(exited));
  for (const Fiber* f : b.waiting)
    if (f->warp == w && (f->where.line() != where.line() || f->where.column() != where.column() ||
                         f->where.file_name() != where.file_name()))
      fail(where, "the warp diverged at an aligned barrier: lane %d waits at %s", f->lane, place(f->where).c_str());
}

void come(int id, int threads, bool wait, const Where& where, int vote = 0) {
  Block* block = current->block;
  if (id < 0 || id > 15) fail(where, "barrier %d does not exist", id);
  if (threads > 0 && threads % 32) fail(where, "barrier count %d is not a multiple of 32", threads);
  NamedBarrier& b = block->barriers[id];
  check_aligned(b, wait, where);
  if (b.arrived && b.expected != threads)
    fail(where, "barrier %d with %d threads, while %d threads have come to it at %s as one of %d threads", id, threads,
         b.arrived, place(b.where).c_str(), b.expected);
  b.expected = threads;
  b.where = where;
  b.votes += vote;
  release_to(b.meeting);
  const int needed = threads < 0 ? block->live : threads;
  if (++b.arrived >= needed) {
    complete(b);
    if (wait) current->clock.learn(b.past);
    yield_point();
  } else if (wait) {
    b.waiting.push_back(current);
    current->wait_format = "%lld (%lld of %lld have come)";
    current->wait_detail[0] = id;
    current->wait_detail[1] = b.arrived;
    current->wait_detail[2] = needed;
    wait_for("barrier", where);
  }
}

void complete(Warp* w, Collective* c) {
  w->gathering.erase(std::find(w->gathering.begin(), w->gathering.end(), c));
  if (c->lanes == Lanes::kFullWarp && c->arrived != ~0u)
    fail(c->where, "%s needs the whole warp, lanes %08x came", c->what, c->arrived);
  if (c->finish) c->finish(c->arrived, c->argument, c->where);
}

}  // namespace

void bar_sync(int id, int threads, const Where& where) { come(id, threads, true, where); }
void bar_arrive(int id, int threads, const Where& where) { come(id, threads, false, where); }
int bar_reduce(int kind, int predicate, const Where& where) {
  come(0, -1, true, where, predicate != 0);
  const int votes = current->block->barriers[0].result;
  return kind == 0 ? votes : kind == 1 ? votes > 0 : votes == current->block->live;
}

void cluster_arrive(const Where& where) {
  Cluster* c = current->block->cluster;
  int& arrived = c->arrived[current->id()];
  if (arrived >= 0) fail(where, "a second barrier.cluster.arrive without a wait in between");
  NamedBarrier& b = c->barrier;
  arrived = b.phase;
  release_to(b.meeting);
  if (++b.arrived == c->live) complete(b);
  yield_point();
}
void cluster_wait(const Where& where) {
  Cluster* c = current->block->cluster;
  int& arrived = c->arrived[current->id()];
  if (arrived < 0) fail(where, "barrier.cluster.wait without an arrive");
  NamedBarrier& b = c->barrier;
  if (b.phase == arrived) {  // somebody has not come
    b.waiting.push_back(current);
    current->wait_format = "(%lld of %lld have come)";
    current->wait_detail[0] = b.arrived;
    current->wait_detail[1] = c->live;
    wait_for("cluster barrier", where);
  } else {
    current->clock.learn(b.past);
  }
  arrived = -1;
}
uint32_t cluster_rank() { return current->block->rank; }
uint32_t cluster_size() { return static_cast<uint32_t>(current->block->cluster->blocks.size()); }

void collective(const char* what, uint32_t mask, void* argument, Finish finish, Lanes lanes, const Where& where) {
  Warp* w = current->warp;
  const int lane = current->lane;
  if (!(mask >> lane & 1)) fail(where, "%s: the calling lane %d is not in the mask %08x", what, lane, mask);
  Collective* c = nullptr;
  for (Collective* g : w->gathering) {
    if (!(g->mask & mask)) continue;
    if (g->mask != mask)
      fail(where, "%s with mask %08x, while lanes %08x wait in %s with mask %08x at %s", what, mask, g->arrived,
           g->what, g->mask, place(g->where).c_str());
    if (strcmp(g->what, what) ||
        (lanes != Lanes::kAny && (g->where.line() != where.line() || g->where.file_name() != where.file_name())))
      fail(where, "the warp diverged: %s here, lanes %08x are in %s at %s", what, g->arrived, g->what,
           place(g->where).c_str());
    c = g;
  }
  if (c == nullptr) {
    if (free_collectives.empty()) free_collectives.push_back(new Collective);
    c = free_collectives.back();
    free_collectives.pop_back();
    c->mask = mask;
    c->arrived = 0;
    c->what = what;
    c->where = where;
    c->finish = finish;
    c->lanes = lanes;
    w->gathering.push_back(c);
  }
  c->arrived |= 1u << lane;
  c->argument[lane] = argument;
  if (((c->arrived | w->done) & mask) == mask) {
    complete(w, c);
    make_ready(w, c->arrived & ~(1u << lane));
    free_collectives.push_back(c);
    yield_point();
  } else {
    current->wait_format = "(lanes %08llx of %08llx)";
    current->wait_detail[0] = c->arrived;
    current->wait_detail[1] = mask;
    wait_for(what, where);
  }
}

void syncwarp(uint32_t mask, const Where& where) {
  collective(
      "syncwarp", mask, nullptr, [](uint32_t lanes, void* const*, const Where&) { join_lanes(current->warp, lanes); },
      Lanes::kAny, where);
}

void barriers_after_exit(Fiber* f) {
  Block* block = f->block;
  for (NamedBarrier& b : block->barriers)
    for (const Fiber* w : b.waiting)
      if (w->warp == f->warp)
        fail(w->where, "lane %d exits while lane %d of its warp waits at this barrier", f->lane, w->lane);
  NamedBarrier& b = block->barriers[0];
  if (b.arrived && b.expected < 0 && b.arrived == block->live) complete(b);
  NamedBarrier& c = block->cluster->barrier;
  if (c.arrived && c.arrived == block->cluster->live) complete(c);
  for (Collective* g : f->warp->gathering)
    if (((g->arrived | f->warp->done) & g->mask) == g->mask) {
      complete(f->warp, g);
      make_ready(f->warp, g->arrived);
      free_collectives.push_back(g);
      break;
    }
}

}  // namespace emu
