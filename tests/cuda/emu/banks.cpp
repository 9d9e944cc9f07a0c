// Shared memory has 32 banks of 4 bytes. A warp's access takes as many wavefronts as the most distinct words that fall
// on one bank, separately for each half or quarter of the warp when lanes access 8 or 16 bytes.
#include <map>

#include "emu/state.h"

namespace emu {

bool counts_banks = false;
std::string place_of_pc(const void* pc);

namespace {

struct Access {
  uint32_t lanes = 0, bytes = 0, address[32];
};
struct Site {
  uint32_t times[32] = {};
  std::map<uint32_t, Access> open;  // by how often a lane has been here
};
std::map<std::pair<const Warp*, const void*>, Site> sites;
std::map<const void*, BankCount> by_pc;
std::map<std::string, BankCount> by_line;

uint64_t wavefronts(const uint32_t* words, int count) {  // distinct words on the fullest bank
  uint64_t most = 0;
  for (uint32_t bank = 0; bank < 32; ++bank) {
    std::vector<uint32_t> distinct;
    for (int i = 0; i < count; ++i)
      if (words[i] % 32 == bank && std::find(distinct.begin(), distinct.end(), words[i]) == distinct.end())
        distinct.push_back(words[i]);
    most = std::max<uint64_t>(most, distinct.size());
  }
  return most;
}

void close(const Access& a, BankCount& count) {
  const int words = static_cast<int>(std::max(1u, a.bytes / 4)), lanes_at_once = 32 / words;
  for (int first = 0; first < 32; first += lanes_at_once) {
    std::vector<uint32_t> w;
    for (int l = first; l < first + lanes_at_once; ++l)
      for (int i = 0; i < words && (a.lanes >> l & 1); ++i) w.push_back(a.address[l] / 4 + static_cast<uint32_t>(i));
    if (w.empty()) continue;
    count.wavefronts += wavefronts(w.data(), static_cast<int>(w.size()));
    count.ideal += 1;
  }
}

}  // namespace

void banks_access(Fiber* f, const void* pc, uint32_t address, size_t bytes) {
  Site& site = sites[{f->warp, pc}];
  const uint32_t time = site.times[f->lane]++;
  Access& a = site.open[time];
  a.lanes |= 1u << f->lane;
  a.bytes = static_cast<uint32_t>(std::min<size_t>(bytes, 16));
  a.address[f->lane] = address;
  if (a.lanes != ~0u) return;
  close(a, by_pc[pc]);
  site.open.erase(time);
}

void banks_rows(const Where& where, const uint32_t* rows, int count) {
  if (!counts_banks) return;
  BankCount& total = by_line[place(where)];
  for (int first = 0; first < count; first += 8) {
    uint32_t words[32];
    for (int i = 0; i < 32; ++i) words[i] = rows[first + i / 4] / 4 + static_cast<uint32_t>(i % 4);
    total.wavefronts += wavefronts(words, 32);
    ++total.ideal;
  }
}

void banks_end_launch() {
  for (auto& [key, site] : sites)
    for (auto& [time, access] : site.open) close(access, by_pc[key.second]);
  sites.clear();
}

void count_bank_conflicts(bool on) {
  counts_banks = on && checks_races;
  if (!on) return;
  by_pc.clear();
  by_line.clear();
}

std::vector<BankCount> bank_conflicts() {
  for (auto& [pc, count] : by_pc) {
    BankCount& total = by_line[place_of_pc(pc)];
    total.wavefronts += count.wavefronts;
    total.ideal += count.ideal;
  }
  by_pc.clear();
  std::vector<BankCount> result;
  for (auto& [where, count] : by_line) result.push_back({where, count.wavefronts, count.ideal});
  return result;
}

}  // namespace emu
