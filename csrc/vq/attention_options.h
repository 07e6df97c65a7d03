// The options of the attention operator, for CPU and CUDA: the fields of longvq_layers/ops/_attention_options.py, in
// the same order and with the same values of the choices. No header of torch: the CUDA kernels include this file too.
#pragma once

#include <cstdint>

namespace longvq {

// What turns scores into weights.
enum class Activation : int64_t { kSoftmax = 0, kLaplace = 1 };

// Which keys are used inside the window.
enum class LocalKeys : int64_t { kQuantized = 0, kExact = 1 };

// Where keys receive gradients from.
enum class KeyGrad : int64_t { kCluster = 0, kWindow = 1 };

struct AttentionOptions {
  float scale;  // unused with laplace
  bool causal;
  int64_t window;  // W, in positions
  Activation activation;
  LocalKeys local_keys;
  KeyGrad key_grad;

  // Whether some scores use a key itself instead of its codeword.
  constexpr bool uses_exact_keys() const { return local_keys == LocalKeys::kExact && window > 0; }
};

}  // namespace longvq
