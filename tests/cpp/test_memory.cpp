#include "moe/memory.h"

#include <cstdint>
#include <cstring>
#include <thread>

#include "support.h"

namespace moe::test {
namespace {

constexpr size_t kMiB = size_t{1} << 20;

TEST(memory_blocks_are_aligned_and_large_enough) {
  for (const size_t bytes : {size_t{1}, 4 * kMiB, 5 * kMiB + 1, 64 * kMiB}) {
    const Block block = take_block(bytes);
    CHECK(block.data != nullptr && block.bytes >= bytes);
    CHECK(reinterpret_cast<uintptr_t>(block.data) % (2 * kMiB) == 0);
    std::memset(block.data, 1, block.bytes);
    give_block(block);
  }
  give_block({nullptr, 0});
}

TEST(memory_blocks_are_used_again) {
  const Block first = take_block(32 * kMiB), second = take_block(32 * kMiB);
  CHECK(first.data != second.data);
  std::memset(first.data, 1, first.bytes);
  std::memset(second.data, 2, second.bytes);
  give_block(first);
  const Block again = take_block(31 * kMiB);
  CHECK(again.data == first.data && again.bytes == first.bytes);
  std::memset(again.data, 3, again.bytes);
  CHECK(static_cast<char*>(second.data)[second.bytes - 1] == 2);
  give_block(again);
  // Far larger than what is asked for: not a fit.
  const Block small = take_block(8 * kMiB);
  CHECK(small.data != first.data && small.bytes == 8 * kMiB);
  give_block(small);
  give_block(second);
}

// What is kept for others makes room.
TEST(memory_kept_is_within_what_was_used) {
  const size_t more = block_use().most_used / kMiB * kMiB + 64 * kMiB;
  const Block large = take_block(more);
  CHECK(block_use().used >= more && block_use().most_used >= more);
  give_block(large);
  CHECK(block_use().kept >= more);
  Block blocks[8];
  for (Block& block : blocks) {
    block = take_block(more / 4);
    CHECK(block_use().used + block_use().kept <= block_use().most_used);
  }
  CHECK(block_use().kept < more);  // it had to go
  for (const Block& block : blocks) give_block(block);
  CHECK(block_use().used + block_use().kept <= block_use().most_used);
}

TEST(memory_blocks_are_one_threads_own) {
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int t = 1; t <= 4; ++t) {
    threads.emplace_back([t, &wrong] {
      for (int i = 0; i < 200; ++i) {
        const Block block = take_block(4 * kMiB);
        char* bytes = static_cast<char*>(block.data);
        for (size_t at = 0; at < block.bytes; at += 64 << 10) bytes[at] = static_cast<char>(t);
        std::this_thread::yield();
        for (size_t at = 0; at < block.bytes; at += 64 << 10) wrong += bytes[at] != t;
        give_block(block);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

TEST(memory_use_returns_to_zero) { CHECK(block_use().used == 0); }

}  // namespace
}  // namespace moe::test
