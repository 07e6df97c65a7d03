// The arguments of one call of vq_attention_step, and the state of one head. For attention_step_cpu.cpp.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "../attention/kernel/attention_kernel.h"
#include "../panels.h"
#include "step_kernel.h"

namespace longvq {

// (B, heads, T, width) of any strides and type, read as float32.
struct StepInput {
  const void* data;
  ElementType type;
  int64_t row_stride, head_stride, time_stride, column_stride, width;

  StepInput(const torch::stable::Tensor& x, ElementType type)
      : data(x.const_data_ptr()), type(type), row_stride(x.stride(0)), head_stride(x.stride(1)),
        time_stride(x.stride(2)), column_stride(x.stride(3)), width(x.size(3)) {}

  // out = factor * x[row, head, time]
  void load(int64_t row, int64_t head, int64_t time, float factor, float* out) const {
    const int64_t place = row * row_stride + head * head_stride + time * time_stride;
    load_row(element_at(data, type, place), type, column_stride, width, out);
    for (int64_t i = 0; factor != 1.0f && i < width; ++i) {
      out[i] *= factor;
    }
  }
};

// Contiguous (B, H, T, E), written from float32.
struct StepOutput {
  void* data;
  ElementType type;
  int64_t width;

  // values times factor, which are overwritten
  void store(int64_t place, float* values, float factor) const {
    for (int64_t i = 0; i < width; ++i) {
      values[i] *= factor;
    }
    store_row(values, width, element_at(data, type, place * width), type, 1);
  }

  void store_zeros(int64_t place) const {
    std::memset(element_at(data, type, place * width), 0, width * element_size(type));
  }
};

struct StepProblem {
  StepInput q, k, v;
  StepInput far_q, far_k;  // for pairs outside the window: q and k themselves if there are no others
  StepOutput out;
  const float* codebook;  // rows of F numbers side by side
  int64_t code_head_stride, code_stride;
  const int64_t* codes;  // nullptr: to be found
  int64_t codes_strides[3];
  const float* bias;  // (H, W), contiguous; nullptr: none
  const bool* mask;   // nullptr: none
  int64_t mask_strides[2];
  float *far_sums, *ring_keys, *ring_values;
  int64_t *far_counts, *ring_codes, *lengths;
  float scale;
  int64_t window, reach;  // W and R = max(W - 1, 0)
  Activation activation;
  bool exact, has_far_q;
  int64_t batch, heads, kv_heads, group, length, near_depth, far_depth, values, num_codes;
  int64_t most_near;  // the most keys that a ring holds at any time of this call
  const AttentionStepKernel& step_kernel;
  const AttentionKernel& block_kernel;

  bool ignored(int64_t row, int64_t t) const {
    return mask != nullptr && mask[row * mask_strides[0] + t * mask_strides[1]];
  }

  // What multiplies the scores of the query at `position` of its row.
  float unit(int64_t position) const {
    return activation == Activation::kSoftmax ? scale : 1.0f / static_cast<float>(position + 1);
  }

  // (B, H, T) of one query, as a row of the output
  int64_t place(int64_t row, int64_t head, int64_t t) const { return (row * heads + head) * length + t; }
};

// The state of one row and key-value head. Position p is kept in slot p % R of the ring until it leaves the window.
struct StepHead {
  const StepProblem& p;
  int64_t row, kv_head;
  const float* codebook;
  float *sums, *ring_keys, *ring_values;
  int64_t *counts, *ring_codes;

  StepHead(const StepProblem& p, int64_t row, int64_t kv_head)
      : p(p), row(row), kv_head(kv_head), codebook(p.codebook + kv_head * p.code_head_stride) {
    const int64_t pair = row * p.kv_heads + kv_head;
    sums = p.far_sums + pair * p.num_codes * p.values;
    counts = p.far_counts + pair * p.num_codes;
    ring_codes = p.ring_codes + pair * p.reach;
    ring_keys = p.ring_keys + pair * p.reach * (p.exact ? p.near_depth : 0);
    ring_values = p.ring_values + pair * p.reach * p.values;
  }

  const float* codeword(int64_t code) const { return codebook + code * p.code_stride; }

  int64_t given_code(int64_t t) const {
    return p.codes[row * p.codes_strides[0] + kv_head * p.codes_strides[1] + t * p.codes_strides[2]];
  }

  int64_t in_ring(int64_t position) const { return std::min(position, p.reach); }

  // Slot of the key `offset` >= 1 positions before `position`.
  int64_t slot(int64_t position, int64_t offset) const { return (position - offset) % p.reach; }

  void add_far(int64_t code, const float* value) {
    float* sum = sums + code * p.values;
    for (int64_t e = 0; e < p.values; ++e) {
      sum[e] += value[e];
    }
    ++counts[code];
  }

  // Position `position` joins the past: it takes the place of the key that leaves the window, for which
  // far(code, value) is called. Without a ring that is the new one itself.
  template <typename Far>
  void push(int64_t position, int64_t code, const float* key, const float* value, const Far& far) {
    if (p.reach == 0) {
      far(code, value);
      return;
    }
    const int64_t s = position % p.reach;
    if (position >= p.reach) {
      far(ring_codes[s], ring_values + s * p.values);
    }
    ring_codes[s] = code;
    std::memcpy(ring_values + s * p.values, value, p.values * sizeof(float));
    if (p.exact) {
      std::memcpy(ring_keys + s * p.near_depth, key, p.near_depth * sizeof(float));
    }
  }
};

}  // namespace longvq
