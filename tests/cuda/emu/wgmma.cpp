// wgmma, one warp (16 rows) at a time. From issue to the wait that retires the last operation on them, accumulators are
// kept aside and their registers hold a NaN: reading early or writing in between shows.
#include "emu/matrix_elements.h"
#include "emu/state.h"

namespace emu {

struct WgmmaOp {
  Wgmma shape;
  bool scale_d, done, a_in_registers;
  uint64_t a, b;
  float* d[32];
  const uint32_t* register_a[32];
  uint32_t a_bits[32][4];
  Where where;
};
struct WgmmaState {
  bool fenced = false;
  std::vector<WgmmaOp> open;
  std::deque<std::vector<WgmmaOp>> groups;
  struct Accumulator {
    std::vector<float> value;  // [32][n / 2]
    int operations = 0;
  };
  std::unordered_map<float*, Accumulator> accumulators;  // by the registers of lane 0
  uint64_t issued = 0;
};
void WgmmaStateDeleter::operator()(WgmmaState* s) const { delete s; }

namespace {

constexpr uint32_t kInFlightBits = 0x7fc0dead;  // a NaN

struct Descriptor {
  uint32_t start, leading, stride, base_offset, swizzle;
  explicit Descriptor(uint64_t d)
      : start(static_cast<uint32_t>(d & 0x3fff) << 4),
        leading(static_cast<uint32_t>(d >> 16 & 0x3fff) << 4),
        stride(static_cast<uint32_t>(d >> 32 & 0x3fff) << 4),
        base_offset(static_cast<uint32_t>(d >> 49 & 7)),
        swizzle(static_cast<uint32_t>(d >> 62)) {}

  // Where the chunk of 8 elements is that holds, K-major, row i and k 8c .. 8c + 7; MN-major, k i and rows 8c .. 8c
  // + 7.
  uint32_t chunk(bool mn_major, uint32_t i, uint32_t c) const {
    constexpr int kMode[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_SWIZZLE_64B,
                             CU_TENSOR_MAP_SWIZZLE_32B};
    const uint32_t width = swizzle == 0 ? 1 : 16 >> swizzle;  // chunks in a row of the swizzle pattern
    uint32_t at = start + i % 8 * 16 * width;
    if (!mn_major)
      at += i / 8 * stride + (swizzle ? c * 16 : c * leading);
    else if (swizzle)
      at += c % width * 16 + c / width * leading + i / 8 * stride;
    else
      at += c * stride + i / 8 * leading;
    return emu::swizzle(at, kMode[swizzle]);
  }
};

// Calls visit(is_a, address, row of chunks, chunk) for what this warp reads.
template <typename F>
void for_each_chunk(const WgmmaOp& o, int warp, const F& visit) {
  const uint32_t n = static_cast<uint32_t>(o.shape.n), w = static_cast<uint32_t>(warp);
  if (!o.a_in_registers) {
    const Descriptor a(o.a);
    for (uint32_t i = 0; i < 16; ++i)
      for (uint32_t c = 0; c < 2; ++c)
        visit(true, o.shape.trans_a ? a.chunk(true, i, 2 * w + c) : a.chunk(false, 16 * w + i, c), i, c);
  }
  const Descriptor b(o.b);
  for (uint32_t i = 0; i < (o.shape.trans_b ? 16 : n); ++i)
    for (uint32_t c = 0; c < (o.shape.trans_b ? n / 8 : 2); ++c) visit(false, b.chunk(o.shape.trans_b, i, c), i, c);
}

#pragma GCC push_options
#pragma GCC optimize("O3")
__attribute__((target_clones("avx512f", "avx2", "default"))) void multiply(float (*d)[256], const float (*a)[16],
                                                                           const float (*b)[256], int n) {
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k) {
      const float x = a[m][k];
      for (int j = 0; j < n; ++j) d[m][j] += x * b[k][j];
    }
}
#pragma GCC pop_options

int row_of(int lane, int i) { return lane / 4 + 8 * (i >> 1 & 1); }
int column_of(int lane, int i) { return i / 4 * 8 + lane % 4 * 2 + (i & 1); }

void execute(Block* block, const WgmmaOp& o, int warp, std::vector<float>& values) {
  static float a[16][16], b[16][256], d[16][256];
  for_each_chunk(o, warp, [&](bool is_a, uint32_t address, uint32_t i, uint32_t c) {
    uint16_t bits[8];
    memcpy(bits, smem_pointer(block, address, 16, 16, o.where), 16);
    const bool transposed = is_a ? o.shape.trans_a : o.shape.trans_b;
    for (uint32_t e = 0; e < 8; ++e) {
      const float x = from_16(bits[e], o.shape.type);
      const uint32_t j = 8 * c + e;
      if (is_a)
        (transposed ? a[j][i] : a[i][j]) = x;
      else
        (transposed ? b[i][j] : b[j][i]) = x;
    }
  });
  for (int l = 0; l < 32 && o.a_in_registers; ++l)
    for (int i = 0; i < 4; ++i)
      for (int h = 0; h < 2; ++h)
        a[l / 4 + 8 * (i & 1)][2 * (l % 4) + h + 8 * (i >> 1)] =
            from_16(static_cast<uint16_t>(o.a_bits[l][i] >> 16 * h), o.shape.type);
  const int registers = o.shape.n / 2;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < registers; ++i)
      d[row_of(l, i)][column_of(l, i)] = o.scale_d ? values[static_cast<size_t>(l * registers + i)] : 0.f;
  multiply(d, a, b, o.shape.n);
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < registers; ++i)
      values[static_cast<size_t>(l * registers + i)] = d[row_of(l, i)][column_of(l, i)];
}

