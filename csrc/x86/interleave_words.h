// Interleaving of 64-bit words, for the binary kernels whose lanes are such.
#pragma once

#include <stdint.h>
#include <string.h>

namespace kdq {
namespace {

// Row-major channels, of `words` words each, -> [words][nr]; missing channels are zero.
inline void interleave_words(const uint64_t* b, int64_t words, int channels, int nr, char* panel) {
  for (int64_t w = 0; w < words; ++w) {
    for (int c = 0; c < nr; ++c, panel += sizeof(uint64_t)) {
      const uint64_t word = c < channels ? b[c * words + w] : 0;
      memcpy(panel, &word, sizeof(word));
    }
  }
}

}  // namespace
}  // namespace kdq
