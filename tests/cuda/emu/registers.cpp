// setmaxnreg: the registers of a block, which its warps release and take. A block has what its threads were launched
// with and no more, so that a warp that takes more than the others release waits for ever.
#include "state.h"

namespace emu {
namespace {

struct Change {
  bool takes;
  int count;  // per thread, afterwards
};

// As kernels are compiled here: with as many as a block of that size can have.
int at_launch(const Block& block) { return std::min(65536 / std::max(block.num_threads, 32) / 8 * 8, 256); }

int registers_of(Warp* warp) {
  if (warp->registers == 0) warp->registers = at_launch(*warp->block);
  return warp->registers;
}

void finish_change(uint32_t, void* const* argument, const Where& where) {
  Warp* warp = current->warp;
  const auto& change = *static_cast<const Change*>(argument[current->lane]);
  const int had = registers_of(warp);
  if (change.takes ? change.count < had : change.count > had) {
    fail(where, "setmaxnreg.%s to %d registers by a warp that has %d", change.takes ? "inc" : "dec", change.count, had);
  }
  if (change.takes) return;
  warp->registers = change.count;
  Block* block = warp->block;
  block->free_registers += 32 * (had - change.count);
  for (Fiber* f : block->want_registers) make_ready(f);
  block->want_registers.clear();
}

}  // namespace

void setmaxnreg(bool takes, int count, const Where& where) {
  Change change{takes, count};
  collective(takes ? "setmaxnreg.inc" : "setmaxnreg.dec", ~0u, &change, finish_change, Lanes::kFullWarp, where);
  if (!takes) return;
  Warp* warp = current->warp;
  Block* block = warp->block;
  while (block->free_registers < 32 * (count - warp->registers)) {  // of 0, once another lane came first
    block->want_registers.push_back(current);
    wait_for("setmaxnreg.inc", where);
  }
  block->free_registers -= 32 * (count - warp->registers);
  warp->registers = count;
}

}  // namespace emu
