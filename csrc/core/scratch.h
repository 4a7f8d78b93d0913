// Scratch memory for one call: a buffer of the calling thread that grows and is reused, so that a layer called in a
// loop does not allocate. Blocking keeps requests to a few megabytes; a larger one (very long rows) is freed again
// after use.
#pragma once

#include <cstddef>
#include <cstdlib>

namespace kdq {

// At most kDepth of them may be alive on a thread at a time.
class Scratch {
 public:
  explicit Scratch(size_t bytes) : buffer_(next_buffer()) { buffer_.reserve(bytes); }
  ~Scratch() {
    if (buffer_.bytes > kKeep) buffer_.release();
    --depth();
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;

  // 64-byte aligned; nullptr when memory ran out.
  char* data() { return static_cast<char*>(buffer_.data); }

 private:
  static constexpr int kDepth = 4;
  static constexpr size_t kAlignment = 64;
  static constexpr size_t kKeep = size_t{16} << 20;

  struct Buffer {
    void* data = nullptr;
    size_t bytes = 0;

    void reserve(size_t wanted) {
      if (data != nullptr && bytes >= wanted) return;
      release();
      data = std::aligned_alloc(kAlignment, wanted / kAlignment * kAlignment + kAlignment);
      bytes = data == nullptr ? 0 : wanted;
    }
    void release() {
      std::free(data);
      data = nullptr;
      bytes = 0;
    }
    ~Buffer() { release(); }
  };

  static int& depth() {
    static thread_local int value = 0;
    return value;
  }
  static Buffer& next_buffer() {
    static thread_local Buffer buffers[kDepth];
    return buffers[depth()++ % kDepth];
  }

  Buffer& buffer_;
};

}  // namespace kdq
