#include <set>

#include "check.h"
#include "units.h"

namespace moe::test {
namespace {

// Threads take turns, and thread 0 takes two: whoever is quick takes more.
TEST(units_are_handed_out_once) {
  for (const UnitOrder order : {UnitOrder::kAscending, UnitOrder::kFromBothEnds}) {
    for (const int64_t threads : {1, 2, 3, 4}) {
      for (const int64_t count : {threads, int64_t{7}, int64_t{24}}) {
        const Context context(std::to_string(count) + " units, " + std::to_string(threads) + " threads");
        UnitsLeft left(count, threads, order);
        std::set<int64_t> taken;
        for (int64_t turn = 0; taken.size() < static_cast<size_t>(count); ++turn) {
          const int64_t thread = std::max<int64_t>(turn % (threads + 1) - 1, 0), unit = left.take(thread);
          CHECK(0 <= unit && unit < count && taken.insert(unit).second);
          if (unit < 0) break;
          const int64_t upcoming = left.upcoming(thread, unit);
          CHECK(upcoming < count && upcoming != unit);
        }
        for (int64_t thread = 0; thread < threads; ++thread) CHECK(left.take(thread) == -1);
      }
    }
  }
}

TEST(units_come_from_both_ends) {
  UnitsLeft left(8, 4, UnitOrder::kFromBothEnds);
  for (const auto& [thread, unit] : {std::pair{0, 0}, {1, 7}, {2, 1}, {3, 6}, {1, 5}, {0, 2}}) {
    CHECK(left.take(thread) == unit);
  }
  CHECK(left.upcoming(0, 2) == 4 && left.upcoming(1, 5) == 3);
}

}  // namespace
}  // namespace moe::test
