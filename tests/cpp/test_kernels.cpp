// The micro-kernels by themselves, on every size of tile that they have: the operators reach some of them rarely.
#include "gemm/ahead.h"
#include "gemm/kernels.h"

#include "support.h"

namespace moe::test {
namespace {

// Widths of `outer` in numbers: whole vectors, and with a narrow one at the end.
template <typename Storage>
std::vector<int64_t> widths(const Kernels<Storage>& table, int64_t rows) {
  std::vector<int64_t> found;
  for (int64_t width = table.narrow_lanes; width <= table.panel(); width += table.narrow_lanes) {
    if (rows * ((width + table.lanes - 1) / table.lanes) <= table.accumulators) found.push_back(width);
  }
  return found;
}

// c = what `how` makes of a tile that holds `before`, against sums of products; nothing beside the tile is written.
// `factors(i, j, x, add)` calls add with each product of step x.
template <typename Real, typename Outer, typename Products>
void check_tile(const Outer& outer, int64_t rows, int64_t width, TileStore how, int64_t k, const Products& products) {
  const int64_t ldc = width + 16;  // rows stay on multiples of kStreamAlignment when the width does
  const auto before = random_values<Real>(rows * ldc + 64, 5);
  std::vector<Real> memory = before;
  const size_t misaligned = reinterpret_cast<uintptr_t>(memory.data()) % kStreamAlignment / sizeof(Real);
  Real* c = memory.data() + (kStreamAlignment / sizeof(Real) - misaligned) % (kStreamAlignment / sizeof(Real));
  const int64_t begin = c - memory.data();
  outer(c, ldc, how);
  bool close = true, untouched = true;
  for (int64_t i = 0; i < static_cast<int64_t>(memory.size()); ++i) {
    const int64_t row = (i - begin) / ldc, column = (i - begin) % ldc;
    if (i < begin || row >= rows || column >= width) {
      untouched &= std::memcmp(&memory[i], &before[i], sizeof(Real)) == 0;
      continue;
    }
    Sum sum;
    if (how == TileStore::kAdd) sum.add(before[i]);
    for (int64_t x = 0; x < k; ++x) products(row, column, x, sum);
    close &= is_close(memory[i], sum);
  }
  CHECK(close);
  CHECK(untouched);
}

TEST(kernels_outer_on_every_tile) {
  for_each_type([]<typename Storage>(std::type_identity<Storage>) {
    using Real = Wide<Storage>;
    const Kernels<Storage>& table = kernels<Storage>();
    for (int64_t rows = 1; rows <= kMaxTileRows; ++rows) {
      for (const int64_t width : widths(table, rows)) {
        for (const int64_t k : {0, 1, 7}) {
          const Context c(std::to_string(rows) + " x " + std::to_string(width) + " x " + std::to_string(k));
          const auto p = random_values<Real>(rows * k, 1), q = random_values<Real>(k * (width + 3), 2);
          const Real* row[kMaxTileRows];
          for (int64_t i = 0; i < rows; ++i) row[i] = p.data() + i * k;
          for (const TileStore how : {TileStore::kWrite, TileStore::kAdd, TileStore::kStream}) {
            // Only whole vectors go past the caches.
            if (how == TileStore::kStream && (width % table.lanes != 0 || width * sizeof(Real) % 64 != 0)) continue;
            check_tile<Real>(
                [&](Real* tile, int64_t ldc, TileStore store) {
                  table.outer(static_cast<int>(rows), static_cast<int>(width), row, q.data(), width + 3, k, tile, ldc,
                              store, {});
                  table.finish_streams();
                },
                rows, width, how, k,
                [&](int64_t i, int64_t j, int64_t x, Sum& sum) {
                  sum.add(static_cast<double>(row[i][x]) * q[x * (width + 3) + j]);
                });
          }
        }
      }
    }
  });
}

// Rows of a factor in pairs, as pack_pairs and pack_pairs_transposed make them.
TEST(kernels_pairs_on_every_tile) {
  const Kernels<BFloat16>& table = kernels<BFloat16>();
  CHECK((table.outer_pairs == nullptr) == (table.pack_pairs == nullptr));
  CHECK((table.outer_pairs == nullptr) == (table.pack_pairs_transposed == nullptr));
  if (table.outer_pairs == nullptr) return;
  for (int64_t rows = 1; rows <= kMaxTileRows; ++rows) {
    for (const int64_t width : widths(table, rows)) {
      for (const int64_t k : {1, 2, 7, 40}) {
        const Context c(std::to_string(rows) + " x " + std::to_string(width) + " x " + std::to_string(k));
        const auto left = random_values<BFloat16>(k * rows, 1), right = random_values<BFloat16>(k * width, 2);
        std::vector<const BFloat16*> left_rows, right_rows;
        for (int64_t x = 0; x < k; ++x) left_rows.push_back(left.data() + x * rows);
        for (int64_t x = 0; x < k; ++x) right_rows.push_back(right.data() + x * width);
        const int64_t pairs = (k + 1) / 2, ld = (pairs + table.lanes - 1) / table.lanes * table.lanes;
        const int64_t panel = (width + table.lanes - 1) / table.lanes * table.lanes;
        auto p = unwritten<float>(rows * ld), q = unwritten<float>(pairs * panel);
        table.pack_pairs_transposed(left_rows.data(), k, rows, ld, p.data());
        table.pack_pairs(right_rows.data(), k, width, panel, q.data());
        const float* row[kMaxTileRows];
        for (int64_t i = 0; i < rows; ++i) row[i] = p.data() + i * ld;
        for (const TileStore how : {TileStore::kWrite, TileStore::kAdd}) {
          check_tile<float>(
              [&](float* tile, int64_t ldc, TileStore store) {
                table.outer_pairs(static_cast<int>(rows), static_cast<int>(width), row, q.data(), panel, pairs, tile,
                                  ldc, store, {});
              },
              rows, width, how, k,
              [&](int64_t i, int64_t j, int64_t x, Sum& sum) {
                sum.add(static_cast<double>(widen(left[x * rows + i])) * widen(right[x * width + j]));
              });
        }
      }
    }
  }
}

// Panels are padded with zeros, in width and in the second half of the last pair.
TEST(kernels_packed_pairs_are_padded) {
  const Kernels<BFloat16>& table = kernels<BFloat16>();
  if (table.pack_pairs == nullptr) return;
  const int64_t panel = table.panel();
  for (const int64_t k : {1, 2, 5}) {
    for (const int64_t n : {int64_t{1}, panel - 1, panel, panel + 17}) {
      const Context c(std::to_string(k) + " x " + std::to_string(n));
      const auto values = random_values<BFloat16>(k * n, 3);
      std::vector<const BFloat16*> rows;
      for (int64_t x = 0; x < k; ++x) rows.push_back(values.data() + x * n);
      const int64_t pairs = (k + 1) / 2, panels = (n + panel - 1) / panel;
      auto packed = unwritten<float>(panels * pairs * panel);
      table.pack_pairs(rows.data(), k, n, panel, packed.data());
      bool same = true;
      for (int64_t at = 0; at < static_cast<int64_t>(packed.size()); ++at) {
        const int64_t j = at / (pairs * panel) * panel + at % panel, x = at % (pairs * panel) / panel;
        BFloat16 pair[2];
        std::memcpy(pair, &packed[at], sizeof(pair));
        for (int64_t half = 0; half < 2; ++half) {
          const bool there = j < n && 2 * x + half < k;
          same &= widen(pair[half]) == (there ? widen(values[(2 * x + half) * n + j]) : 0.0f);
        }
      }
      CHECK(same);
    }
  }
}

// However rows are cut into calls, all of their lines are fetched, in their order, and nothing far from them.
TEST(kernels_rows_ahead_covers_every_line) {
  for (const int64_t rows : {0, 1, 3, 8, 64}) {
    for (const int64_t lines : {1, 2, 6, 12, 13}) {
      for (const int64_t steps : {1, 7, 64, 2000}) {
        const int64_t calls = std::max<int64_t>(rows * ((lines + 3) / 4) / steps + 1, 3), stride = lines * 64 + 4096;
        const Context c(std::to_string(rows) + " x " + std::to_string(lines) + " in " + std::to_string(steps));
        const std::vector<char> memory(static_cast<size_t>(rows * stride + 1));
        RowsAhead ahead(memory.data(), rows, stride, lines * 64, calls * steps);
        std::vector<int64_t> seen;
        for (int64_t call = 0; call < calls; ++call) {
          Fetch fetch = ahead.next(steps);
          if (fetch.at == nullptr) continue;
          int64_t at = fetch.at - memory.data();
          for (int64_t x = 0; x < steps; ++x) {
            for (int64_t line = 0; line < fetch.lines; ++line) seen.push_back(at + line * 64);
            at += fetch.lines * 64;
            if (--fetch.left == 0) at += fetch.skip, fetch.left = fetch.steps;
          }
        }
        CHECK(std::is_sorted(seen.begin(), seen.end()));
        bool all = true;
        for (int64_t r = 0; r < rows; ++r) {
          for (int64_t l = 0; l < lines; ++l) {
            all &= std::binary_search(seen.begin(), seen.end(), r * stride + l * 64);
          }
        }
        CHECK(all);
        if (rows == 0) CHECK(seen.empty());
      }
    }
  }
}

// Every number of rows, and of columns around those whose sums are added up together; rows of the weight are long
// enough for all three fetches, or shorter than a vector. Nothing beside c is written.
TEST(kernels_dot) {
  for_each_type([]<typename Storage>(std::type_identity<Storage>) {
    using Real = Wide<Storage>;
    const Kernels<Storage>& table = kernels<Storage>();
    for (int64_t rows = 1; rows <= kMaxDotRows; ++rows) {
      for (const int64_t columns : {1, 3, 4, 17}) {
        for (const int64_t k : {1, 31, 97, 1100}) {
          const Context context(std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(k));
          const int64_t stride = k + 5, steps = (k + table.dot_step - 1) / table.dot_step;
          const auto left = random_values<Storage>(rows * k, 1), weight = random_values<Storage>(columns * stride, 2);
          auto a = unwritten<Real>(steps * rows * table.dot_width);
          for (int64_t i = 0; i < rows; ++i) {
            table.arrange_for_dot(left.data() + i * k, k, a.data() + i * table.dot_width, rows * table.dot_width);
          }
          for (const TileStore how : {TileStore::kWrite, TileStore::kAdd}) {
            check_tile<Real>(
                [&](Real* c, int64_t ldc, TileStore store) {
                  table.dot(static_cast<int>(rows), columns, a.data(), weight.data(), stride, k,
                            columns == 17 ? nullptr : weight.data(), c, ldc, store);
                },
                rows, columns, how, k,
                [&](int64_t i, int64_t j, int64_t x, Sum& sum) {
                  sum.add(static_cast<double>(widen(left[i * k + x])) * widen(weight[j * stride + x]));
                });
          }
        }
      }
    }
  });
}

// Every number of rows and of columns of a tile; k around whole vectors of four rows. `width` is that of an element: a
// number, or a pair of BFloat16.
template <typename Storage, typename DotFours>
void check_dot_fours(const Kernels<Storage>& table, int64_t width, const DotFours& dot_fours) {
  using Real = Wide<Storage>;
  for (int64_t rows = 1; rows <= table.most_fours_rows; ++rows) {
    const int64_t vectors = (rows + kRowsOfVector - 1) / kRowsOfVector;
    for (int64_t columns = 1; columns <= table.tile_rows(vectors); ++columns) {
      for (const int64_t k : {1, 2, 3, 4, 31, 64}) {
        const Context context(std::to_string(rows) + " x " + std::to_string(columns) + " x " + std::to_string(k));
        const int64_t elements = k * width, stride = elements + width;
        const auto left = random_values<Storage>(rows * elements, 1),
                   weight = random_values<Storage>(columns * stride, 2);
        std::vector<const Real*> a;
        for (int64_t i = 0; i < rows; ++i) a.push_back(reinterpret_cast<const Real*>(left.data() + i * elements));
        auto packed = unwritten<Real>(vectors * kRowsOfVector * (k + table.lanes));
        table.pack_fours(a.data(), rows, k, packed.data());
        // What lies after the last element must not be read as a number.
        const Fetch fetch = k == 31 ? Fetch{reinterpret_cast<const char*>(weight.data()), 2, 3, 3, 64} : Fetch{};
        for (const TileStore how : {TileStore::kWrite, TileStore::kAdd}) {
          check_tile<Real>(
              [&](Real* c, int64_t ldc, TileStore store) {
                dot_fours(static_cast<int>(rows), static_cast<int>(columns), packed.data(),
                          reinterpret_cast<const Real*>(weight.data()), stride / width, k, c, ldc, store, fetch);
              },
              rows, columns, how, elements,
              [&](int64_t i, int64_t j, int64_t x, Sum& sum) {
                sum.add(static_cast<double>(widen(left[i * elements + x])) * widen(weight[j * stride + x]));
              });
        }
      }
    }
  }
}

TEST(kernels_dot_fours) {
  check_dot_fours(kernels<float>(), 1, kernels<float>().dot_fours);
  check_dot_fours(kernels<double>(), 1, kernels<double>().dot_fours);
  const Kernels<BFloat16>& table = kernels<BFloat16>();
  if (table.dot_fours_pairs != nullptr) check_dot_fours(table, 2, table.dot_fours_pairs);
}

}  // namespace
}  // namespace moe::test
