// What the tests of the CUDA kernels share: where they run, buffers, awkward values, checks.
//
// Compiled as C++ they run on the emulator; compiled by nvcc, the same tests run on a GPU.
#pragma once

#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "kdq/kdq.h"
#include "reference/scalar.h"

#if defined(__CUDACC__)
#include "cuda/launch.h"
#else
#include "launcher.h"
#endif

namespace kdq::test {

inline int& failures() {
  static int count = 0;
  return count;
}

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s: ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::printf("\n");                                          \
      if (++::kdq::test::failures() > 20) std::exit(1);           \
    }                                                             \
  } while (false)

inline void require(const Status& status) {
  if (status.ok()) return;
  std::printf("unexpected error: %s\n", status.message().c_str());
  std::exit(1);
}

// ---- where kernels run ---------------------------------------------------------------------------------------------

#if defined(__CUDACC__)

class Launcher {
 public:
  explicit Launcher(bool) {}

  template <class Kernel>
  Status run(const Kernel& kernel, int64_t blocks) const {
    return waited(stream_.run(kernel, blocks));
  }
  Status use_hopper(bool* use) const { return stream_.use_hopper(use); }
  Status tensor_map(const cuda::Operand& rows, int box_rows, cuda::TensorMap* map) const {
    return stream_.tensor_map(rows, box_rows, map);
  }
  template <class Kernel>
  Status run_resident(const Kernel& kernel, int64_t most) const {
    return waited(stream_.run_resident(kernel, most));
  }

 private:
  static Status waited(const Status& status) { return status.ok() ? cuda::status_of(cudaDeviceSynchronize()) : status; }

  cuda::StreamLauncher stream_ = cuda::StreamLauncher(nullptr);
};

// Memory that both sides see.
inline char* new_pages(size_t bytes) {
  void* memory = nullptr;
  require(cuda::status_of(cudaMallocManaged(&memory, bytes)));
  return static_cast<char*>(memory);
}
inline void delete_pages(char* base, size_t) { (void)cudaFree(base); }
inline void forbid_page(char*, size_t) {}

// A result that is not written keeps what Buffer put there, and so is not the expected one.
template <class Buffer, class Run>
void run_watched(Buffer&, const Run& run) {
  require(run());
}

inline bool can_run() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0;
}

#else

using emulator::Launcher;

inline char* new_pages(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  return static_cast<char*>(memory);
}
inline void delete_pages(char* base, size_t bytes) { munmap(base, bytes); }
inline void forbid_page(char* page, size_t bytes) { mprotect(page, bytes, PROT_NONE); }

// A run of a kernel that must write all of `out`, once.
template <class Buffer, class Run>
void run_watched(Buffer& out, const Run& run) {
  emulator::watch().start(out.data(), out.bytes());
  require(run());
  CHECK(emulator::watch().all_once(), "some bytes of the result were not written exactly once");
  emulator::watch().start(nullptr, 0);
}

inline bool can_run() { return true; }

#endif

// What main() does: 77 says that there is no GPU.
template <class Tests>
int run_tests(const Tests& tests) {
  if (!can_run()) {
    std::printf("no GPU: nothing was tested\n");
    return 77;
  }
  require(set_isa("reference"));
  tests();
  return failures() == 0 ? 0 : 1;
}

// ---- buffers and values --------------------------------------------------------------------------------------------

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
    base_ = new_pages(bytes_);
    std::memset(base_, 0x5A, bytes_);
    forbid_page(base_, kPage);
    forbid_page(base_ + bytes_ - kPage, kPage);
    data_ = reinterpret_cast<T*>(place == Place::kStart ? base_ + kPage : base_ + bytes_ - kPage - n * sizeof(T));
  }
  Buffer(const std::vector<T>& values, Place place) : Buffer(values.size(), place) {
    if (size_ > 0) std::memcpy(data_, values.data(), size_ * sizeof(T));
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { delete_pages(base_, bytes_); }

  T* data() { return data_; }
  const T* data() const { return data_; }
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

// One step of a 16-bit type, relative; for float32 the given number.
template <class T>
constexpr double step_of(double of_float32) {
  return dtype_of<T>() == DType::kFloat32 ? of_float32 : dtype_of<T>() == DType::kBFloat16 ? 8e-3 : 1e-3;
}

// A call with a bad argument, which the error must name.
inline void refuses(const char* argument, const Status& status) {
  const bool names_it = status.message().find(argument) != std::string::npos;
  CHECK(!status.ok() && names_it, "expected a complaint about %s, got '%s'", argument, status.message().c_str());
}

#define CHECK_SAME(got, expected, what)                                                               \
  do {                                                                                                \
    const auto at = ::kdq::test::first_difference(got, expected);                                     \
    CHECK(got.size() == expected.size() && at == got.size(), "%s, first at %zu", (what).c_str(), at); \
  } while (false)

template <class Test>
void for_each_dtype(const Test& test) {
  test(float());
  test(BFloat16());
  test(Float16());
}

}  // namespace kdq::test
