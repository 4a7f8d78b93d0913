// What hopper_thread.h has, on the CPU: barriers in shared memory, the copy engine, products of warpgroups, each by
// PTX's description of it.
//
// What is asynchronous happens at either end of the time that PTX allows, as Timing says: a copy as soon as it is
// asked for, or when nobody can go on without it, and of several the last one first; a product at once, or when it is
// waited for. What may not be read meanwhile is rubbish. A missing wait so becomes a wrong result in one of the two; a
// wait for what never comes is a deadlock, which Block reports.
#pragma once

#include <map>
#include <utility>

#include "cuda/hopper_thread.h"
#include "emulator.h"

namespace kdq::emulator {

struct Timing {
  bool late_copies = false;
  bool late_products = false;
};

constexpr Timing kTimings[] = {{true, true}, {true, false}, {false, true}, {false, false}};

constexpr int kRubbish = 0xA5;

// What a TensorMap holds here.
struct RowsMap {
  const uint8_t* data;
  int64_t rows;
  int64_t row_bytes;
  int64_t box_rows;
};

inline RowsMap rows_map(const cuda::TensorMap& map) {
  RowsMap rows;
  std::memcpy(&rows, map.opaque, sizeof(rows));
  return rows;
}

// The limits are those of cuTensorMapEncodeTiled.
inline cuda::TensorMap tensor_map_of(const RowsMap& rows) {
  if (reinterpret_cast<uintptr_t>(rows.data) % 16 != 0) fail("a map's address is no multiple of 16");
  if (rows.row_bytes % 16 != 0 || rows.row_bytes >= int64_t{1} << 40) fail("a map's rows have a wrong length");
  if (rows.rows < 1 || rows.row_bytes < 1 || rows.rows > int64_t{1} << 32) fail("a map has a wrong size");
  if (rows.box_rows < 1 || rows.box_rows > 256) fail("a map's box has a wrong size");
  cuda::TensorMap map = {};
  std::memcpy(map.opaque, &rows, sizeof(rows));
  return map;
}

// ---- what the threads of a block share ------------------------------------------------------------------------------

class HopperBlock {
 public:
  HopperBlock(char* shared, size_t bytes, Timing timing) : timing_(timing), shared_(shared), bytes_(bytes) {}

  const Timing& timing() const { return timing_; }

  // Shared memory is seen to begin at 1024, as on the GPU.
  uint32_t address(const void* p) const {
    const auto offset = static_cast<const char*>(p) - shared_;
    if (offset < 0 || static_cast<size_t>(offset) >= bytes_) fail("an address is not in shared memory");
    return kBase + static_cast<uint32_t>(offset);
  }
  char* at(uint32_t address, size_t bytes) const {
    if (address < kBase || address - kBase + bytes > bytes_) fail("an access leaves shared memory");
    return shared_ + (address - kBase);
  }

  // ---- barriers ----

  void init(const void* barrier, uint32_t arrivals) {
    if (address(barrier) % 8 != 0) fail("a barrier is not aligned");
    if (arrivals < 1 || !barriers_.emplace(barrier, BarrierState{arrivals, arrivals, 0, 0}).second) {
      fail("a barrier is set up wrongly, or twice");
    }
    published_ = false;
  }
  void publish() { published_ = true; }
  void arrive(const void* barrier, uint32_t bytes) {
    BarrierState& state = find(barrier);
    if (state.missing == 0) fail("more threads arrive at a barrier than it has room for");
    --state.missing;
    state.bytes += bytes;
    finish(&state);
  }
  bool is_over(const void* barrier, uint32_t parity) { return (find(barrier).phase & 1U) != parity; }

  // Of threads that meet under a number: which meeting this one is for, and whether it is over.
  int arrive_at(int number, int threads) {
    Meeting& meeting = meetings_[number];
    const int own = meeting.count;
    if (++meeting.present == threads) {
      meeting.present = 0;
      ++meeting.count;
    }
    return own;
  }
  bool has_met(int number, int own) { return meetings_[number].count != own; }

  // ---- copies ----

  void copy(void* to, const RowsMap& from, int64_t byte, int64_t row, const void* barrier) {
    if (address(to) % 128 != 0) fail("a copy goes to no multiple of 128");
    find(barrier);
    pending_.push_back({address(to), from, byte, row, barrier});
    if (!timing_.late_copies) {
      deliver();
    } else {
      std::memset(at(address(to), static_cast<size_t>(from.box_rows * kRow)), kRubbish,
                  static_cast<size_t>(from.box_rows * kRow));
    }
  }