struct Argument {
  WgmmaOp op;
  float* d;
  const uint32_t* register_a;
};

WgmmaState& state_of(Warp* w) {
  if (!w->wgmma) w->wgmma.reset(new WgmmaState);
  return *w->wgmma;
}

void check_descriptor(uint64_t bits, const Where& where) {
  const Descriptor d(bits);
  if (d.base_offset) fail(where, "wgmma: a base offset (%u) is not emulated", d.base_offset);
  if (d.swizzle == 1 && d.start & 0x380)
    fail(where, "wgmma: a 128B-swizzled operand at 0x%x, which is not where a pattern of 1024 bytes begins", d.start);
}

void finish_issue(uint32_t, void* const* argument, const Where& where) {
  Warp* warp = current->warp;
  Block* block = current->block;
  WgmmaState& s = state_of(warp);
  WgmmaOp o = static_cast<Argument*>(argument[0])->op;
  o.where = where;
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<Argument*>(argument[l]);
    o.d[l] = x.d;
    o.register_a[l] = x.register_a;
    if (o.a_in_registers) memcpy(o.a_bits[l], x.register_a, sizeof o.a_bits[l]);
    if (x.op.a != o.a || x.op.b != o.b || x.op.scale_d != o.scale_d)
      fail(where, "wgmma: descriptors or scale-d differ between the lanes of a warp");
  }
  if (!s.fenced) fail(where, "wgmma without wgmma.fence since the last wait (or the start)");
  if (!o.a_in_registers) check_descriptor(o.a, where);
  check_descriptor(o.b, where);
  auto& log = block->wgmma_log[static_cast<size_t>(warp->index / 4)];
  const uint64_t hash = ((o.a * 31 + o.b) * 31 + static_cast<uint64_t>(o.shape.n)) * 2 + o.scale_d;
  if (s.issued == log.size())
    log.push_back(hash);
  else if (log[s.issued] != hash)
    fail(where, "the warps of warpgroup %d issue different wgmma", warp->index / 4);
  ++s.issued;
  const int w = warp->index % 4;
  if (checks_races)
    for_each_chunk(o, w, [&](bool, uint32_t address, uint32_t, uint32_t) {
      smem_pointer(block, address, 16, 16, where);
      race_issue_read(block, address, 16, "wgmma", where);
    });
  auto& acc = s.accumulators[o.d[0]];
  const int registers = o.shape.n / 2;
  if (acc.operations++ == 0) {
    acc.value.resize(static_cast<size_t>(32 * registers));
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < registers; ++i) {
        acc.value[static_cast<size_t>(l * registers + i)] = o.d[l][i];
        memcpy(&o.d[l][i], &kInFlightBits, 4);
      }
  }
  // Sometimes at once; what it computed is still kept aside until the wait.
  if (s.open.empty() && s.groups.empty() && random_below(4) == 0) {
    execute(block, o, w, acc.value);
    o.done = true;
  }
  s.open.push_back(o);
}

