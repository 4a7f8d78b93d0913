// The blocks behind large results: made on 2 MiB pages, kept for the next result of the same size.
#include <torch/csrc/stable/library.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "torch_cpu.h"

#if defined(__linux__)
// torch 2.11 and newer. Weak, so that the library also loads into 2.10, where its address is null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t ndim, const int64_t* sizes, const int64_t* strides, int64_t storage_offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* opaque_metadata,
    int64_t opaque_metadata_size, void (*deleter)(void* data, void* context), void* context);
#endif

namespace kdq::bindings {

#if defined(__linux__)
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
// A training step holds a result and a gradient at once, of 64 MiB each for 16 million float32.
constexpr size_t kKept = size_t{256} << 20;

struct Block {
  void* data;
  size_t bytes;
};

// Freed blocks, oldest first. A thread that finds the list in use goes without it, so that no fork() can leave a child
// waiting for a lock that nobody holds.
class FreeBlocks {
 public:
  FreeBlocks() { blocks_.reserve(kKept / kHugePage); }  // all there can be: give() must not throw

  void* take(size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock()) return nullptr;
    for (size_t i = blocks_.size(); i-- > 0;) {
      if (blocks_[i].bytes != bytes) continue;
      void* data = blocks_[i].data;
      remove(i);
      return data;
    }
    return nullptr;
  }

  void give(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || block.bytes > kKept) {
      std::free(block.data);
      return;
    }
    while (kept_ + block.bytes > kKept) {
      std::free(blocks_.front().data);
      remove(0);
    }
    blocks_.push_back(block);
    kept_ += block.bytes;
  }

 private:
  void remove(size_t i) {
    kept_ -= blocks_[i].bytes;
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;
  size_t kept_ = 0;
};

// Never destroyed: tensors may be freed after static destructors have run.
FreeBlocks& free_blocks() {
  static FreeBlocks* blocks = new FreeBlocks;
  return *blocks;
}

void* new_block(size_t bytes) {
  void* data = std::aligned_alloc(kHugePage, bytes);
  if (data != nullptr) madvise(data, bytes, MADV_HUGEPAGE);  // the system may refuse; nothing depends on it
  return data;
}

void release(void* data, void* context) { free_blocks().give({data, reinterpret_cast<size_t>(context)}); }

}  // namespace
#endif

bool allocate_large(const Sizes& sizes, const Sizes& strides, int32_t dtype, size_t bytes, AtenTensorHandle* handle) {
#if defined(__linux__)
  if (bytes < kHugePage || torch_from_blob == nullptr) return false;
  bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
  void* data = free_blocks().take(bytes);
  if (data == nullptr) data = new_block(bytes);
  if (data == nullptr) return false;  // torch's allocator then says so
  const auto error = torch_from_blob(data, static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), 0, dtype,
                                     aoti_torch_device_type_cpu(), -1, handle, aoti_torch_layout_strided(), nullptr, 0,
                                     release, reinterpret_cast<void*>(bytes));
  TORCH_ERROR_CODE_CHECK(error);  // the block is torch's by then, or lost: which of the two, it does not say
  return true;
#else
  (void)sizes, (void)strides, (void)dtype, (void)bytes, (void)handle;
  return false;
#endif
}

}  // namespace kdq::bindings
