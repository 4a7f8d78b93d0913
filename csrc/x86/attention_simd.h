// Attention's loops, written once against Vec. An ISA file includes its vec_*.h first, then this.
//
// For a head of 64 and 128 keys, the two products are 4 million multiplications and additions, 15 us at the rate of FMA
// on AVX-512, and the 16,384 exponentials 2 us: it is a matter of two small matrix products. Both are the same tile,
// rows of a broadcast element by element against panels of a few vectors: scores are q against the keys transposed,
// results are weights against the values, whose columns need no transposition. A block of keys is transposed once for
// all queries that pass over it; the scores of six queries, 6 KiB, stay in L1 from the first product to the second.
#pragma once

#include <math.h>
#include <string.h>

#include "core/attention_kernels.h"
#include "x86/exp_simd.h"
#include "x86/loops_simd.h"

namespace kdq {
namespace {

struct AttentionLoops {
  using F = Vec::Float;
  static constexpr int kLanes = Vec::kLanes;
  static constexpr int kRows = 6;
  static constexpr int kVectors = kLanes == 16 ? 4 : 2;  // with six rows, all but a few of 32 or 16 registers
  // Up to so many queries, products with rows where they are cost less than packing these.
  static constexpr int64_t kFewQueries = 2;
  static constexpr int kWide = 4;        // vectors of a row that are added at once
  static constexpr int64_t kAhead = 48;  // rows that are asked for before they are read

  // Scratch, in floats; rows of `values_wide` are values or results with zeros up to a whole vector.
  struct Layout {
    int64_t block, values_wide, keys, values, sums, scores, queries, total;

    explicit Layout(const Attention& args) {
      block = round_up(args.keys < kKeyBlock ? args.keys : kKeyBlock);
      const int64_t most = args.queries < kMostQueries ? args.queries : kMostQueries;
      values_wide = round_up(args.value_size);
      keys = 0;
      values = keys + block * args.head_size;
      sums = values + block * values_wide;
      scores = sums + most * values_wide;
      queries = scores + kRows * block;
      total = queries + kRows * round_up(args.head_size);
    }
  };

  static int64_t scratch_floats(const Attention& args) { return Layout(args).total; }

  template <class T>
  static void run(const HeadQueries& job, float* scratch) {
    const Attention& args = *job.args;
    const Layout at(args);
    float* sums = scratch + at.sums;
    RowState states[kMostQueries];
    for (int64_t i = 0; i < job.count; ++i) states[i] = {-kInfinity, 0.0F};
    if (args.keys == 0) memset(sums, 0, static_cast<size_t>(job.count * at.values_wide) * sizeof(float));
    const int64_t end = args.causal ? smaller(args.keys, job.first + job.count) : args.keys;
    for (int64_t first = 0; first < end; first += kKeyBlock) {
      const int64_t count = smaller(kKeyBlock, end - first);
      const InPlace<T> block = {static_cast<const T*>(job.k) + first * args.k_strides.row, args.k_strides.row,
                                static_cast<const T*>(job.v) + first * args.v_strides.row, args.v_strides.row};
      if (args.queries <= kFewQueries) {
        pass_all<T>(job, first, count, block, scratch, at, states);
      } else {
        pass_all<T>(job, first, count, pack(block, count, args, scratch, at), scratch, at, states);
      }
    }
    for (int64_t i = 0; i < job.count; ++i) {
      T* y = static_cast<T*>(job.y) + (job.first + i) * args.y_strides.row;
      if (i + kAhead < job.count) prefetch(y + kAhead * args.y_strides.row, args.value_size);
      finish(sums + i * at.values_wide, states[i].sum, args.value_size, y);
    }
  }

 private:
  static constexpr float kInfinity = __builtin_inff();
  static constexpr float kLog2OfE = 1.44269504F;

  // Of a query over the keys so far: the largest score, and the sum of exp(score - largest).
  struct RowState {
    float largest;
    float sum;
  };

  static int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
  static int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

  // Rows of floats, and columns packed in panels of `depth` rows, which share the vectors that the columns need.
  struct Rows {
    const float* data;
    int64_t stride;
    int count;
  };
  struct Panels {
    const float* data;
    int64_t depth;
    int64_t columns;
  };

