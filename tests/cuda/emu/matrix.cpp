// ldmatrix, stmatrix, mma.sync: the last lane of the warp moves or computes for all.
#include "emu/matrix_elements.h"
#include "emu/state.h"

namespace emu {

namespace {

struct Matrices {
  uint32_t* r;
  const uint32_t* source;
  char* row;
  int count;
  bool transposed;
  uint32_t address;
};

// The two elements (row, column) of lane t's register for one 8x8 matrix.
void elements(int t, bool transposed, int (&row)[2], int (&column)[2]) {
  for (int h = 0; h < 2; ++h) {
    row[h] = transposed ? 2 * (t % 4) + h : t / 4;
    column[h] = transposed ? t / 4 : 2 * (t % 4) + h;
  }
}

void count_banks(void* const* argument, const Where& where) {
  uint32_t rows[32];
  const int n = 8 * static_cast<Matrices*>(argument[0])->count;
  for (int l = 0; l < n; ++l) rows[l] = static_cast<Matrices*>(argument[l])->address;
  banks_rows(where, rows, n);
}

void finish_load(uint32_t, void* const* argument, const Where& where) {
  count_banks(argument, where);
  for (int t = 0; t < 32; ++t) {
    const auto& m = *static_cast<Matrices*>(argument[t]);
    int row[2], column[2];
    elements(t, m.transposed, row, column);
    for (int i = 0; i < m.count; ++i) {
      uint16_t v[2];
      for (int h = 0; h < 2; ++h)
        memcpy(&v[h], static_cast<Matrices*>(argument[8 * i + row[h]])->row + 2 * column[h], 2);
      m.r[i] = v[0] | uint32_t{v[1]} << 16;
    }
  }
}

void finish_store(uint32_t, void* const* argument, const Where& where) {
  count_banks(argument, where);
  for (int t = 0; t < 32; ++t) {
    const auto& m = *static_cast<Matrices*>(argument[t]);
    int row[2], column[2];
    elements(t, m.transposed, row, column);
    for (int i = 0; i < m.count; ++i)
      for (int h = 0; h < 2; ++h) {
        const uint16_t v = static_cast<uint16_t>(m.source[i] >> 16 * h);
        memcpy(static_cast<Matrices*>(argument[8 * i + row[h]])->row + 2 * column[h], &v, 2);
      }
  }
}

struct Mma {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  Element type;
};

void finish_mma(uint32_t, void* const* argument, const Where&) {
  float a[16][16] = {}, b[16][8] = {}, d[16][8];
  const Element type = static_cast<Mma*>(argument[0])->type;
  const bool tf32 = type == Element::kTF32;
  for (int l = 0; l < 32; ++l) {
    const auto& x = *static_cast<Mma*>(argument[l]);
    const int g = l / 4, q = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i & 1);
      if (tf32) a[row][q + 4 * (i >> 1)] = from_tf32(x.a[i]);
      for (int h = 0; h < 2 && !tf32; ++h)
        a[row][2 * q + h + 8 * (i >> 1)] = from_16(static_cast<uint16_t>(x.a[i] >> 16 * h), type);
      d[g + 8 * (i >> 1)][2 * q + (i & 1)] = x.d[i];
    }
    for (int i = 0; i < 2; ++i) {
      if (tf32) b[q + 4 * i][g] = from_tf32(x.b[i]);
      for (int h = 0; h < 2 && !tf32; ++h)
        b[2 * q + h + 8 * i][g] = from_16(static_cast<uint16_t>(x.b[i] >> 16 * h), type);
    }
  }
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < (tf32 ? 8 : 16); ++k)
      for (int n = 0; n < 8; ++n) d[m][n] += a[m][k] * b[k][n];
  for (int l = 0; l < 32; ++l)
    for (int i = 0; i < 4; ++i) static_cast<Mma*>(argument[l])->d[i] = d[l / 4 + 8 * (i >> 1)][2 * (l % 4) + (i & 1)];
}

}  // namespace

void ldmatrix(uint32_t* r, int count, bool transposed, uint32_t address, const Where& where) {
  Matrices m{r, nullptr, nullptr, count, transposed, address};
  if (current->lane < 8 * count) {
    m.row = smem_pointer(current->block, address, 16, 16, where);
    race_access(current->block, address, 16, false, "ldmatrix", where);
  }
  collective("ldmatrix", ~0u, &m, finish_load, Lanes::kFullWarp, where);
}

void stmatrix(uint32_t address, const uint32_t* r, int count, bool transposed, const Where& where) {
  Matrices m{nullptr, r, nullptr, count, transposed, address};
  if (current->lane < 8 * count) {
    m.row = smem_pointer(current->block, address, 16, 16, where);
    race_access(current->block, address, 16, true, "stmatrix", where);
  }
  collective("stmatrix", ~0u, &m, finish_store, Lanes::kFullWarp, where);
}

void mma(float* d, const uint32_t* a, uint32_t b0, uint32_t b1, Element type, const Where& where) {
  Mma m{d, a, {b0, b1}, type};
  collective("mma.sync", ~0u, &m, finish_mma, Lanes::kFullWarp, where);
}

bool elect_one(const Where& where) {
  collective("elect.sync", ~0u, nullptr, nullptr, Lanes::kFullWarp, where);
  return current->lane == 0;  // which lane is not specified; hardware takes the lowest
}

}  // namespace emu
