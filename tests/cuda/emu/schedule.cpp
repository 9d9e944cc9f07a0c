// Launches: which blocks are resident, which thread runs next, deadlocks, failures.
#include <signal.h>
#include <unistd.h>

#include <cstdarg>

#include "emu/state.h"

namespace emu {

Settings settings{};
const char* kernel_name = "";
bool launch_failed = false;
cudaError_t last_error = cudaSuccess;
std::unordered_map<const void*, size_t> smem_limits;  // cudaFuncSetAttribute
size_t smem_limit = 0;

namespace {

uint64_t seed = 1, random_state = 1;
const std::function<void()>* thread_function;
std::vector<std::unique_ptr<Cluster>> resident;
std::vector<Warp*> ready_warps;

struct Abandoned {};  // thrown by fail() outside of any thread

uint64_t planted_from_environment() {
  const char* s = getenv("MOE_BUG");
  const char* colon = s != nullptr ? strchr(s, ':') : nullptr;
  return colon != nullptr ? bug_id(std::string(s, colon).c_str(), atoi(colon + 1)) : 0;
}

Fiber* pop_lane(size_t i, int lane) {
  Warp* w = ready_warps[i];
  w->ready &= ~(1u << lane);
  if (w->ready == 0) ready_warps.erase(ready_warps.begin() + static_cast<ptrdiff_t>(i));
  return &w->lanes[lane];
}

int some_lane(uint32_t lanes) {
  for (uint32_t skip = random_below(static_cast<uint32_t>(__builtin_popcount(lanes))); skip > 0; --skip)
    lanes &= lanes - 1;
  return __builtin_ctz(lanes);
}

Fiber* pick() {
  const uint32_t n = static_cast<uint32_t>(ready_warps.size());
  size_t k = 0;
  // Every policy is sometimes uniform, so that no loop of try_wait starves the thread that it waits for.
  const uint32_t policy = random_below(16) == 0 ? 0 : settings.policy;
  if (policy == 0) k = random_below(n);
  if (policy == 1) {  // priorities that rarely change: some warps run far ahead
    for (size_t i = 1; i < n; ++i)
      if (ready_warps[i]->priority > ready_warps[k]->priority) k = i;
    if (random_below(100) == 0) ready_warps[k]->priority = random_below(1u << 30);
  }
  if (policy == 2) k = n - 1;  // last in, first out; 3: first in, first out
  const uint32_t lanes = ready_warps[k]->ready;
  return pop_lane(k, settings.convergent && policy != 0 ? __builtin_ctz(lanes) : some_lane(lanes));
}

void start_block(Block* b, size_t smem, dim3 dim) {
  b->num_threads = b->live = static_cast<int>(dim.x * dim.y * dim.z);
  b->dynamic_size = smem;
  b->static_begin = kSmemSize;
  take_arena(*b);
  open_shared(*b, 0, smem);
  b->fibers.resize(static_cast<size_t>(b->num_threads));
  b->warps.resize((b->fibers.size() + 31) / 32);
  b->wgmma_log.resize((b->fibers.size() + 127) / 128);
  for (size_t i = 0; i < b->warps.size(); ++i) {
    Warp& w = b->warps[i];
    w.block = b;
    w.index = static_cast<int>(i);
    w.lanes = &b->fibers[32 * i];
    w.priority = random_below(1u << 30);
    const size_t lanes = std::min<size_t>(32, b->fibers.size() - 32 * i);
    if (lanes < 32) w.done = ~0u << lanes;
  }
  for (int t = 0; t < b->num_threads; ++t) {
    Fiber& f = b->fibers[static_cast<size_t>(t)];
    f.block = b;
    f.thread = t;
    f.lane = t % 32;
    f.warp = &b->warps[static_cast<size_t>(t) / 32];
    const unsigned u = static_cast<unsigned>(t);
    f.index = make_uint3(u % dim.x, u / dim.x % dim.y, u / dim.x / dim.y);
    create_stack(f);
  }
}

void start_cluster(size_t first, const Launch& l) {
  auto c = std::make_unique<Cluster>();
  for (uint32_t r = 0; r < l.cluster; ++r) {
    auto b = std::make_unique<Block>();
    const size_t i = first + r;
    b->cluster = c.get();
    b->rank = r;
    b->index = make_uint3(static_cast<unsigned>(i % l.grid.x), static_cast<unsigned>(i / l.grid.x % l.grid.y),
                          static_cast<unsigned>(i / l.grid.x / l.grid.y));
    start_block(b.get(), l.smem, l.block);
    c->num_threads += b->num_threads;
    c->blocks.push_back(std::move(b));
  }
  c->live = c->num_threads;
  c->arrived.assign(static_cast<size_t>(c->num_threads), -1);
  c->number = static_cast<uint32_t>(first / l.cluster);
  clocks_init(*c);
  for (auto& b : c->blocks) {
    for (Warp& w : b->warps) make_ready(&w, ~w.done);
  }
  resident.push_back(std::move(c));
}

void end_cluster(Cluster* c) {
  for (auto& b : c->blocks) {
    if (!launch_failed) finish_block(b.get());
    for (Fiber& f : b->fibers) release_stack(f, launch_failed);
    release_arena(*b);
  }
}

void on_alarm(int) {
  char s[256];
  const int n = snprintf(s, sizeof s,
                         "EMU ERROR in %s: time limit; running: block %u thread %d (a loop that waits for "
                         "what never comes?)\n",
                         kernel_name, current ? current->block->index.x : 0, current ? current->thread : -1);
  if (write(2, s, static_cast<size_t>(n)) < 0) _exit(4);
  _exit(3);
}

void report(const char* text) {
  fprintf(stderr, "EMU ERROR in %s: %s\n", kernel_name, text);
  launch_failed = true;
}

// Chosen by the seed, unless the environment says otherwise.
void choose_settings() {
  random_state = 0x9e3779b97f4a7c15ull * (seed + 1) ^ 0xabcdef;
  for (int i = 0; i < 8; ++i) random_below(2);
  const int yields[] = {0, 20, 200}, asyncs[] = {0, 0, 8, 100};  // 0 for asynchronous operations: as late as possible
  settings.policy = static_cast<uint32_t>(environment("EMU_POLICY", static_cast<int>(random_below(4))));
  settings.yield_in = static_cast<uint32_t>(environment("EMU_YIELD", yields[random_below(3)]));
  settings.async_in = static_cast<uint32_t>(environment("EMU_ASYNC", asyncs[random_below(4)]));
  settings.resident = static_cast<uint32_t>(environment("EMU_RESIDENT", static_cast<int>(1 + random_below(3))));
  settings.convergent = environment("EMU_CONVERGENT", random_below(4) != 0);
}

bool valid(const void* kernel, const char* name, const Launch& l) {
  const size_t threads = size_t{l.block.x} * l.block.y * l.block.z;
  const size_t blocks = size_t{l.grid.x} * l.grid.y * l.grid.z;
  last_error = cudaErrorInvalidConfiguration;
  if (blocks == 0 || threads == 0 || threads > 1024 || l.block.z > 64 || l.grid.y > 65535 || l.grid.z > 65535 ||
      l.grid.x > 0x7fffffff || l.smem > kSmemSize || l.cluster == 0 || l.cluster > 8 || l.grid.x % l.cluster)
    return false;
  last_error = cudaErrorInvalidValue;
  constexpr size_t kPlain = 48 * 1024;
  smem_limit = smem_limits[kernel] > kPlain ? kSmemSize : kPlain;
  if (l.smem > std::max(kPlain, smem_limits[kernel])) {
    fprintf(stderr, "EMU ERROR launch of %s: %zu bytes of dynamic shared memory without cudaFuncSetAttribute\n", name,
            l.smem);
    return false;
  }
  last_error = cudaSuccess;
  return true;
}

}  // namespace

uint64_t planted_bug = planted_from_environment();
void set_seed(uint64_t s) { seed = s; }

uint32_t random_below(uint32_t n) {
  uint64_t x = random_state;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  random_state = x;
  return static_cast<uint32_t>((x >> 32) * n >> 32);
}

int environment(const char* name, int otherwise) {
  const char* s = getenv(name);
  return s != nullptr ? atoi(s) : otherwise;
}

void make_ready(Warp* w, uint32_t lanes) {
  if (lanes == 0) return;
  if (w->ready == 0) ready_warps.push_back(w);
  w->ready |= lanes;
}
void make_ready(Fiber* f) { make_ready(f->warp, 1u << f->lane); }

void yield() {
  make_ready(current);
  switch_to_scheduler();
}
void spin() {
  if (async_pending() && random_below(16) == 0) run_one_async();
  yield();
}
void yield_point() {
  if (current != nullptr && settings.yield_in != 0 && random_below(settings.yield_in) == 0) yield();
}

void wait_for(const char* what, const Where& where) {
  Fiber* f = current;
  f->wait = what;
  f->where = where;
  Warp* w = f->warp;
  if (settings.convergent && w->ready != 0) {  // straight to the next lane: warp collectives are most of all switches
    size_t i = 0;
    while (ready_warps[i] != w) ++i;
    switch_to(pop_lane(i, __builtin_ctz(w->ready)));
  } else {
    switch_to_scheduler();
  }
}

void report_waiting() {
  for (auto& c : resident)
    for (auto& b : c->blocks) {
      std::vector<std::pair<std::string, std::vector<int>>> groups;  // equal waits are printed once
      for (Fiber& f : b->fibers) {
        if (((f.warp->ready | f.warp->done) >> f.lane & 1) || &f == current) continue;
        char detail[160];
        const auto& d = f.wait_detail;
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wformat-nonliteral"
#pragma GCC diagnostic ignored "-Wformat-security"
        snprintf(detail, sizeof detail, f.wait_format, d[0], d[1], d[2], d[3], d[4], d[5]);
#pragma GCC diagnostic pop
        const std::string s = std::string(f.wait) + " " + detail + " at " + place(f.where);
        auto it = std::find_if(groups.begin(), groups.end(), [&](const auto& g) { return g.first == s; });
        if (it == groups.end()) it = groups.insert(groups.end(), {s, {}});
        it->second.push_back(f.thread);
      }
      for (auto& [what, threads] : groups)
        fprintf(stderr, "    block %u,%u: %zu threads (%d..%d) wait in %s\n", b->index.x, b->index.y, threads.size(),
                threads.front(), threads.back(), what.c_str());
    }
}

void fail(const Where& where, const char* format, ...) {
  fprintf(stderr, "EMU ERROR in %s", kernel_name);
  if (current != nullptr)
    fprintf(stderr, " block %u,%u thread %d (warp %d lane %d)", current->block->index.x, current->block->index.y,
            current->thread, current->warp->index, current->lane);
  fprintf(stderr, " at %s: ", place(where).c_str());
  va_list arguments;
  va_start(arguments, format);
  vfprintf(stderr, format, arguments);
  va_end(arguments);
  fprintf(stderr, "\n");
  if (environment("EMU_ABORT", 0)) abort();  // a debugger stops on the failing thread's stack
  launch_failed = true;
  if (current == nullptr) throw Abandoned{};  // an asynchronous operation that the scheduler ran
  switch_to_scheduler(true);
  abort();
}

void thread_main() {
  (*thread_function)();
  Fiber* f = current;
  Block* b = f->block;
  const Where nowhere = f->where;
  if (!f->open_copies.empty() || !f->copy_groups.empty()) fail(nowhere, "a thread exits with cp.async in flight");
  wgmma_exit(nowhere);
  f->warp->done |= 1u << f->lane;
  --b->live;
  --b->cluster->live;
  barriers_after_exit(f);
  switch_to_scheduler(true);
  abort();
}

void launch(const void* kernel, const char* name, const Launch& l, const std::function<void()>& thread) {
  if (!valid(kernel, name, l)) return;
  choose_settings();
  kernel_name = name;
  launch_failed = false;
  thread_function = &thread;
  blockDim = l.block;
  gridDim = l.grid;
  race_new_launch(l.overlap_previous);
  signal(SIGALRM, on_alarm);
  alarm(static_cast<unsigned>(environment("EMU_TIMEOUT", 120)));
  const size_t blocks = size_t{l.grid.x} * l.grid.y * l.grid.z;
  for (size_t next = 0; (next < blocks || !resident.empty()) && !launch_failed;) {
    while (resident.size() < settings.resident && next < blocks) {
      start_cluster(next, l);
      next += l.cluster;
    }
    const bool idle = ready_warps.empty();
    if (idle && !async_pending()) {
      report("deadlock, no thread can run and nothing is in flight:");
      report_waiting();
    } else if (idle || (settings.async_in && async_pending() && random_below(settings.async_in) == 0)) {
      try {
        run_one_async();
      } catch (const Abandoned&) {
      }
    } else {
      switch_to(pick());
    }
    for (size_t i = 0; i < resident.size() && !launch_failed;) {
      if (resident[i]->live > 0) {
        ++i;
        continue;
      }
      end_cluster(resident[i].get());
      resident.erase(resident.begin() + static_cast<ptrdiff_t>(i));
    }
  }
  if (launch_failed) {
    last_error = cudaErrorLaunchFailure;
    ready_warps.clear();
    drop_async();
    for (auto& c : resident) end_cluster(c.get());
    resident.clear();
  }
  banks_end_launch();
  alarm(0);
}

}  // namespace emu