  // A block of keys and their values, where they are. A few queries do not repay what packing takes.
  template <class T>
  struct InPlace {
    const T* k;
    int64_t k_stride;
    const T* v;
    int64_t v_stride;

    void scores(const Rows& queries, int64_t size, int64_t seen, float* out, int64_t out_stride) const {
      for (int r = 0; r < queries.count; ++r) {
        dot_products(queries.data + r * queries.stride, k, k_stride, size, seen, out + r * out_stride);
      }
    }
    void results(const Rows& weights, int64_t size, int64_t seen, const float* rescale, float* out,
                 int64_t out_stride) const {
      for (int r = 0; r < weights.count; ++r) {
        const float* own = rescale == nullptr ? nullptr : rescale + r;
        add_rows(weights.data + r * weights.stride, v, v_stride, size, seen, own, out + r * out_stride);
      }
    }
  };

  // The same as panels.
  struct Packed {
    Panels keys;
    Panels values;

    void scores(const Rows& queries, int64_t size, int64_t seen, float* out, int64_t out_stride) const {
      product(queries, keys, size, seen, nullptr, out, out_stride);
    }
    void results(const Rows& weights, int64_t size, int64_t seen, const float* rescale, float* out,
                 int64_t out_stride) const {
      product(weights, values, seen, size, rescale, out, out_stride);
    }
  };

  template <class T>
  static Packed pack(const InPlace<T>& block, int64_t keys, const Attention& args, float* scratch, const Layout& at) {
    pack_keys(block.k, block.k_stride, keys, args.head_size, scratch + at.keys);
    pack_values(block.v, block.v_stride, keys, args.value_size, scratch + at.values);
    return {{scratch + at.keys, args.head_size, keys}, {scratch + at.values, keys, args.value_size}};
  }

  // All queries of the job over a block of `count` keys.
  template <class T, class Block>
  static void pass_all(const HeadQueries& job, int64_t first_key, int64_t count, const Block& block, float* scratch,
                       const Layout& at, RowState* states) {
    for (int64_t i = 0; i < job.count; i += kRows) {
      const int rows = static_cast<int>(smaller(kRows, job.count - i));
      const int64_t seen = job.args->causal ? smaller(count, job.first + i + rows - first_key) : count;
      if (seen > 0) pass<T>(job, i, rows, first_key, seen, block, scratch, at, states + i);
    }
  }

  // Queries first + i ... of a group over the first `seen` keys of a block.
  template <class T, class Block>
  static void pass(const HeadQueries& job, int64_t i, int rows, int64_t first_key, int64_t seen, const Block& block,
                   float* scratch, const Layout& at, RowState* states) {
    const Attention& args = *job.args;
    const int64_t query = job.first + i;
    const Rows queries = {scratch + at.queries, round_up(args.head_size), rows};
    const Rows scores = {scratch + at.scores, at.block, rows};
    const F to_base_2 = Vec::set(args.scale * kLog2OfE);
    for (int r = 0; r < rows; ++r) {
      const T* q = static_cast<const T*>(job.q) + (query + r) * args.q_strides.row;
      float* row = scratch + at.queries + r * queries.stride;
      if (query + r + kRows < args.queries) prefetch(q + kRows * args.q_strides.row, args.head_size);
      for_each_vector(args.head_size, [&](int64_t d, int n) __attribute__((always_inline)) {
        Vec::store(row + d, Vec::mul(load(q + d, n), to_base_2));
      });
    }
    block.scores(queries, args.head_size, seen, scratch + at.scores, scores.stride);
    int64_t own[kRows];
    for (int r = 0; r < rows; ++r) {
      own[r] = args.causal ? smaller(seen, query + r + 1 - first_key) : seen;
      if (args.mask_kind != MaskKind::kNone) {
        add_mask(job, query + r, first_key, own[r], scratch + at.scores + r * scores.stride);
      }
    }
    float rescale[kRows];
    soften(rows, own, seen, scratch + at.scores, scores.stride, states, rescale);
    block.results(scores, args.value_size, seen, first_key == 0 ? nullptr : rescale,
                  scratch + at.sums + i * at.values_wide, at.values_wide);
  }

