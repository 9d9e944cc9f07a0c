// memory: large blocks, kept between calls. A training step frees its gradients and the next one asks for as much; were
// they given back to the system meanwhile, clearing their pages again would take as long as much of the arithmetic
// (where a hypervisor takes back the free pages of its guests, longer than all of it).
//
// Kept blocks are marked as free to take (Linux: MADV_FREE): under pressure the system takes their pages without
// asking. No more is kept than was once in use at the same time: blocks in use and kept blocks together stay within
// that.
#pragma once

#include <cstddef>

namespace moe {

// A smaller block is the allocator's business.
inline constexpr size_t kLargeBlock = size_t{4} << 20;

struct Block {
  void* data;  // aligned to 2 MiB, not initialised; null: there is no memory
  size_t bytes;
};

// At least `bytes`, from the kept blocks if one is hardly larger.
Block take_block(size_t bytes);
// Gives back what take_block returned.
void give_block(Block block);

struct BlockUse {
  size_t used, kept, most_used;  // bytes
};
BlockUse block_use();

}  // namespace moe