void retire(WgmmaState& s, WgmmaOp& o, int w, const Where& where) {
  Block* block = current->block;
  auto& acc = s.accumulators[o.d[0]];
  for (int l = 0; l < 32 && o.a_in_registers; ++l)
    if (memcmp(o.register_a[l], o.a_bits[l], sizeof o.a_bits[l]))
      fail(where, "a register of A was written while the wgmma that reads it was in flight (lane %d)", l);
  if (!o.done) execute(block, o, w, acc.value);
  if (checks_races)
    for_each_chunk(o, w, [&](bool, uint32_t address, uint32_t, uint32_t) {
      race_read_done(block, address, 16, &current->warp->lanes[0]);
    });
  if (--acc.operations) return;
  const int registers = o.shape.n / 2;
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < registers; ++i) {
      if (memcmp(&o.d[l][i], &kInFlightBits, 4))
        fail(where, "accumulator %d of lane %d was written while a wgmma was in flight", i, l);
      o.d[l][i] = acc.value[static_cast<size_t>(l * registers + i)];
    }
  s.accumulators.erase(o.d[0]);
}

void finish_wait(uint32_t lanes, void* const* argument, const Where& where) {
  WgmmaState& s = state_of(current->warp);
  const size_t keep = static_cast<size_t>(*static_cast<int*>(argument[0]));
  while (s.groups.size() > keep) {
    for (WgmmaOp& o : s.groups.front()) retire(s, o, current->warp->index % 4, where);
    s.groups.pop_front();
  }
  join_lanes(current->warp, lanes);  // one lane may now release a stage for its warp
  if (keep == 0) s.fenced = false;
}

}  // namespace

void wgmma(float* d, const Wgmma& shape, const uint32_t* register_a, uint64_t a, uint64_t b, bool scale_d,
           const Where& where) {
  Argument mine{};
  mine.op.shape = shape;
  mine.op.scale_d = scale_d;
  mine.op.a_in_registers = register_a != nullptr;
  mine.op.a = a;
  mine.op.b = b;
  mine.d = d;
  mine.register_a = register_a;
  collective("wgmma.mma_async", ~0u, &mine, finish_issue, Lanes::kFullWarp, where);
}
void wgmma_fence(const Where& where) {
  collective(
      "wgmma.fence", ~0u, nullptr, [](uint32_t, void* const*, const Where&) { state_of(current->warp).fenced = true; },
      Lanes::kFullWarp, where);
}
void wgmma_commit(const Where& where) {
  collective(
      "wgmma.commit_group", ~0u, nullptr,
      [](uint32_t, void* const*, const Where&) {
        WgmmaState& s = state_of(current->warp);
        s.groups.push_back(std::move(s.open));
        s.open.clear();
      },
      Lanes::kFullWarp, where);
}
void wgmma_wait(int keep, const Where& where) {
  collective("wgmma.wait_group", ~0u, &keep, finish_wait, Lanes::kFullWarp, where);
  yield_point();
}
void wgmma_exit(const Where& where) {
  const auto& s = current->warp->wgmma;
  if (s && (!s->open.empty() || !s->groups.empty())) fail(where, "a thread exits with wgmma in flight");
}

}  // namespace emu