  // Rows of an operand lie up to kilobytes apart, which no CPU's own prefetching follows.
  template <class T>
  static void prefetch(const T* row, int64_t size) {
    const char* bytes = reinterpret_cast<const char*>(row);
    for (int64_t i = 0; i < size * static_cast<int64_t>(sizeof(T)); i += kLine) _mm_prefetch(bytes + i, _MM_HINT_T0);
  }

  // q against rows of k: the products of a vector's worth of keys are transposed, to be added up.
  template <class T>
  static void dot_products(const float* q, const T* k, int64_t stride, int64_t size, int64_t keys, float* out) {
    for (int64_t first = 0; first < keys; first += kLanes) {
      F sums[kLanes];
      const T* rows[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        sums[j] = Vec::zero();
        rows[j] = k + smaller(first + j, keys - 1) * stride;
        prefetch(rows[j] + (first + kLanes + j < keys ? kLanes * stride : 0), size);
      }
      for_each_vector(size, [&](int64_t d, int n) __attribute__((always_inline)) {
        const F part = Vec::load(q + d);
#pragma GCC unroll 16
        for (int j = 0; j < kLanes; ++j) sums[j] = Vec::fma(load(rows[j] + d, n), part, sums[j]);
      });
      Vec::transpose(sums);
#pragma GCC unroll 4
      for (int step = kLanes / 2; step > 0; step /= 2) {
        for (int j = 0; j < step; ++j) sums[j] = Vec::add(sums[j], sums[j + step]);
      }
      Vec::store(out + first, sums[0]);
    }
  }

  // out = out * rescale + the rows of v, each with its weight; without rescale, without what was there. Some vectors of
  // two rows at a time, so that no sum waits for the one before.
  template <class T>
  static void add_rows(const float* weights, const T* v, int64_t stride, int64_t size, int64_t keys,
                       const float* rescale, float* out) {
    const int64_t whole = size / (kWide * kLanes) * (kWide * kLanes);
    for (int64_t c = 0; c < whole; c += kWide * kLanes) {
      add_columns<kWide>(weights, v + c, stride, kLanes, keys, rescale, out + c);
    }
    for_each_vector(size - whole, [&](int64_t c, int n) __attribute__((always_inline)) {
      add_columns<1>(weights, v + whole + c, stride, n, keys, rescale, out + whole + c);
    });
  }

  template <int kCount, class T>
  static inline __attribute__((always_inline)) void add_columns(const float* weights, const T* v, int64_t stride, int n,
                                                                int64_t keys, const float* rescale, float* out) {
    F sums[2][kCount];
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) {
      const F before = rescale == nullptr ? Vec::zero() : Vec::mul(Vec::load(out + j * kLanes), Vec::set(*rescale));
      sums[0][j] = before;
      sums[1][j] = Vec::zero();
    }
    const auto add = [&](int64_t key, F(&sum)[kCount]) __attribute__((always_inline)) {
      if (key + kAhead < keys) prefetch(v + (key + kAhead) * stride, kCount * kLanes);
      const F weight = Vec::set(weights[key]);
#pragma GCC unroll 4
      for (int j = 0; j < kCount; ++j) sum[j] = Vec::fma(weight, load(v + key * stride + j * kLanes, n), sum[j]);
    };
    int64_t key = 0;
    for (; key + 2 <= keys; key += 2) {
      add(key, sums[0]);
      add(key + 1, sums[1]);
    }
    if (key < keys) add(key, sums[0]);
#pragma GCC unroll 4
    for (int j = 0; j < kCount; ++j) Vec::store(out + j * kLanes, Vec::add(sums[0][j], sums[1][j]));
  }

  // Panels that columns need, and the first column of each: as equal as whole vectors allow, as a tile of one vector
  // has too few sums to keep the units busy.
  static int64_t panels_of(int64_t columns) {
    const int64_t vectors = round_up(columns) / kLanes;
    return (vectors + kVectors - 1) / kVectors;
  }
  static int64_t column_of(int64_t panel, int64_t columns) {
    return panel * (round_up(columns) / kLanes) / panels_of(columns) * kLanes;
  }

