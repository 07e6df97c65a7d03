// Sharing out the work of all documents and key-value heads. For attention_*cpu.cpp.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "../../common/parallel_items.h"
#include "call.h"

namespace longvq {

// For each document and key-value head: count(length) items of work on what make(document, kv_head) returns a pointer
// to; work(made, item, scratch) for each of them by any thread, then done(pair, made) by the one that was last. They
// are taken in order and made when the first item is, so that only those in work take memory.
template <typename Count, typename Make, typename Setup, typename Work, typename Done>
void work_through(
    const Problem& p, const Count& count, const Make& make, const Setup& setup, const Work& work, const Done& done) {
  struct Pair {
    std::once_flag flag;
    decltype(make(p.documents.front(), 0)) made;
    std::atomic<int64_t> left{0};
  };
  struct Item {
    int64_t pair, number;
  };
  std::vector<Pair> pairs(p.pairs());
  std::vector<Item> items;
  for (int64_t pair = 0; pair < p.pairs(); ++pair) {
    const int64_t length = p.documents[pair / p.kv_heads].length, all = length > 0 ? count(length) : 0;
    pairs[pair].left = all;
    for (int64_t number = 0; number < all; ++number) {
      items.push_back({pair, number});
    }
  }
  share_out(static_cast<int64_t>(items.size()), setup, [&](int64_t i, auto& scratch) {
    const Item item = items[i];
    Pair& pair = pairs[item.pair];
    std::call_once(pair.flag, [&] { pair.made = make(p.documents[item.pair / p.kv_heads], item.pair % p.kv_heads); });
    work(*pair.made, item.number, scratch);
    if (pair.left.fetch_sub(1) == 1) {
      done(item.pair, *pair.made);
      pair.made.reset();
    }
  });
}

}  // namespace longvq
