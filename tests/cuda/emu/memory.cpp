// Shared memory of a block, and the regions that cudaMalloc gave.
#include <map>

#include "emu/state.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#define RED_ZONE 16
#else
#define __asan_poison_memory_region(p, n) (void)0
#define __asan_unpoison_memory_region(p, n) (void)0
#define RED_ZONE 0
#endif

namespace emu {

std::map<const char*, Region> regions;
Region* last_region = nullptr;

namespace {
std::vector<std::pair<char*, Shadow*>> free_arenas;
}

void take_arena(Block& b) {
  if (free_arenas.empty()) {
    char* arena = static_cast<char*>(aligned_alloc(4096, kArena));
    __asan_poison_memory_region(arena, kArena);
    free_arenas.emplace_back(arena, checks_races ? static_cast<Shadow*>(calloc(kSmemSize, sizeof(Shadow))) : nullptr);
  }
  std::tie(b.arena, b.shadow) = free_arenas.back();
  free_arenas.pop_back();
}

void open_shared(Block& b, size_t begin, size_t bytes) {
  __asan_unpoison_memory_region(b.arena + begin, bytes);
  memset(b.arena + begin, 0xff, bytes);  // NaN as float, bf16 and half
}

void release_arena(Block& b) {
  const std::pair<size_t, size_t> opened[] = {{0, b.dynamic_size}, {b.static_begin, kSmemSize - b.static_begin}};
  for (const auto& [begin, bytes] : opened) {
    __asan_poison_memory_region(b.arena + begin, bytes);
    if (checks_races) memset(static_cast<void*>(b.shadow + begin), 0, bytes * sizeof(Shadow));
  }
  free_arenas.emplace_back(b.arena, b.shadow);
}

char* dynamic_smem() { return current->block->arena; }

char* static_smem(const void* tag, size_t bytes, size_t align, const Where& where) {
  Block* b = current->block;
  auto it = b->statics.find(tag);
  if (it == b->statics.end()) {
    b->static_begin = (b->static_begin - bytes) & ~(std::max<size_t>(align, 16) - 1);
    if (b->static_begin < b->dynamic_size + RED_ZONE) fail(where, "static and dynamic shared memory exceed 227 KB");
    b->static_bytes += (bytes + align - 1) / align * align;
    // As nvcc lays them out: first the arrays, then the dynamic part, at a multiple of its alignment.
    if ((b->static_bytes + 1023) / 1024 * 1024 + b->dynamic_size > smem_limit)
      fail(where, "static and dynamic shared memory exceed %zu KB", smem_limit / 1024);
    it = b->statics.emplace(tag, static_cast<uint32_t>(b->static_begin)).first;
    open_shared(*b, b->static_begin, bytes);
    b->static_begin -= RED_ZONE;
  }
  return b->arena + it->second;
}

uint32_t smem_address(const void* p, const Where& where) {
  const ptrdiff_t offset = static_cast<const char*>(p) - current->block->arena;
  if (offset < 0 || offset >= static_cast<ptrdiff_t>(kSmemSize)) fail(where, "%p is not in shared memory", p);
  return kSmemBase + static_cast<uint32_t>(offset);
}

Block* owner_of(uint32_t address, const Where& where) {
  const uint32_t window = address / kSmemWindow;
  if (window == 0) return current->block;
  auto& blocks = current->block->cluster->blocks;
  if (window > blocks.size()) fail(where, "shared address 0x%x is of no block of this cluster", address);
  Block* b = blocks[window - 1].get();
  if (b->live == 0) fail(where, "shared address 0x%x is of a block that has exited", address);
  return b;
}

char* smem_pointer(Block* b, uint32_t address, size_t bytes, size_t align, const Where& where) {
  const uint32_t o = address - kSmemBase;
  const bool inside =
      address >= kSmemBase && (o + bytes <= b->dynamic_size || (o >= b->static_begin && o + bytes <= kSmemSize));
  if (!inside)
    fail(where, "shared address 0x%x..+%zu is out of bounds (%zu dynamic bytes)", address, bytes, b->dynamic_size);
  if (address % align) fail(where, "shared address 0x%x is not aligned to %zu", address, align);
  return b->arena + o;
}

Region* find_region(const void* p) {
  const auto holds = [&](const Region& r) {
    return static_cast<size_t>(static_cast<const char*>(p) - r.base) < r.bytes;
  };
  if (last_region != nullptr && holds(*last_region)) return last_region;
  auto it = regions.upper_bound(static_cast<const char*>(p));
  if (it == regions.begin() || !holds((--it)->second)) return nullptr;
  return last_region = &it->second;
}

void expect_written_once(const void* p, size_t bytes) {
  Region* r = find_region(p);
  if (!checks_races || r == nullptr) return;
  r->once_begin = static_cast<size_t>(static_cast<const char*>(p) - r->base);
  r->once_bytes = bytes;
  r->writes.assign(r->bytes, 0);
}

bool check_written_once(const void* p) {
  Region* r = find_region(p);
  if (r == nullptr || r->writes.empty()) return true;
  bool ok = true;
  for (size_t i = 0; i < r->once_bytes && ok; ++i)
    if (r->writes[r->once_begin + i] != 1) {
      fprintf(stderr, "EMU: byte %zu of %zu was written %d times, not once\n", i, r->once_bytes,
              r->writes[r->once_begin + i]);
      ok = false;
    }
  r->writes.clear();
  return ok;
}

}  // namespace emu

extern "C" {
cudaError_t cudaMalloc(void** p, size_t bytes) {
  *p = nullptr;
  if (posix_memalign(p, 256, bytes ? bytes : 1)) return cudaErrorMemoryAllocation;
  memset(*p, 0xff, bytes);  // NaN
  char* base = static_cast<char*>(*p);
  emu::regions[base] = emu::Region{base, bytes, {}, {}};
  return cudaSuccess;
}
cudaError_t cudaFree(void* p) {
  emu::last_region = nullptr;
  emu::regions.erase(static_cast<char*>(p));
  free(p);
  return cudaSuccess;
}
}