  // k [keys, size] transposed: lane j of a panel's vectors is key j.
  template <class T>
  static void pack_keys(const T* k, int64_t stride, int64_t keys, int64_t size, float* out) {
    for (int64_t panel = 0; panel < panels_of(keys); ++panel) {
      const int64_t end = column_of(panel + 1, keys);
      const int64_t begin = column_of(panel, keys);
      for (int64_t first = begin; first < end; first += kLanes) {
        for_each_vector(size, [&](int64_t d, int n) __attribute__((always_inline)) {
          F square[kLanes];
          for (int j = 0; j < kLanes; ++j) {
            const T* row = k + (first + j) * stride + d;
            square[j] = first + j < keys ? load(row, n) : Vec::zero();
            if (first + j + kAhead < keys) _mm_prefetch(row + kAhead * stride, _MM_HINT_T0);
          }
          Vec::transpose(square);
          for (int j = 0; j < n; ++j) Vec::store(out + (d + j) * (end - begin) + first - begin, square[j]);
        });
      }
      out += (end - begin) * size;
    }
  }

  template <class T>
  static void pack_values(const T* v, int64_t stride, int64_t keys, int64_t size, float* out) {
    for (int64_t panel = 0; panel < panels_of(size); ++panel) {
      const int64_t first = column_of(panel, size);
      const int64_t wide = column_of(panel + 1, size) - first;
      for (int64_t key = 0; key < keys; ++key) {
        if (key + kAhead < keys) prefetch(v + (key + kAhead) * stride + first, smaller(wide, size - first));
        for_each_vector(smaller(wide, size - first), [&](int64_t c, int n) __attribute__((always_inline)) {
          Vec::store(out + c, load(v + key * stride + first + c, n));
        });
        out += wide;
      }
    }
  }

  // out [rows, columns] = out * rescale + a b over the first `depth` of b's rows; without rescale, out = a b. The first
  // `columns` of b's, up to whole vectors.
  static void product(const Rows& a, const Panels& b, int64_t depth, int64_t columns, const float* rescale, float* out,
                      int64_t out_stride) {
    const float* data = b.data;
    for (int64_t panel = 0; panel < panels_of(b.columns); ++panel) {
      const int64_t first = column_of(panel, b.columns);
      if (first >= columns) return;
      const int64_t wide = column_of(panel + 1, b.columns) - first;
      const int64_t vectors = smaller(wide, round_up(columns - first)) / kLanes;
      tile_of(a.count, vectors)(a, data, wide, depth, rescale, out + first, out_stride);
      data += wide * b.depth;
    }
  }

