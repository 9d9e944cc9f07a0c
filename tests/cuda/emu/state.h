// The emulator's own data: threads, warps, blocks, clusters, and what they wait for.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>

#include "emu/clocks.h"
#include "emu/emu.h"

namespace emu {

struct Block;
struct Cluster;
struct Warp;

struct Copy {  // a cp.async in flight
  uint32_t dst;
  const char* src;
  uint32_t bytes, src_bytes;
  Where where;
};

struct Fiber {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* asan_stack = nullptr;
  Warp* warp = nullptr;
  Block* block = nullptr;
  int thread = 0, lane = 0;
  uint3 index{};
  // What it waits for; formatted only when it is reported.
  const char* wait = "";
  Where where;
  const char* wait_format = "";
  long long wait_detail[6] = {};
  // cp.async
  std::vector<Copy> open_copies;
  std::vector<std::vector<Copy>> copy_groups;
  // bulk stores: the number of the open group, and the sources that are still being read
  int bulk_group = 0;
  struct BulkRead {
    int group;
    uint32_t address, bytes;
  };
  std::vector<BulkRead> bulk_reads;
  bool waited_for_previous_grid = false;
  // race checker
  Clock clock;
  Clock fence;                                             // as of the last __threadfence()
  std::vector<std::pair<uint32_t, PastPointer>> unfenced;  // what atomics read since then
  uint32_t id() const;                                     // its index in a Past
};

struct Collective {
  uint32_t mask, arrived;
  const char* what;
  Where where;
  Finish finish;
  Lanes lanes;
  void* argument[32];
};

struct WgmmaOp;  // wgmma.cpp
struct WgmmaState;
struct WgmmaStateDeleter {
  void operator()(WgmmaState* s) const;
};

struct Warp {
  Block* block = nullptr;
  Fiber* lanes = nullptr;
  int index = 0;
  uint32_t ready = 0, done = 0;  // lanes that can run, lanes that have exited (or never were)
  uint32_t priority = 0;
  int registers = 0;  // per thread, once setmaxnreg has changed them
  std::vector<Collective*> gathering;
  std::unique_ptr<WgmmaState, WgmmaStateDeleter> wgmma;
};

struct NamedBarrier {
  int expected = 0, arrived = 0, votes = 0, result = 0, phase = 0;
  Meeting meeting;
  PastPointer past;  // of the phase that ended last
  std::vector<Fiber*> waiting;
  Where where;
};

struct Mbarrier {
  Block* block = nullptr;
  uint32_t expected = 0, pending = 0, phase = 0, id = 0;
  int64_t bytes = 0;
  bool seen = true;  // the end of the phase before this one, by a wait
  Meeting arriving;
  PastPointer done;
  std::vector<Fiber*> waiting;
};

// Per byte of shared memory, for the race checker.
struct Shadow {
  uint32_t write_time, plain_time, read_time[2];  // plain: what was written last by something else than an atomic
  uint16_t writer, plain_writer, reader[2];
  uint8_t state, async_readers;
};
enum ShadowState : uint8_t { kUnwritten, kWritten, kAsyncWritten, kInFlight, kAtomic };

struct Block {
  Cluster* cluster = nullptr;
  uint32_t rank = 0;
  uint3 index{};
  int num_threads = 0, live = 0;
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  char* arena = nullptr;
  size_t dynamic_size = 0, static_begin = 0, static_bytes = 0;
  std::unordered_map<const void*, uint32_t> statics;
  std::unordered_map<uint32_t, Mbarrier> mbarriers;
  NamedBarrier barriers[16];
  int free_registers = 0;  // what setmaxnreg.dec released
  std::vector<Fiber*> want_registers;
  Shadow* shadow = nullptr;
  std::vector<std::vector<uint64_t>> wgmma_log;  // per warpgroup: what its first warp issued
};

struct Cluster {
  std::vector<std::unique_ptr<Block>> blocks;
  int num_threads = 0, live = 0;
  uint32_t number = 0, num_mbarriers = 0;
  NamedBarrier barrier;
  std::vector<int> arrived;  // by thread: the phase between cluster_arrive and cluster_wait, else -1
};

constexpr uint32_t kSmemBase = 1024;        // of the 32-bit addresses, as on the device
constexpr uint32_t kSmemSize = 227 * 1024;  // per block
constexpr size_t kArena = 57 * 4096;        // kSmemSize and a page that nobody may touch
constexpr uint32_t kSmemWindow = 1u << 24;  // mapa: the block of rank r has its memory at (r + 1) * kSmemWindow
constexpr uint32_t kMaxMbarriers = 64;      // per block

// ---- fiber.cpp
extern Fiber* current;
void switch_to(Fiber* fiber);  // from the scheduler or another fiber
void switch_to_scheduler(bool dying = false);
void create_stack(Fiber& fiber);
void release_stack(Fiber& fiber, bool abandoned);
void thread_main();                   // schedule.cpp
void barriers_after_exit(Fiber* f);   // barrier.cpp
void wgmma_exit(const Where& where);  // wgmma.cpp

// ---- schedule.cpp
extern size_t smem_limit;  // of a block of this launch, arrays and dynamic part together
struct Settings {
  uint32_t policy, yield_in, async_in, resident;
  bool convergent;  // a warp goes on with its other lanes when one blocks
};
extern Settings settings;
extern const char* kernel_name;
extern bool launch_failed;
uint32_t random_below(uint32_t n);
int environment(const char* name, int otherwise);
void make_ready(Fiber* fiber);
void make_ready(Warp* warp, uint32_t lanes);
void wait_for(const char* what, const Where& where);  // until make_ready
void report_waiting();

// ---- mbarrier.cpp
void mbar_check(uint32_t address, const Where& where);                    // that it is one
void mbar_advance(Mbarrier& mbarrier);                                    // ends the phase if nothing is missing
void mbar_arrive_by(Fiber* by, uint32_t address, const Where& where);     // from the asynchronous engine
void mbar_bytes_arrived(Block* block, uint32_t address, uint32_t bytes);  // likewise

// ---- async.cpp: operations that run some time after they were issued
struct AsyncOp {
  std::function<void()> run;
  Fiber* owner;
  bool is_store;
  int group;  // of a store
};
void issue(AsyncOp op);
bool async_pending();
void run_one_async();
void finish_stores(Fiber* fiber, int keep_groups);
void finish_block(Block* block);
void drop_async();

// ---- memory.cpp
void take_arena(Block& block);  // shared memory that nothing may touch until it is opened
void open_shared(Block& block, size_t begin, size_t bytes);
void release_arena(Block& block);
Block* owner_of(uint32_t address, const Where& where);                     // the current block, or the mapped one
inline uint32_t local(uint32_t address) { return address % kSmemWindow; }  // the address in that block
char* smem_pointer(Block* block, uint32_t local, size_t bytes, size_t align, const Where& where);
struct Region {  // what cudaMalloc returned
  char* base;
  size_t bytes;
  std::vector<struct GlobalShadow> shadow;
  std::vector<uint8_t> writes;  // expect_written_once
  size_t once_begin = 0, once_bytes = 0;
};
Region* find_region(const void* p);
uint32_t swizzle(uint32_t address, int mode);  // CU_TENSOR_MAP_SWIZZLE_*

// ---- race.cpp; all do nothing unless the build sees memory accesses
extern bool checks_races;
struct GlobalShadow {
  uint32_t launch = 0, block = 0, time = 0;
  uint16_t thread = 0;
};
void clocks_init(Cluster& cluster);
void release_to(Meeting& meeting);
void join_lanes(Warp* warp, uint32_t lanes);
void race_access(Block* owner, uint32_t address, size_t bytes, bool write, const char* what, const Where& where);
void race_pointer(const void* p, size_t bytes, bool write, const Where& where);  // the hooks
void race_global_write(const void* p, size_t bytes, const char* what, const Where& where);
void note_global_atomic(const void* p, size_t bytes, const Where& where);
void race_early(const void* p, size_t bytes, const char* verb, const Where& where);  // before grid_dependency_wait()
void race_global_read(const void* p, size_t bytes, const Where& where);
void race_issue_write(Block* owner, uint32_t address, size_t bytes, bool async_proxy, const char* what,
                      const Where& where);
void race_copy_done(Block* owner, uint32_t address, size_t bytes, Fiber* by);
void race_tma_done(Block* owner, uint32_t address, size_t bytes, const Mbarrier& mbarrier);
void race_issue_read(Block* owner, uint32_t address, size_t bytes, const char* what, const Where& where);
void race_read_done(Block* owner, uint32_t address, size_t bytes, Fiber* by);
void race_probe_async(Block* owner, uint32_t address, size_t bytes, const char* what, const Where& where);
void race_proxy_fence();
void race_new_launch(bool overlaps_previous);
Where hook_where();  // the place of the access that a hook reports
std::string place(const Where& where);
bool is_hook(const Where& where);

// ---- banks.cpp
extern bool counts_banks;
void banks_access(Fiber* fiber, const void* pc, uint32_t address, size_t bytes);
void banks_rows(const Where& where, const uint32_t* rows, int count);
void banks_end_launch();

}  // namespace emu
