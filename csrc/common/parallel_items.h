// Work shared out among threads so that results do not depend on how many there are.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace longvq {

// call(item, scratch) for items 0 .. items: threads take the next one when they are free, each with a scratch of its
// own made by `setup`. What an item computes must not depend on who does it, nor on the scratch's past.
template <typename Setup, typename Call>
void share_out(int64_t items, const Setup& setup, const Call& call) {
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, items, 1, [&](int64_t, int64_t) {
    int64_t item = next.fetch_add(1);
    if (item < items) {
      auto scratch = setup();
      for (; item < items; item = next.fetch_add(1)) {
        call(item, scratch);
      }
    }
  });
}

}  // namespace longvq
