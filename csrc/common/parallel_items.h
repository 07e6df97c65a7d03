// Work items for all threads, with results that do not depend on the number of threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <cstdint>

namespace longvq {

// Runs call(item, scratch) for each item < items. A free thread takes the next item. Each thread has a scratch of its
// own, made by setup(); the results of an item must not depend on the thread or on earlier contents of the scratch.
template <typename Setup, typename Call>
void parallel_items(int64_t items, const Setup& setup, const Call& call) {
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