  template <int kCount, int kWide>
  static void tile(const Rows& a, const float* b, int64_t b_stride, int64_t depth, const float* rescale, float* out,
                   int64_t out_stride) {
    F sums[kCount][kWide];
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        float* place = out + r * out_stride + j * kLanes;
        sums[r][j] = rescale == nullptr ? Vec::zero() : Vec::mul(Vec::load(place), Vec::set(rescale[r]));
      }
    }
    for (int64_t i = 0; i < depth; ++i) {
      F column[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) column[j] = Vec::load(b + i * b_stride + j * kLanes);
#pragma GCC unroll 6
      for (int r = 0; r < kCount; ++r) {
        const F element = Vec::set(a.data[r * a.stride + i]);
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) {
          sums[r][j] = Vec::fma(element, column[j], sums[r][j]);
          pin(sums[r][j]);
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) Vec::store(out + r * out_stride + j * kLanes, sums[r][j]);
    }
  }

  using Tile = decltype(&tile<1, 1>);
  template <int kCount>
  static Tile tile_of_width(int64_t wide) {
    return wide == 1   ? &tile<kCount, 1>
           : wide == 2 ? &tile<kCount, 2>
                       : wide == 3 ? &tile < kCount,
           kVectors < 3 ? 1 : 3 > : &tile<kCount, kVectors>;
  }
  static Tile tile_of(int count, int64_t wide) {
    return count == 1   ? tile_of_width<1>(wide)
           : count == 2 ? tile_of_width<2>(wide)
           : count == 3 ? tile_of_width<3>(wide)
           : count == 4 ? tile_of_width<4>(wide)
           : count == 5 ? tile_of_width<5>(wide)
                        : tile_of_width<6>(wide);
  }

  static void add_mask(const HeadQueries& job, int64_t query, int64_t first_key, int64_t count, float* scores) {
    const int64_t at = query * job.args->mask_strides.row + first_key;
    if (job.args->mask_kind == MaskKind::kFloat32) {
      const float* mask = static_cast<const float*>(job.mask) + at;
      // Most of what is used as -inf: to base 2 the smallest float32 would become it, and a query with nothing else get
      // zeros.
      const F smallest = Vec::set(-2e38F);
      for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
        const F added = load(mask + i, n);
        const F finite = Vec::select(Vec::less(added, smallest), smallest, added);
        const F kept = Vec::select(Vec::equal(added, Vec::set(-kInfinity)), added, finite);
        Vec::store(scores + i, Vec::fma(kept, Vec::set(kLog2OfE), Vec::load(scores + i)));
      });
      return;
    }
    const uint8_t* mask = static_cast<const uint8_t*>(job.mask) + at;
    for_each_vector(count, [&](int64_t i, int n) __attribute__((always_inline)) {
      const Vec::Int bytes = n == kLanes ? Vec::int_load(mask + i) : Vec::int_load_part(mask + i, n);
      const Vec::Mask off = Vec::equal(Vec::to_float(bytes), Vec::zero());
      Vec::store(scores + i, Vec::select(off, Vec::set(-kInfinity), Vec::load(scores + i)));
    });
  }

  // Scores, in base 2: of each row's first own[r] keys they become exp2(score - largest), up to `seen` 0. rescale[r]:
  // what earlier sums of the row have to be multiplied by. A score of NaN is not among the largest, but makes the sum
  // NaN. Maxima of all rows come first, so that no row's exponentials wait for its own.
  static void soften(int rows, const int64_t* own, int64_t seen, float* scores, int64_t stride, RowState* states,
                     float* rescale) {
    float base[kRows];
    for (int r = 0; r < rows; ++r) {
      F highest = Vec::set(-kInfinity);
      for_each_vector(own[r], [&](int64_t i, int n) __attribute__((always_inline)) {
        const F score = fill(Vec::load(scores + r * stride + i), n);
        highest = Vec::select(Vec::less(highest, score), score, highest);
      });
      const float before = states[r].largest;
      const float found = Vec::largest(highest);
      states[r].largest = found > before ? found : before;
      base[r] = states[r].largest == -kInfinity ? 0.0F : states[r].largest;  // -inf: no key so far takes part
      rescale[r] = before == -kInfinity ? 0.0F : exp2f(before - base[r]);
    }
    for (int r = 0; r < rows; ++r) {
      float* row = scores + r * stride;
      F sum = Vec::zero();
      for_each_vector(own[r], [&](int64_t i, int n) __attribute__((always_inline)) {
        const F weight = exp2_or_zero(Vec::sub(fill(Vec::load(row + i), n), Vec::set(base[r])));
        Vec::store(row + i, weight);
        sum = Vec::add(sum, weight);
      });
      for (int64_t i = own[r] > 0 ? round_up(own[r]) : 0; i < seen; i += kLanes) Vec::store(row + i, Vec::zero());
      states[r].sum = states[r].sum * rescale[r] + Vec::sum(sum);
    }
  }

  // Lanes past the end of a partial vector become -inf.
  static F fill(F v, int n) { return n == kLanes ? v : Vec::select(Vec::first_lanes(n), v, Vec::set(-kInfinity)); }

  template <class T>
  static void finish(const float* sums, float sum, int64_t size, T* y) {
    const float inverse = sum == 0.0F ? 0.0F : 1.0F / sum;
    for_each_vector(size, [&](int64_t i, int n) __attribute__((always_inline)) {
      store(y + i, Vec::mul(Vec::load(sums + i), Vec::set(inverse)), n);
    });
  }
};

}  // namespace
}  // namespace kdq