  // The last of the copies that are on their way, if there is one.
  bool deliver() {
    if (pending_.empty()) return false;
    const Copy copy = pending_.back();
    pending_.pop_back();
    for (int64_t r = 0; r < copy.from.box_rows; ++r) {
      for (int64_t c = 0; c < kRow; ++c) {
        const int64_t row = copy.row + r;
        const int64_t byte = copy.byte + c;
        const bool inside = row >= 0 && row < copy.from.rows && byte >= 0 && byte < copy.from.row_bytes;
        const uint8_t value = inside ? copy.from.data[row * copy.from.row_bytes + byte] : uint8_t{0};
        const auto linear = copy.to + static_cast<uint32_t>(r * kRow + c);
        std::memcpy(at(swizzled_128(linear), 1), &value, 1);
      }
    }
    BarrierState& state = find(copy.barrier);
    state.bytes -= copy.from.box_rows * kRow;
    finish(&state);
    return true;
  }

  // Bits 4 to 6 of an address, exclusive or bits 7 to 9.
  static uint32_t swizzled_128(uint32_t address) { return address ^ (address >> 7 & 7U) << 4; }

  // ---- products ----

  struct Product {
    uint64_t a;
    uint64_t b;
    bool accumulate;
    bool is_int8;
    bool operator==(const Product& other) const {
      return a == other.a && b == other.b && accumulate == other.accumulate && is_int8 == other.is_int8;
    }
  };

  // Product number `index` of a warpgroup: all its threads must mean the same.
  void agree(int warpgroup, size_t index, const Product& product) {
    std::vector<Agreed>& agreed = agreed_[warpgroup];
    if (index == agreed.size()) agreed.push_back({product, 0});
    if (!(agreed[index].product == product)) fail("threads of a warpgroup differ in a product");
    ++agreed[index].threads;
  }

  // A row of an operand: rows run along k, with the 128-byte swizzle, as its descriptor says.
  using Row = uint32_t[cuda::kWgmmaBytes / 4];
  void read(uint64_t descriptor, int row, Row& words) const {
    const auto start = static_cast<uint32_t>(descriptor & 0x3FFFU) << 4;
    const auto eight_rows = static_cast<uint32_t>(descriptor >> 32 & 0x3FFFU) << 4;
    if (descriptor >> 62 != 1) fail("a descriptor is not for the 128-byte swizzle");
    if ((descriptor >> 49 & 7U) != 0 || start % 1024 >= kRow) fail("an operand is not where its swizzle starts");
    if ((descriptor & kUnusedBits) != 0) fail("a descriptor has bits that mean nothing");
    const uint32_t linear = start + static_cast<uint32_t>(row / 8) * eight_rows + static_cast<uint32_t>(row % 8 * kRow);
    for (uint32_t byte = 0; byte < cuda::kWgmmaBytes; byte += 16) {
      std::memcpy(words + byte / 4, at(swizzled_128(linear + byte), 16), 16);
    }
  }

  // When the block is done.
  void check_end() const {
    if (!pending_.empty()) fail("a block ends while a copy is on its way");
    for (const auto& [warpgroup, agreed] : agreed_) {
      for (const Agreed& one : agreed) {
        if (one.threads != cuda::kWarpgroup) fail("some threads of a warpgroup miss a product");
      }
    }
  }

 private:
  static constexpr uint32_t kBase = 1024;
  static constexpr int kRow = cuda::kTileRowBytes;
  static constexpr uint64_t kUnusedBits = 0x3FF1C000C000C000U;  // 14, 15, 30, 31, 46 to 48, 52 to 61

  struct BarrierState {
    uint32_t arrivals;
    uint32_t missing;
    int64_t bytes;  // that are expected; less than 0 while they are early
    uint32_t phase;
  };
  struct Meeting {
    int present = 0;
    int count = 0;
  };
  struct Agreed {
    Product product;
    int threads;
  };
  struct Copy {
    uint32_t to;
    RowsMap from;
    int64_t byte;
    int64_t row;
    const void* barrier;
  };

  BarrierState& find(const void* barrier) {
    const auto at = barriers_.find(barrier);
    if (at == barriers_.end()) fail("a barrier is used that was not set up");
    if (!published_) fail("a barrier is used that others may not see yet");
    return at->second;
  }
  static void finish(BarrierState* state) {
    if (state->bytes >= 1 << 20) fail("a barrier expects too many bytes");
    if (state->missing > 0 || state->bytes != 0) return;
    state->missing = state->arrivals;
    ++state->phase;
  }

  Timing timing_;
  char* shared_;
  size_t bytes_;
  bool published_ = false;
  std::map<const void*, BarrierState> barriers_;
  std::map<int, Meeting> meetings_;
  std::vector<Copy> pending_;
  std::map<int, std::vector<Agreed>> agreed_;
};

// ---- a thread -------------------------------------------------------------------------------------------------------

class HopperThread : public Thread {
 public:
  HopperThread(const Thread& thread, int64_t blocks, HopperBlock* shared)
      : Thread(thread), blocks_(blocks), shared_(shared) {}

  int64_t blocks() const { return blocks_; }
  uint32_t shared_address(const void* p) const { return shared_->address(p); }
  void sync_warp() { wait(State::kAtExchange); }

  template <int kNumber, int kThreads>
  void sync_some() {
    static_assert(kNumber > 0 && kNumber < 16 && kThreads % cuda::kWarp == 0, "what bar.sync takes");
    const int own = shared_->arrive_at(kNumber, kThreads);
    wait_until([&] { return shared_->has_met(kNumber, own); });
  }

