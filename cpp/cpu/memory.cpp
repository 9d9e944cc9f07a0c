#include "moe/memory.h"

#include <algorithm>
#include <cstdlib>
#include <mutex>
#include <vector>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "moe/huge_pages.h"

namespace moe {
namespace {

constexpr size_t kPage = size_t{2} << 20;
constexpr size_t kMisfit = 8;  // a block may be larger by an eighth than what was asked for

#if defined(__linux__)
// Aligned to kPage: more than is needed is mapped, and what lies before and after it is unmapped.
void* map(size_t bytes) {
  void* mapped = mmap(nullptr, bytes + kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  char* begin = static_cast<char*>(mapped);
  const size_t before = (kPage - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
  if (before > 0) munmap(begin, before);
  if (before < kPage) munmap(begin + before + bytes, kPage - before);
  advise_huge_pages(begin + before, bytes);
  return begin + before;
}
void unmap(Block block) { munmap(block.data, block.bytes); }
bool mark_as_free(Block block) { return madvise(block.data, block.bytes, MADV_FREE) == 0; }
#else
void* map(size_t bytes) { return std::aligned_alloc(kPage, bytes); }
void unmap(Block block) { std::free(block.data); }
bool mark_as_free(Block) { return false; }  // nothing would take the pages back: nothing is kept
#endif

class KeptBlocks {
 public:
  // NOTE: never destroyed: tensors may outlive whatever is.
  static KeptBlocks& instance() {
    static KeptBlocks& blocks = *new KeptBlocks;
    return blocks;
  }

  Block take(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kPage - 1) / kPage * kPage;
    std::vector<Block> dropped;
    Block found{nullptr, bytes};
    {
      const std::lock_guard lock(mutex_);
      // The one that fits best; of several, the one given back last, whose pages are the likeliest to be there still.
      auto best = kept_.end();
      for (auto block = kept_.begin(); block != kept_.end(); ++block) {
        const bool fits = block->bytes >= bytes && block->bytes - bytes <= bytes / kMisfit;
        if (fits && (best == kept_.end() || block->bytes <= best->bytes)) best = block;
      }
      if (best != kept_.end()) {
        found = *best;
        kept_.erase(best);
        use_.kept -= found.bytes;
      }
      use_.used += found.bytes;
      use_.most_used = std::max(use_.most_used, use_.used);
      while (use_.used + use_.kept > use_.most_used) {  // the oldest first
        dropped.push_back(kept_.front());
        use_.kept -= kept_.front().bytes;
        kept_.erase(kept_.begin());
      }
    }
    for (const Block& block : dropped) unmap(block);
    if (found.data == nullptr) found.data = map(found.bytes);
    if (found.data == nullptr) {
      const std::lock_guard lock(mutex_);
      use_.used -= found.bytes;
    }
    return found;
  }

  void give(Block block) {
    // Before anybody else can have it: the mark drops what is written before the next write.
    const bool keep = mark_as_free(block);
    {
      const std::lock_guard lock(mutex_);
      use_.used -= block.bytes;
      if (keep) {
        kept_.push_back(block);
        use_.kept += block.bytes;
      }
    }
    if (!keep) unmap(block);
  }

  BlockUse use() {
    const std::lock_guard lock(mutex_);
    return use_;
  }

 private:
  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  BlockUse use_{};
};

}  // namespace

Block take_block(size_t bytes) { return KeptBlocks::instance().take(bytes); }
void give_block(Block block) {
  if (block.data != nullptr) KeptBlocks::instance().give(block);
}
BlockUse block_use() { return KeptBlocks::instance().use(); }

}  // namespace moe
