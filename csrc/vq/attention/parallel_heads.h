// Distributes the work of all documents and key-value heads over the threads. For forward.cpp and backward.cpp.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../../common/parallel_items.h"
#include "call.h"

namespace longvq {

// A pair is a document and a key-value head. For each pair: make(document, kv_head) returns a unique_ptr to what its
// work items share; work(*made, item, scratch) runs for each item < count(length), on any thread; done(pair, *made)
// runs after its last item. Items start in order. A pair is made with its first item and freed after its last one, so
// only pairs in progress take memory.
template <typename Count, typename Make, typename Setup, typename Work, typename Done>
void for_each_work_item(
    const AttentionCall& call, const Count& count, const Make& make, const Setup& setup, const Work& work,
    const Done& done) {
  struct Pair {
    std::once_flag flag;
    decltype(make(call.documents.front(), 0)) made;
    std::atomic<int64_t> items_left{0};
  };
  struct Item {
    int64_t pair, number;
  };
  std::vector<Pair> pairs(call.pairs());
  std::vector<Item> items;
  for (int64_t pair = 0; pair < call.pairs(); ++pair) {
    const int64_t length = call.documents[pair / call.kv_heads].length, all = length > 0 ? count(length) : 0;
    pairs[pair].items_left = all;
    for (int64_t number = 0; number < all; ++number) {
      items.push_back({pair, number});
    }
  }
  parallel_items(static_cast<int64_t>(items.size()), setup, [&](int64_t i, auto& scratch) {
    const Item item = items[i];
    Pair& pair = pairs[item.pair];
    std::call_once(
        pair.flag, [&] { pair.made = make(call.documents[item.pair / call.kv_heads], item.pair % call.kv_heads); });
    work(*pair.made, item.number, scratch);
    if (pair.items_left.fetch_sub(1) == 1) {
      done(item.pair, *pair.made);
      pair.made.reset();
    }
  });
}

}  // namespace longvq