  template <int kRegisters>
  void fewer_registers() {
    static_assert(kRegisters % 8 == 0 && kRegisters >= 24 && kRegisters <= 256, "what setmaxnreg takes");
  }
  template <int kRegisters>
  void more_registers() {
    fewer_registers<kRegisters>();
  }

  void init(cuda::Barrier* barrier, uint32_t arrivals) { shared_->init(barrier, arrivals); }
  void publish_barriers() { shared_->publish(); }
  // Others go on before this thread does: they may at once use what it hands over.
  void arrive(cuda::Barrier* barrier) {
    shared_->arrive(barrier, 0);
    yield();
  }
  void arrive_expecting(cuda::Barrier* barrier, uint32_t bytes) { shared_->arrive(barrier, bytes); }
  void wait(cuda::Barrier* barrier, uint32_t parity) {
    wait_until([&] { return shared_->is_over(barrier, parity); });
  }

  void copy_tile(void* to, const cuda::TensorMap* map, int32_t byte, int32_t row, cuda::Barrier* barrier) {
    shared_->copy(to, rows_map(*map), byte, row, barrier);
  }

  void wgmma_fence() { fenced_ = true; }
  void wgmma_commit() {
    previous_ = committed_;
    committed_ = issued_.size();
  }
  void wgmma_wait_for_previous() { compute(previous_); }
  void wgmma_finish(int32_t (&d)[cuda::kWgmmaSums]) {
    if (committed_ != issued_.size()) fail("products are waited for that were not committed");
    compute(committed_);
    if (sums_ != nullptr) std::memcpy(d, real_, sizeof(real_));
    sums_ = nullptr;
    fenced_ = false;
  }
  void wgmma_int8(int32_t (&d)[cuda::kWgmmaSums], uint64_t a, uint64_t b, bool accumulate) {
    issue(d, {a, b, accumulate, true});
  }
  void wgmma_and(int32_t (&d)[cuda::kWgmmaSums], uint64_t a, uint64_t b, bool accumulate) {
    issue(d, {a, b, accumulate, false});
  }

  // When the thread is done.
  void check_end() {
    if (sums_ != nullptr) fail("a thread ends while a product is on its way");
  }

 private:
  using Thread::wait;

  int warpgroup() const { return index() / cuda::kWarpgroup; }

  // While products are on their way the sums are in real_, and rubbish where the kernel has them.
  void issue(int32_t (&d)[cuda::kWgmmaSums], const HopperBlock::Product& product) {
    if (!fenced_) fail("a product without a fence between it and other accesses to its sums");
    if (sums_ != nullptr && sums_ != d) fail("products of several sums at once: the emulator knows one");
    if (sums_ == nullptr) {
      std::memcpy(real_, d, sizeof(real_));
      std::memset(d, kRubbish, sizeof(real_));
    }
    sums_ = d;
    shared_->agree(warpgroup(), issued_.size(), product);
    issued_.push_back(product);
    if (!shared_->timing().late_products) compute(issued_.size());
  }

  // All products before number `end`.
  void compute(size_t end) {
    for (; computed_ < end; ++computed_) compute(issued_[computed_]);
  }

  // Sum i of a thread: row 16 (warp of the warpgroup) + lane / 4 (+ 8 for i % 4 >= 2), column 8 (i / 4) +
  // 2 (lane % 4) + i % 2.
  void compute(const HopperBlock::Product& product) {
    const int first_row = index() % cuda::kWarpgroup / cuda::kWarp * 16 + lane() / 4;
    HopperBlock::Row a[2];
    for (int half = 0; half < 2; ++half) shared_->read(product.a, first_row + 8 * half, a[half]);
    for (int c = 0; c < cuda::kWgmmaSums / 2; ++c) {
      HopperBlock::Row b;
      shared_->read(product.b, 8 * (c / 2) + 2 * (lane() % 4) + c % 2, b);
      for (int half = 0; half < 2; ++half) {
        int32_t* sum = real_ + c / 2 * 4 + 2 * half + c % 2;
        *sum = (product.accumulate ? *sum : 0) + dot(a[half], b, product.is_int8);
      }
    }
  }

  static int32_t dot(const HopperBlock::Row& a, const HopperBlock::Row& b, bool is_int8) {
    int32_t sum = 0;
    for (int w = 0; w < cuda::kWgmmaBytes / 4; ++w) {
      sum += is_int8 ? int8_product(a[w], b[w]) : __builtin_popcount(a[w] & b[w]);
    }
    return sum;
  }

  int64_t blocks_;
  HopperBlock* shared_;
  bool fenced_ = false;
  const int32_t* sums_ = nullptr;
  int32_t real_[cuda::kWgmmaSums];
  std::vector<HopperBlock::Product> issued_;
  size_t previous_ = 0;  // how many were committed, but for the last group
  size_t committed_ = 0;
  size_t computed_ = 0;
};

}  // namespace kdq::emulator
