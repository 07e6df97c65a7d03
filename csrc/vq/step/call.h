// The arguments of one call of vq_attention_step, and the state of one of its heads. For step.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "../attention/kernel/attention_kernel.h"
#include "../panels.h"
#include "step_kernel.h"

namespace longvq {

// An input (B, heads, T, columns) with any strides and type, read as float32.
struct StepInput {
  const void* data;
  ElementType type;
  int64_t row_stride, head_stride, time_stride, column_stride, columns;

  StepInput(const torch::stable::Tensor& x, ElementType type)
      : data(x.const_data_ptr()), type(type), row_stride(x.stride(0)), head_stride(x.stride(1)),
        time_stride(x.stride(2)), column_stride(x.stride(3)), columns(x.size(3)) {}

  // out = factor * x[row, head, time]
  void load(int64_t row, int64_t head, int64_t time, float factor, float* out) const {
    const int64_t index = row * row_stride + head * head_stride + time * time_stride;
    load_row(element_at(data, type, index), type, column_stride, columns, out);
    for (int64_t i = 0; factor != 1.0f && i < columns; ++i) {
      out[i] *= factor;
    }
  }
};

// The contiguous output (B, H, T, E), written from float32.
struct StepOutput {
  void* data;
  ElementType type;
  int64_t value_dim;

  // Stores values times factor as row `row`. Overwrites `values`.
  void store(int64_t row, float* values, float factor) const {
    for (int64_t i = 0; i < value_dim; ++i) {
      values[i] *= factor;
    }
    store_row(values, value_dim, element_at(data, type, row * value_dim), type, 1);
  }

  void store_zeros(int64_t row) const {
    std::memset(element_at(data, type, row * value_dim), 0, value_dim * element_size(type));
  }
};

struct StepCall {
  StepInput q, k, v;
  StepInput far_q, far_k;  // for pairs outside the window; equal to q and k if they are not given
  StepOutput out;
  const float* codebook;  // each codeword is F contiguous numbers
  int64_t code_head_stride, code_stride;
  const int64_t* codes;  // nullptr: TokenByToken finds them
  int64_t codes_strides[3];
  const float* bias;  // (H, W), contiguous; nullptr: none
  const bool* mask;   // nullptr: none
  int64_t mask_strides[2];
  float *far_sums, *ring_keys, *ring_values;
  int64_t *far_counts, *ring_codes, *lengths;
  float scale;
  int64_t window, reach;  // W and R = max(W - 1, 0)
  Activation activation;
  bool uses_exact_keys, has_far_q;
  int64_t batch, heads, kv_heads, group, length, head_dim, far_head_dim, value_dim, num_codes;
  int64_t max_ring;  // the largest number of keys in a ring during this call
  const AttentionStepKernel& step_kernel;
  const AttentionKernel& block_kernel;

  bool ignored(int64_t row, int64_t t) const {
    return mask != nullptr && mask[row * mask_strides[0] + t * mask_strides[1]];
  }

  // The factor of the scores of the query at `position` of its row.
  float score_factor(int64_t position) const {
    return activation == Activation::kSoftmax ? scale : 1.0f / static_cast<float>(position + 1);
  }

  // The row of a query in the output.
  int64_t output_row(int64_t row, int64_t head, int64_t t) const { return (row * heads + head) * length + t; }
};

// The state of one row and key-value head. The key at position p is in slot p % R of the ring until it leaves the
// window.
struct StepHead {
  const StepCall& call;
  int64_t row, kv_head;
  const float* codebook;
  float *sums, *ring_keys, *ring_values;
  int64_t *counts, *ring_codes;

  StepHead(const StepCall& call, int64_t row, int64_t kv_head)
      : call(call), row(row), kv_head(kv_head), codebook(call.codebook + kv_head * call.code_head_stride) {
    const int64_t pair = row * call.kv_heads + kv_head;
    sums = call.far_sums + pair * call.num_codes * call.value_dim;
    counts = call.far_counts + pair * call.num_codes;
    ring_codes = call.ring_codes + pair * call.reach;
    ring_keys = call.ring_keys + pair * call.reach * (call.uses_exact_keys ? call.head_dim : 0);
    ring_values = call.ring_values + pair * call.reach * call.value_dim;
  }

  const float* codeword(int64_t code) const { return codebook + code * call.code_stride; }

  int64_t given_code(int64_t t) const {
    return call.codes[row * call.codes_strides[0] + kv_head * call.codes_strides[1] + t * call.codes_strides[2]];
  }

  int64_t in_ring(int64_t position) const { return std::min(position, call.reach); }

  // The slot of the key `offset` >= 1 positions before `position`.
  int64_t slot(int64_t position, int64_t offset) const { return (position - offset) % call.reach; }

  void add_far(int64_t code, const float* value) {
    float* sum = sums + code * call.value_dim;
    for (int64_t e = 0; e < call.value_dim; ++e) {
      sum[e] += value[e];
    }
    ++counts[code];
  }

  // Adds the key at `position` to the ring, in the slot of the key that leaves the window, and calls far(code, value)
  // for the key that leaves. Without a ring the new key itself is far at once.
  template <typename Far>
  void push(int64_t position, int64_t code, const float* key, const float* value, const Far& far) {
    if (call.reach == 0) {
      far(code, value);
      return;
    }
    const int64_t s = position % call.reach;
    if (position >= call.reach) {
      far(ring_codes[s], ring_values + s * call.value_dim);
    }
    ring_codes[s] = code;
    std::memcpy(ring_values + s * call.value_dim, value, call.value_dim * sizeof(float));
    if (call.uses_exact_keys) {
      std::memcpy(ring_keys + s * call.head_dim, key, call.head_dim * sizeof(float));
    }
  }
};

}  // namespace longvq
