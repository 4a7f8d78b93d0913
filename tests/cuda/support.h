// What the tests of the CUDA kernels share: buffers with guards, awkward values, checks.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "emulator.h"
#include "kdq/kdq.h"
#include "reference/scalar.h"

namespace kdq::test {

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition, ...)                                           \
  do {                                                                  \
    if (!(condition)) {                                                 \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition);       \
      std::printf(__VA_ARGS__);                                         \
      std::printf("\n");                                                \
      if (++::kdq::test::failures() > 20) std::exit(1);                 \
    }                                                                   \
  } while (false)

inline void require(const Status& status) {
  if (status.ok()) return;
  std::printf("unexpected error: %s\n", status.message().c_str());
  std::exit(1);
}

// Where a buffer lies in its pages: at the start, aligned, or at the end, where a read past it is a crash.
enum class Place { kStart, kEnd };

// What every kernel is tested under.
struct Setting {
  bool descending;
  Place place;
};
constexpr Setting kSettings[] = {{false, Place::kStart}, {true, Place::kEnd}};

template <class T>
class Buffer {
 public:
  Buffer(size_t n, Place place) : size_(n) {
    constexpr size_t kPage = 4096;
    const size_t pages = (n * sizeof(T) + kPage - 1) / kPage + 2;  // one that may not be touched at either end
    bytes_ = pages * kPage;
    void* memory = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(memory);
    std::memset(base_, 0x5A, bytes_);
    mprotect(base_, kPage, PROT_NONE);
    mprotect(base_ + bytes_ - kPage, kPage, PROT_NONE);
    data_ = reinterpret_cast<T*>(place == Place::kStart ? base_ + kPage : base_ + bytes_ - kPage - n * sizeof(T));
  }
  Buffer(const std::vector<T>& values, Place place) : Buffer(values.size(), place) {
    if (size_ > 0) std::memcpy(data_, values.data(), size_ * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { munmap(base_, bytes_); }

  T* data() { return data_; }
  size_t bytes() const { return size_ * sizeof(T); }
  std::vector<T> values() const { return std::vector<T>(data_, data_ + size_); }

 private:
  size_t size_;
  size_t bytes_;
  char* base_;
  T* data_;
};

inline std::mt19937& generator() {
  static std::mt19937 instance(20);
  return instance;
}

inline std::vector<float> normals(size_t n, float deviation = 1.0F) {
  std::normal_distribution<float> distribution(0.0F, deviation);
  std::vector<float> values(n);
  for (float& value : values) value = distribution(generator());
  return values;
}

// Normals, and in places what breaks careless arithmetic.
inline std::vector<float> awkward(size_t n) {
  const float special[] = {0.0F, -0.0F, NAN, INFINITY, -INFINITY, 1e-41F, -1e-41F, 3e38F, -3e38F, 0.05F, -0.05F, 0.15F};
  std::vector<float> values = normals(n);
  for (size_t i = 0; i < n; i += 3) values[i] = special[i / 3 % 12];
  return values;
}

template <class T>
std::vector<T> narrowed(const std::vector<float>& values) {
  std::vector<T> result(values.size());
  for (size_t i = 0; i < values.size(); ++i) reference::store(&result[i], values[i]);
  return result;
}

template <class T>
constexpr DType dtype_of() {
  return std::is_same<T, float>::value      ? DType::kFloat32
         : std::is_same<T, BFloat16>::value ? DType::kBFloat16
                                            : DType::kFloat16;
}

// The same bits, any NaN being like another.
template <class T>
bool same(const T& a, const T& b) {
  return std::memcmp(&a, &b, sizeof(T)) == 0 || (std::isnan(reference::load(&a)) && std::isnan(reference::load(&b)));
}
inline bool same(int8_t a, int8_t b) { return a == b; }
inline bool same(uint8_t a, uint8_t b) { return a == b; }
inline bool same(int32_t a, int32_t b) { return a == b; }
inline bool same(uint64_t a, uint64_t b) { return a == b; }

template <class T>
size_t first_difference(const std::vector<T>& a, const std::vector<T>& b) {
  for (size_t i = 0; i < a.size(); ++i) {
    if (!same(a[i], b[i])) return i;
  }
  return a.size();
}

#define CHECK_SAME(got, expected, what)                                                             \
  do {                                                                                              \
    const auto at = ::kdq::test::first_difference(got, expected);                                   \
    CHECK(got.size() == expected.size() && at == got.size(), "%s, first at %zu", (what).c_str(), at); \
  } while (false)

// A run of a kernel that must write all of `out`, once.
template <class T, class Run>
void run_watched(Buffer<T>& out, const Run& run) {
  emulator::watch().start(out.data(), out.bytes());
  require(run());
  CHECK(emulator::watch().all_once(), "some bytes of the result were not written exactly once");
  emulator::watch().start(nullptr, 0);
}

template <class Test>
void for_each_dtype(const Test& test) {
  test(float());
  test(BFloat16());
  test(Float16());
}

}  // namespace kdq::test
